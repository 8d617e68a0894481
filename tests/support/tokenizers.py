"""A tiny tokenizer with random weights, for tests of methods that predict its codes."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from fastssl.nn.dvae import Decoder, Encoder


def save_tokenizer(path: Path, vocabulary: int = 24, groups: int = 4, seed: int = 0) -> str:
    """Writes the weights of a `dvae`'s encoder and decoder of width 4; the stride is 2^(groups − 1)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = {"encoder": Encoder(4, vocabulary, groups, 1), "decoder": Decoder(4, vocabulary, groups, 1, 8)}
    output = parts["encoder"].blocks.output.conv.w
    output.data.mul_(1000)  # so that images have many codes
    save_file({f"{part}.{n}": x for part, module in parts.items() for n, x in module.state_dict().items()}, path)
    return str(path)
