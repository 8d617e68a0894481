"""Activation checkpointing: less memory for more time."""

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(method: nn.Module) -> None:
    """Make each transformer block keep only its input, and run again in the backward pass.

    A block is an element of a ModuleList. Blocks without trained parameters, those of a momentum encoder, have no
    backward pass and stay as they are. Random numbers of drop path are among a block's arguments; a block with dropout
    runs again with the random state of its first run.

    Raises:
        ValueError: the method has no such blocks. Those of a ResNet would update their running statistics twice.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """
    lists = [module for module in method.modules() if isinstance(module, nn.ModuleList)]
    blocks = [block for blocks in lists for block in blocks if any(p.requires_grad for p in block.parameters())]
    if not blocks:
        raise ValueError("train: --recompute is for transformers: this method has no blocks to recompute")
    for block in blocks:
        drops = any(isinstance(part, nn.Dropout) and part.p for part in block.modules())
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=drops)
