"""Momentum encoder: a copy of a module that follows it, such as MoCo's key encoder or DINO's teacher."""

import copy
import itertools
from collections.abc import Iterable
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

    Under autocast a call computes with copies of the weight matrices in autocast's dtype, which `update` writes in the
    same pass as the average: no weight is cast during a call, and the averaged and saved weights stay float32. The
    copies take 2 bytes per weight.

    Args:
        module: the module to copy; it is not kept as a child, so that it is neither trained nor saved twice.
        momentum: m of t ← m·t + (1 − m)·s.
        buffers: how buffers, such as the running statistics of batch norms, change. "keep": by the copy's own forward
            passes alone, as in the reference code of MoCo; "average": floating-point ones follow like parameters and
            others are copied, as in timm; "copy": all are copied.
        drop_path: False for a copy without stochastic depth (of our `ViT`, timm and torchvision), as DINO's teacher.

    Raises:
        ValueError: momentum is outside [0, 1], buffers is none of these, or the module can't be copied; by `update`,
            the module has other parameters or buffers than the copied one.
        TypeError: by `update`, parameters are of 16 bits.

    Source: He et al., 2020 (MoCo), equation 2.
    """

    def __init__(
        self,
        module: nn.Module,
        momentum: float = 0.999,
        buffers: Literal["keep", "average", "copy"] = "keep",
        drop_path: bool = True,
    ):
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"MomentumEncoder: momentum must be between 0 and 1, got {momentum}")
        if buffers not in ("keep", "average", "copy"):
            raise ValueError(f"MomentumEncoder: buffers must be 'keep', 'average' or 'copy', got {buffers!r}")
        self.momentum, self.buffer_update = momentum, buffers
        self.module = _copy(module).requires_grad_(False)
        if not drop_path:
            _remove_drop_path(self.module)
        self._low_precision: _LowPrecisionCopy | None = None
        self.register_state_dict_post_hook(_drop_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)

    @torch.no_grad()
    def forward(self, *args, **kwargs) -> Tensor:
        return self._module_to_run()(*args, **kwargs)

    @torch.no_grad()
    def update(self, module: nn.Module, momentum: float | None = None) -> None:
        """Moves every parameter towards that of `module`, after the optimizer's step.

        Args:
            module: the trained module, with the parameters of the copied one.
            momentum: m of this update; that of the constructor if None.
        """
        pairs = _pairs("parameters", self.module.parameters(), module.parameters())
        if self.buffer_update != "keep":
            for target, source in _pairs("buffers", self.module.buffers(), module.buffers()):
                if self.buffer_update == "average" and target.is_floating_point():
                    pairs.append((target, source))
                else:
                    target.copy_(source)
        momentum = self.momentum if momentum is None else momentum
        low_precision = self._low_precision
        if low_precision is None or not low_precision.is_current(self.module):
            _update(pairs, momentum, {})
            return
        copies = low_precision.copies
        _update([pair for pair in pairs if id(pair[0]) in copies], momentum, copies)
        _update([pair for pair in pairs if id(pair[0]) not in copies], momentum, {})
        low_precision.note_versions()

    def _apply(self, fn, recurse: bool = True) -> "MomentumEncoder":
        self._low_precision = None  # `to` replaces the data of the parameters
        return super()._apply(fn, recurse)

    def _module_to_run(self) -> nn.Module:
        """The module, or under autocast its low-precision copy, which is made if there is no current one."""
        first = next(self.module.parameters(), None)
        dtype = None if first is None or torch.compiler.is_compiling() else autocast_dtype(first)
        if dtype is None:
            return self.module
        low_precision = self._low_precision
        if low_precision is None or low_precision.dtype != dtype or not low_precision.is_current(self.module):
            self._low_precision = low_precision = _LowPrecisionCopy(self.module, dtype)
        return low_precision.in_mode_of(self.module)


class _LowPrecisionCopy:
    """A copy of a module with 16-bit weights in its linear and convolutional layers; everything else is shared. The
    16-bit weights are current as long as only `MomentumEncoder.update` writes the originals."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        layers = (m._parameters.get("weight") for m in module.modules() if isinstance(m, nn.Linear | _ConvNd))
        # without weights that are computed from others at each call, such as those of weight norm
        self.weights = [weight for weight in layers if weight is not None and weight.dtype == torch.float32]
        self.dtype, self.copies = dtype, {id(w): nn.Parameter(w.to(dtype), False) for w in self.weights}
        shared = {id(t): t for t in itertools.chain(module.parameters(), module.buffers())}
        self.module = copy.deepcopy(module, {**shared, **self.copies})
        self.note_versions()

    def note_versions(self) -> None:
        """Stores the versions of the original weights, which the copies equal now."""
        self.versions = [w._version for w in self.weights]

    def is_current(self, module: nn.Module) -> bool:
        """False after anything else, such as `load_state_dict` or FSDP, wrote or replaced a weight of `module`."""
        versions = {id(p): p._version for p in module.parameters()}
        return self.versions == [versions.get(id(w)) for w in self.weights]

    def in_mode_of(self, module: nn.Module) -> nn.Module:
        """The copy, with each part in training or evaluation mode as that of `module`."""
        for part, original in zip(self.module.modules(), module.modules()):
            part.training = original.training
        return self.module

    def __reduce__(self):
        return type(None), ()  # copies and pickles of a `MomentumEncoder` make a new one


