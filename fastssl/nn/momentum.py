"""The momentum copy of a module: key encoder, teacher, target network."""

import copy
import itertools
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fastssl.ops import ema_update_
from fastssl.ops.dispatch import autocast_dtype


class MomentumEncoder(nn.Module):
    """A copy of `module` whose parameters follow it as an exponential moving average.

    State-dict names are those of the module, without a prefix. Replaces MoCo's key encoder, lightly's
    `update_momentum` and, with buffers="average", timm's `ModelEmaV3`.

    Under autocast the twin computes with copies of its matrices in autocast's dtype, which `update` writes in its one
    pass: nothing is cast at a call, and what is averaged and saved stays float32. They take 2 bytes a weight.

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
            raise ValueError(f"MomentumEncoder: momentum must be between 0 and 1, got {momentum}")
        if buffers not in ("own", "average", "copy"):
            raise ValueError(f"MomentumEncoder: buffers must be 'own', 'average' or 'copy', got {buffers!r}")
        self.momentum, self.buffers_follow = momentum, buffers
        self.module = copy.deepcopy(module).requires_grad_(False)
        self._shadow: _Shadow | None = None
        self.register_state_dict_post_hook(_drop_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)

    @torch.no_grad()
    def forward(self, *args, **kwargs) -> Tensor:
        return self._computing()(*args, **kwargs)

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
        momentum = self.momentum if momentum is None else momentum
        shadow = self._shadow.copies if self._shadow and self._shadow.fits(self.module) else {}
        for shadowed in (True, False):
            some = [(t, s) for t, s in pairs if (id(t) in shadow) is shadowed]
            targets, sources = zip(*(map(_here, pair) for pair in some)) if some else ((), ())
            ema_update_(targets, sources, momentum, [shadow[id(t)] for t, _ in some] if shadowed else ())
        if shadow:
            self._shadow.is_written()

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        self._shadow = None  # `to` puts other data into the same parameters
        return super()._apply(fn, recurse)

    def _computing(self) -> nn.Module:
        """The module, or its shadow under autocast, made where there is none that fits."""
        first = next(self.module.parameters(), None)
        dtype = None if first is None or torch.compiler.is_compiling() else autocast_dtype(first)
        if dtype is None:
            return self.module
        if not (self._shadow and self._shadow.dtype == dtype and self._shadow.fits(self.module)):
            self._shadow = _Shadow(self.module, dtype)
        return self._shadow.following(self.module)


class _Shadow:
    """A module that shares everything with another but the weights of linear and convolutional layers, which are copies
    in 16 bits. The copies fit as long as nobody but `MomentumEncoder.update` writes the originals."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        layers = (m for m in module.modules() if isinstance(m, nn.Linear | _ConvNd))
        self.weights = [m.weight for m in layers if m.weight.dtype == torch.float32]
        self.dtype, self.copies = dtype, {id(w): nn.Parameter(w.to(dtype), False) for w in self.weights}
        shared = {id(t): t for t in itertools.chain(module.parameters(), module.buffers())}
        self.module = copy.deepcopy(module, {**shared, **self.copies})
        self.is_written()

    def is_written(self) -> None:
        self.versions = [w._version for w in self.weights]

    def fits(self, module: nn.Module) -> bool:
        """False after `load_state_dict` or FSDP, say, put other values or tensors there."""
        there = {id(p): p._version for p in module.parameters()}
        return self.versions == [there.get(id(w)) for w in self.weights]

    def following(self, module: nn.Module) -> nn.Module:
        for own, theirs in zip(self.module.modules(), module.modules()):
            own.training = theirs.training
        return self.module

    def __reduce__(self):
        return type(None), ()  # a copy of the twin makes its own


def _here(x: Tensor) -> Tensor:
    """This rank's shard of a tensor that FSDP shards: the average is one of each element by itself."""
    return x.to_local() if hasattr(x, "to_local") else x


def _drop_prefix(twin: MomentumEncoder, state: dict, prefix: str, metadata: dict) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}module.")]:
        state[prefix + name.removeprefix(f"{prefix}module.")] = state.pop(name)


def _add_prefix(twin: MomentumEncoder, state: dict, prefix: str, *_) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}module.{name.removeprefix(prefix)}"] = state.pop(name)
