"""The momentum copy of a module: key encoder, teacher, target network."""

import copy

import torch
from torch import Tensor, nn

from fastssl.ops import ema_update_


class MomentumTwin(nn.Module):
    """A copy of `module` whose parameters follow it as an exponential moving average.

    Parameters alone are averaged. Buffers are the twin's own: its batch norms keep running statistics of what the
    twin itself sees, as in the reference code. State-dict names are those of the module, without a prefix.

    Args:
        module: copied; not kept, so that it is neither trained nor saved twice.
        momentum: m of t ← m·t + (1 − m)·s.

    Source: He et al., 2020 (MoCo), equation 2.
    """

    def __init__(self, module: nn.Module, momentum: float = 0.999):
        super().__init__()
        self.momentum = momentum
        self.module = copy.deepcopy(module).requires_grad_(False)
        self._register_state_dict_hook(_drop_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)

    @torch.no_grad()
    def forward(self, *args, **kwargs) -> Tensor:
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, module: nn.Module, momentum: float | None = None) -> None:
        """Moves every parameter towards that of `module`, after the optimizer's step."""
        momentum = self.momentum if momentum is None else momentum
        ema_update_(list(self.module.parameters()), list(module.parameters()), momentum)


def _drop_prefix(twin: MomentumTwin, state: dict, prefix: str, metadata: dict) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}module.")]:
        state[prefix + name.removeprefix(f"{prefix}module.")] = state.pop(name)


def _add_prefix(twin: MomentumTwin, state: dict, prefix: str, *_) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}module.{name.removeprefix(prefix)}"] = state.pop(name)
