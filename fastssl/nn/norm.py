"""Layer norm with residual addition, and batch norms with statistics of a part of the batch (MoCo v1, v2) or of all
ranks' batches (MoCo v3)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.distributed import all_sum, world_size
from fastssl.ops import Running, batch_norm, residual_norm
from fastssl.ops.dispatch import acc_dtype


class ResidualNorm(nn.LayerNorm):
    """Layer norm of the residual stream: adds the preceding sublayer's output `delta`, then normalises.

    ``x, y = norm(x, delta)`` is ``x = x + delta; y = layer_norm(x)``. y has dtype `dtype`; by default that of autocast
    where it is on, else that of x. See `ops.residual_norm`.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__(dim, eps=eps)

    def forward(  # type: ignore[override]
        self, x: Tensor, delta: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        return residual_norm(x, delta, self.weight, self.bias, self.eps, dtype)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that normalises each of `splits` parts of the batch by its own statistics in training.

    In one process this replaces MoCo's shuffled batch norm over `splits` GPUs: with statistics of the whole batch the
    model could recognise the key of a query by them. The running statistics are the mean over the parts. With one part
    it equals torch's batch norm, in training computed by `ops.batch_norm`.

    Args:
        num_features: C.
        splits: number of parts; sample i belongs to part i mod splits.

    Raises:
        ValueError: by a call in training, the batch is not divisible by splits.

    Source: He et al., 2020 (MoCo), section 3.3, "Shuffling BN".
    """

    def __init__(self, num_features: int, splits: int = 1):
        super().__init__(num_features)
        self.splits = splits

    def forward(self, x: Tensor, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        """norm(x), plus `residual` if given, then ReLU if `relu`: [B, C, H, W] → [B, C, H, W]."""
        if not self.training:
            return _add_and_relu(super().forward(x), relu, residual)
        self._check_input_dim(x)
        if x.shape[0] % self.splits:
            raise ValueError(f"SplitBatchNorm2d: the batch must be divisible by splits={self.splits}, got {len(x)}")
        mean, var, batches, momentum = _running(self)
        batches.add_(1)
        running = Running(mean, var, momentum)
        return batch_norm(x, self.weight, self.bias, running, self.eps, self.splits, relu, residual)


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(x) + residual): in one pass over the values for a `SplitBatchNorm2d`, else step by step."""
    if isinstance(norm, SplitBatchNorm2d):
        return norm(x, True, residual)
    return _add_and_relu(norm(x), True, residual)


def _running(norm: _BatchNorm) -> tuple[Tensor, Tensor, Tensor, float]:
    """Running mean and variance, number of batches, and momentum of a batch norm that has them."""
    mean, var, batches, momentum = norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum
    if mean is None or var is None or batches is None or momentum is None:
        raise ValueError(f"{type(norm).__name__}: batch norms must have a momentum and running statistics")
    return mean, var, batches, momentum


def _add_and_relu(out: Tensor, relu: bool, residual: Tensor | None) -> Tensor:
    out = out if residual is None else out.add_(residual)
    return F.relu_(out) if relu else out


class SyncBatchNorm(_BatchNorm):
    """Batch norm with training statistics over the batches of all ranks, for any shape [B, C, …] and on any device.

    torch's own works on GPUs only, and DistributedDataParallel refuses it on a CPU. Ranks are weighted by their number
    of values, so batches may differ in size.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        """Accepts any number of dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        dims = [d for d in range(x.ndim) if d != 1]
        column = (1, -1, *[1] * (x.ndim - 2))
        values = x.to(acc_dtype(x))
        local_count = values.new_tensor([x.numel() / x.shape[1]])
        total, count = all_sum(torch.cat([values.sum(dims), local_count])).split([x.shape[1], 1])
        mean = total / count
        centred = values - mean.view(column)  # two passes: E[x²] − mean² would cancel
        var = all_sum(centred.square().sum(dims)) / count
        running_mean, running_var, batches, momentum = _running(self)
        with torch.no_grad():
            batches += 1
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * count / (count - 1)).to(running_var.dtype), momentum)
        out = centred * (var + self.eps).rsqrt().view(column)
        if self.affine:
            out = out * self.weight.view(column) + self.bias.view(column)
        return out.to(x.dtype)


class SyncBatchNormAct(SyncBatchNorm):
    """Batch norm over all ranks, then what timm's `BatchNormAct2d` has behind it: dropout and an activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def sync_batch_norms(module: nn.Module) -> nn.Module:
    """Replaces every batch norm of `module` by one over all ranks and returns the module; if `module` itself is a batch
    norm, returns its replacement. Parameters and buffers stay the same objects with the same names.

    In one process nothing is replaced; with NCCL the new ones are torch's own, else `SyncBatchNorm`. timm's
    `BatchNormAct2d` keep their activation.

    Raises:
        ValueError: a batch norm has no momentum or no running statistics.
    """
    if world_size() == 1:
        return module
    if isinstance(module, _BatchNorm):
        has_act = hasattr(module, "act") and hasattr(module, "drop")
        if "nccl" in str(dist.get_backend()) and not has_act:
            return nn.SyncBatchNorm.convert_sync_batchnorm(module)
        if module.momentum is None or not module.track_running_stats:
            raise ValueError("sync_batch_norms: batch norms must have a momentum and running statistics")
        cls = SyncBatchNormAct if has_act else SyncBatchNorm
        synced = cls(module.num_features, module.eps, module.momentum, module.affine)
        synced._parameters, synced._buffers = module._parameters, module._buffers
        synced._modules = module._modules
        return synced.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, sync_batch_norms(child))
    return module
