"""A tiny tokenizer with random weights, for tests of methods that predict its codes."""

import functools
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastssl.nn.dvae import Decoder, Encoder


@torch.no_grad()
def save_tokenizer(path: Path, vocabulary: int = 24, groups: int = 4, seed: int = 0) -> str:
    """Writes the weights of a `dvae`'s encoder and decoder of width 4; the stride is 2^(groups − 1)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder, decoder = Encoder(4, vocabulary, groups, 1), Decoder(4, vocabulary, groups, 1, 8)
        images = torch.rand(64, 3, 1, 1) + 0.5 * torch.randn(64, 3, 32, 32)
        output, hidden = encoder.blocks.output.conv, encoder.hidden(images)
        std, mean = torch.std_mean(hidden, (0, 2, 3))
        output.w /= std[:, None, None] + 1e-6  # so that images have many codes
        output.b -= (output.w[:, :, 0, 0] * mean).sum(1)
    parts = {"encoder": encoder, "decoder": decoder}
    save_file({f"{part}.{n}": x for part, module in parts.items() for n, x in module.state_dict().items()}, path)
    return str(path)


@functools.cache
def tokenizer_file() -> str:
    """A file for all tests of a process, which removes it at its end. Stride 4: both views of `beit` have one size."""
    _folders.append(tempfile.TemporaryDirectory(prefix="fastssl-tokenizer-"))
    return save_tokenizer(Path(_folders[-1].name, "tokenizer.safetensors"), groups=3)


_folders: list[tempfile.TemporaryDirectory] = []
