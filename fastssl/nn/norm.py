"""A transformer's layer norm, and batch norms whose statistics are of less than the batch (MoCo v1, v2) or of more than
it (MoCo v3)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.distributed import all_sum, world_size
from fastssl.ops import Running, batch_norm, residual_norm
from fastssl.ops.dispatch import acc_dtype


class Norm(nn.LayerNorm):
    """Layer norm of the residual stream, eps 1e-6: adds what the sublayer before it returned, then normalises.

    ``x, y = norm(x, delta)`` is ``x = x + delta; y = layer_norm(x)``, y in `dtype`, by default that in which a matrix
    product would come next.
    """

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)

    def forward(
        self, x: Tensor, delta: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        return residual_norm(x, delta, self.weight, self.bias, self.eps, dtype)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose training statistics are those of each of `splits` parts of the batch.

    On one process this stands for MoCo's shuffled batch norm over as many GPUs: with common statistics a query could
    recognise its key by the company it keeps. The running statistics are the mean over the parts. With one part it is
    torch's batch norm, in training by our kernel where there is one.

    Source: He et al., 2020 (MoCo), section 3.3, "Shuffling BN".
    """

    def __init__(self, num_features: int, splits: int = 1):
        super().__init__(num_features)
        self.splits = splits

    def forward(self, x: Tensor, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        """relu(norm(x) + residual)"""
        if not self.training:
            return _then(super().forward(x), relu, residual)
        self._check_input_dim(x)
        if x.shape[0] % self.splits:
            raise ValueError(f"SplitBatchNorm2d: the batch must be divisible by splits={self.splits}, got {len(x)}")
        self.num_batches_tracked.add_(1)
        running = Running(self.running_mean, self.running_var, self.momentum)
        return batch_norm(x, self.weight, self.bias, running, self.eps, self.splits, relu, residual)


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(x) + residual): in one pass over the values where `norm` is one of ours, else step by step."""
    if isinstance(norm, SplitBatchNorm2d):
        return norm(x, True, residual)
    return _then(norm(x), True, residual)


def _then(out: Tensor, relu: bool, residual: Tensor | None) -> Tensor:
    out = out if residual is None else out.add_(residual)
    return F.relu_(out) if relu else out


class SyncBatchNorm(_BatchNorm):
    """Batch norm whose training statistics are those of all ranks' batches, of any shape [B, C, …] and on any device.

    torch's own is for GPUs alone, and DistributedDataParallel refuses it on a CPU.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dims will do."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        others = [d for d in range(x.ndim) if d != 1]
        column = (1, -1, *[1] * (x.ndim - 2))
        values = x.to(acc_dtype(x))
        here = values.new_tensor([x.numel() / x.shape[1]])
        total, count = all_sum(torch.cat([values.sum(others), here])).split([x.shape[1], 1])
        mean = total / count
        centred = values - mean.view(column)  # two passes: E[x²] − mean² would cancel
        var = all_sum(centred.square().sum(others)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            for running, now in ((self.running_mean, mean), (self.running_var, var * count / (count - 1))):
                running.lerp_(now.to(running.dtype), self.momentum)
        out = centred * (var + self.eps).rsqrt().view(column)
        if self.affine:
            out = out * self.weight.view(column) + self.bias.view(column)
        return out.to(x.dtype)


def sync_batch_norms(module: nn.Module) -> nn.Module:
    """Replaces every batch norm of `module` by one over all ranks, and returns it; parameters and buffers are the same
    objects with the same names. In one process there is nothing to do, and with NCCL torch's own does it."""
    if world_size() == 1:
        return module
    if "nccl" in str(dist.get_backend()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    if isinstance(module, _BatchNorm):
        if module.momentum is None or not module.track_running_stats:
            raise ValueError("sync_batch_norms: batch norms must have a momentum and running statistics")
        synced = SyncBatchNorm(module.num_features, module.eps, module.momentum, module.affine)
        synced._parameters, synced._buffers = module._parameters, module._buffers
        return synced.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, sync_batch_norms(child))
    return module