def _copy(module: nn.Module) -> nn.Module:
    """A copy of a module. Tensors with a gradient history, such as the weight that `torch.nn.utils.weight_norm`
    computes before each call, are copied without it, which `copy.deepcopy` refuses."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(f"MomentumEncoder: module must be the one inside {type(module).__name__}, module.module")
    computed = (x for part in module.modules() for x in vars(part).values() if isinstance(x, Tensor) and not x.is_leaf)
    try:
        return copy.deepcopy(module, {id(x): x.detach().clone() for x in computed})
    except Exception as error:  # whatever a part raises that has no copy, such as a lock
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ValueError(f"MomentumEncoder: {type(module).__name__} can't be copied ({reason})") from error


def _remove_drop_path(module: nn.Module) -> None:
    """Switches stochastic depth off, in place."""
    rates = {"DropPath": "drop_prob", "StochasticDepth": "p"}  # classes of timm and torchvision
    for part in module.modules():
        rate = rates.get(type(part).__name__, "drop_path_rate")
        if isinstance(getattr(part, rate, None), float):
            setattr(part, rate, 0.0)


def _pairs(kind: str, targets: Iterable[Tensor], sources: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(target, source) of an update."""
    both = list(targets), list(sources)
    if [x.shape for x in both[0]] != [x.shape for x in both[1]]:
        raise ValueError(
            f"MomentumEncoder: update must get the module that was copied, with its {len(both[0])} {kind} and their "
            f"shapes, got one with {len(both[1])}"
        )
    return list(zip(*both))


def _update(pairs: list[tuple[Tensor, Tensor]], momentum: float, copies: dict[int, nn.Parameter]) -> None:
    """Averages (target, source) pairs; writes the targets' low-precision copies, by id, where there are any."""
    targets, sources = [_local(target) for target, _ in pairs], [_local(source) for _, source in pairs]
    ema_update_(targets, sources, momentum, [copies[id(target)] for target, _ in pairs] if copies else ())


def _local(x: Tensor) -> Tensor:
    """This rank's shard of a tensor that FSDP shards; an average of elements needs no others."""
    return x.to_local() if hasattr(x, "to_local") else x


def _drop_prefix(module: MomentumEncoder, state: dict, prefix: str, metadata: dict) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}module.")]:
        state[prefix + name.removeprefix(f"{prefix}module.")] = state.pop(name)


def _add_prefix(module: MomentumEncoder, state: dict, prefix: str, *_) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}module.{name.removeprefix(prefix)}"] = state.pop(name)
