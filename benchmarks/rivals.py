"""Losses and attention of other packages, as contestants; those that are not installed are left out.

pip install inf-cl memeff xformers
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from .machine import DEVICE

PACKAGES = {"inf-cl": "inf_cl", "memeff": "memeff", "xformers": "xformers"}  # name on PyPI: module


def installed(package: str) -> bool:
    """Whether a package of `PACKAGES` can be used here: all of them need a GPU."""
    return DEVICE.type == "cuda" and find_spec(PACKAGES[package]) is not None


def in_batch_losses(tau: float, symmetric: bool) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Mean InfoNCE of unit rows q and keys [B, D], the keys' rows being the positives.

    Args:
        tau: temperature.
        symmetric: the mean of both directions, as in CLIP; else of the queries among the keys.
    """
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    if installed("inf-cl"):
        from inf_cl import cal_flash_loss

        def inf_cl(q: Tensor, keys: Tensor) -> Tensor:
            width = min(256, q.shape[1])
            loss = cal_flash_loss(q, keys, scale=1 / tau, head_dim=width).mean()
            return (loss + cal_flash_loss(keys, q, scale=1 / tau, head_dim=width).mean()) / 2 if symmetric else loss

        losses["inf-cl"] = inf_cl
    if installed("memeff") and symmetric:
        from memeff import MemoryEfficientCLIPLoss

        losses["memeff"] = MemoryEfficientCLIPLoss(tau, normalized_inputs=True, stable=False)
    return losses


def nt_xent_losses(tau: float) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Mean NT-Xent of unit rows z1 and z2 [B, D].

    inf-cl's softmax is over all keys, so the row's product with itself is taken away from its sum; memeff has only the
    losses of two different sets of rows.
    """
    if not installed("inf-cl"):
        return {}
    from inf_cl import cal_flash_loss

    def inf_cl(z1: Tensor, z2: Tensor) -> Tensor:
        z, half = torch.cat([z1, z2]), len(z1)
        partner = (torch.arange(2 * half, device=z.device) + half) % (2 * half)
        with_itself = cal_flash_loss(z, z, partner, scale=1 / tau, head_dim=min(256, z.shape[1]))
        wide = z.float()
        itself = ((wide * wide).sum(1) - (wide * wide[partner]).sum(1)) / tau
        return (with_itself + torch.log1p(-(itself - with_itself).exp())).mean()

    return {"inf-cl": inf_cl}


def attentions() -> dict[str, Callable[[Tensor], Tensor]]:
    """Attention of a packed qkv [B, L, 3, H, E] → [B, L, H, E] by each backend of torch, and by xformers."""
    if DEVICE.type == "cpu":
        return {}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def by_backend(backend: SDPBackend) -> Callable[[Tensor], Tensor]:
        def attend(qkv: Tensor) -> Tensor:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

        return attend

    backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    backends["memory-efficient"] = SDPBackend.EFFICIENT_ATTENTION
    ways = {f"SDPA, {name}": by_backend(backend) for name, backend in backends.items()}
    if installed("xformers"):
        from xformers.ops import memory_efficient_attention

        ways["xformers"] = lambda qkv: memory_efficient_attention(*qkv.unbind(2))
    return ways
