"""Activation checkpointing: memory for time."""

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(method: nn.Module) -> None:
    """Lets each block of a transformer keep its input alone, and run again in the backward pass.

    A block is an element of a ModuleList; those of a momentum twin are never run backward and stay as they are. There
    is no dropout in ours, so the second run needs no random state.

    Raises:
        ValueError: the method has no such blocks. A ResNet's would count a batch twice in their running statistics.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """
    lists = [module for module in method.modules() if isinstance(module, nn.ModuleList)]
    blocks = [block for blocks in lists for block in blocks if any(p.requires_grad for p in block.parameters())]
    if not blocks:
        raise ValueError("train: --recompute is for transformers: this method has no blocks that could be run again")
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
