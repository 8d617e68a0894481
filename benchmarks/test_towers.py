"""Steps of CLIP with captions cut to the longest of the batch, which changes nothing, and with all 77 tokens.

Forward and backward of a whole step, without the optimizer. *official* runs the same network on all tokens; the others
are our step with all tokens, and the text tower alone.
"""

import pytest
import torch
from torch import Tensor

from fastssl.contract import Batch
from fastssl.methods import clip
from fastssl.ops import dispatch

from .harness import Case, compare, forward_backward
from .machine import DEVICE, GPU_SIZE

LONGEST = 24  # tokens of the longest caption: real ones have 10 to 20
END = 49407


def token_batch(batch: int) -> Tensor:
    """Captions of 10 to LONGEST tokens, padded to 77."""
    tokens = torch.zeros(batch, 77, dtype=torch.int64)
    for row, length in enumerate(torch.linspace(10, LONGEST, batch).long().tolist()):
        tokens[row, : length - 1], tokens[row, length - 1] = torch.randint(1, END - 1, (length - 1,)), END
    return tokens.to(DEVICE)


@pytest.mark.parametrize("batch", [16, pytest.param(512, marks=pytest.mark.skipif(**GPU_SIZE))])
def test_clip_step(benchmark, batch):
    method = clip.build(clip.Config("vit_base")).to(DEVICE)
    images, tokens = torch.randn(batch, 3, 224, 224, device=DEVICE), token_batch(batch)
    empty = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    inputs = (method.logit_scale, method.text.projection.weight, method.visual.norm.weight)

    def step(ids: Tensor):
        return forward_backward(lambda: method(Batch((images,), empty, empty, None, {"tokens": ids}))[0], *inputs)

    def official():
        with dispatch.reference():
            return step(tokens)()

    case = Case(
        op="CLIP's step",
        size=f"ViT-B/32, B={batch:,}, 224 pixels, captions of at most {LONGEST} of 77 tokens, fp32, forward + backward",
        kernel="batch_info_nce_fwd",
        contestants={"ours": step(tokens[:, :LONGEST]), "official": official, "ours, 77 tokens": step(tokens)},
    )
    compare(benchmark, case)


@pytest.mark.parametrize("batch", [64, pytest.param(1024, marks=pytest.mark.skipif(**GPU_SIZE))])
def test_clip_text_tower(benchmark, batch):
    text, tokens = clip.build(clip.Config("vit_base")).text.to(DEVICE), token_batch(batch)
    inputs = (text.projection.weight, text.blocks[0].attn.qkv.weight)
    upstream = torch.randn(batch, 512, device=DEVICE)

    def run(ids: Tensor):
        return forward_backward(lambda: text(ids), *inputs, upstream=upstream)

    def official():
        with dispatch.reference():
            return run(tokens)()

    case = Case(
        op="CLIP's text tower",
        size=f"width 512, B={batch:,}, captions of at most {LONGEST} of 77 tokens, fp32, forward + backward",
        kernel="residual_norm_fwd",
        contestants={"ours": run(tokens[:, :LONGEST]), "official": official, "ours, 77 tokens": run(tokens)},
    )
    compare(benchmark, case)
