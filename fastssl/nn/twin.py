"""The momentum copy of a module: key encoder, teacher, target network."""

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn

from fastssl.ops import ema_update_


class MomentumTwin(nn.Module):
    """A copy of `module` whose parameters follow it as an exponential moving average.

    State-dict names are those of the module, without a prefix. Replaces MoCo's key encoder, lightly's
    `update_momentum` and, with buffers="average", timm's `ModelEmaV3`.

    Args:
        module: copied; not kept, so that it is neither trained nor saved twice.
        momentum: m of t ← m·t + (1 − m)·s.
        buffers: what becomes of batch norms' running statistics and the like. "own": the twin keeps those of what it
            sees itself, as in the reference code of MoCo; "average": floating ones follow like parameters and others
            are copied, as in timm; "copy": all are copied.

    Raises:
        ValueError: momentum is outside [0, 1], or buffers is another word.
        TypeError: by `update`, parameters are of 16 bits.

    Source: He et al., 2020 (MoCo), equation 2.
    """

    def __init__(self, module: nn.Module, momentum: float = 0.999, buffers: Literal["own", "average", "copy"] = "own"):
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"MomentumTwin: momentum must be between 0 and 1, got {momentum}")
        if buffers not in ("own", "average", "copy"):
            raise ValueError(f"MomentumTwin: buffers must be 'own', 'average' or 'copy', got {buffers!r}")
        self.momentum, self.buffers_follow = momentum, buffers
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.register_state_dict_post_hook(_drop_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)

    @torch.no_grad()
    def forward(self, *args, **kwargs) -> Tensor:
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, module: nn.Module, momentum: float | None = None) -> None:
        """Moves every parameter towards that of `module`, after the optimizer's step."""
        pairs = list(zip(self.module.parameters(), module.parameters(), strict=True))
        if self.buffers_follow != "own":
            for own, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
                if self.buffers_follow == "average" and own.is_floating_point():
                    pairs.append((own, theirs))
                else:
                    own.copy_(theirs)
        targets, sources = zip(*(map(_here, pair) for pair in pairs)) if pairs else ((), ())
        ema_update_(targets, sources, self.momentum if momentum is None else momentum)


def cosine_momentum(start: float, progress: float) -> float:
    """Momentum that rises from `start` to 1 over the run; progress in [0, 1].

    Source: Grill et al., 2020 (BYOL), section 3.2; Chen et al., 2021 (MoCo v3), section 4.1.
    """
    return 1 - 0.5 * (1 + math.cos(math.pi * progress)) * (1 - start)


def _here(x: Tensor) -> Tensor:
    """This rank's shard of a tensor that FSDP shards: the average is one of each element by itself."""
    return x.to_local() if hasattr(x, "to_local") else x


def _drop_prefix(twin: MomentumTwin, state: dict, prefix: str, metadata: dict) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}module.")]:
        state[prefix + name.removeprefix(f"{prefix}module.")] = state.pop(name)


def _add_prefix(twin: MomentumTwin, state: dict, prefix: str, *_) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}module.{name.removeprefix(prefix)}"] = state.pop(name)
