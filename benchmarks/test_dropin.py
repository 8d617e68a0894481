"""Drop-in modules beside what they replace: timm's attention, and losses and updates of lightly, timm, MoCo, MAE."""

import copy
import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss as LightlyNTXentLoss
from lightly.models.utils import update_momentum
from timm.utils import ModelEmaV3

from fastssl.nn import InfoNCELoss, MaskedPatchLoss, MomentumEncoder, NTXentLoss, accelerate, random_masking

from .harness import DTYPES, Case, compare, forward_backward
from .machine import DEVICE

TAU = 0.2


@pytest.mark.parametrize(
    "name, batch, dtype",
    [("vit_base_patch16_224", 4, "fp32"), ("vit_small_patch16_224", 4, "fp32"), ("vit_tiny_patch16_224", 2, "bf16")],
)
def test_accelerate(benchmark, name, batch, dtype):
    """A step of a supervised ViT without the optimizer. "official" is timm's formula, "SDPA" its default. The
    gradients of the first and the last layer are compared."""
    timm_model = timm.create_model(name, pretrained=False, num_classes=10).to(DEVICE)
    models = {
        "ours": copy.deepcopy(timm_model),
        "official": copy.deepcopy(timm_model),
        "SDPA (timm as it is)": timm_model,
    }
    accelerate(models["ours"])
    for block in models["official"].blocks:
        block.attn.fused_attn = False
    images, labels = torch.randn(batch, 3, 224, 224, device=DEVICE), torch.arange(batch, device=DEVICE) % 10

    def step(model, dtype=DTYPES[dtype]):
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        end_weights = [model.patch_embed.proj.weight, model.head.weight]
        gradients = [p.grad.to(dtype) for p in end_weights]  # the tolerance is that of the dtype computed in
        model.zero_grad()
        return loss.detach().to(dtype), *gradients

    compare(
        benchmark,
        Case(
            op="accelerate",
            size=f"timm `{name}`, B={batch}, 224², {dtype}{' autocast' if dtype == 'bf16' else ''}, forward + backward",
            kernel="attention_fwd",
            contestants={who: lambda model=model: step(model) for who, model in models.items()},
            expected=lambda: step(models["official"], torch.float32),
            dtype=DTYPES[dtype],
        ),
    )


@pytest.mark.parametrize("batch", [256, 2048])
def test_nt_xent_loss(benchmark, batch, width=128):
    z1 = torch.randn(batch, width, device=DEVICE, requires_grad=True)
    z2 = (z1.detach() + torch.randn(batch, width, device=DEVICE)).requires_grad_()
    labels = (torch.arange(2 * batch, device=DEVICE) + batch) % (2 * batch)
    diagonal = torch.eye(2 * batch, dtype=torch.bool, device=DEVICE)
    criterion, lightly = NTXentLoss(TAU), LightlyNTXentLoss(TAU)

    def official():
        z = F.normalize(torch.cat([z1, z2]), dim=1)
        return F.cross_entropy((z @ z.T / TAU).masked_fill(diagonal, float("-inf")), labels)

    calls = {"ours": lambda: criterion(z1, z2), "official": official, "lightly": lambda: lightly(z1, z2)}
    compare(
        benchmark,
        Case(
            op="NTXentLoss",
            size=f"2 × {batch:,}, D={width}, fp32, forward + backward",
            kernel="nt_xent_fwd",
            contestants={name: forward_backward(call, z1, z2) for name, call in calls.items()},
            operations=3 * (2 * batch) ** 2 * width,
        ),
    )


@pytest.mark.parametrize("batch, length", [(256, 65536), (256, 4096), (32, 65536)])
def test_info_nce_loss(benchmark, batch, length, width=128):
    """A step of the loss with its queue: normalise, contrast, gradient, enqueue."""
    q = torch.randn(batch, width, device=DEVICE, requires_grad=True)
    k = q.detach() + torch.randn(batch, width, device=DEVICE)
    criterion = InfoNCELoss(width, length, TAU).to(DEVICE)
    lightly = LightlyNTXentLoss(TAU, memory_bank_size=(length, width)).to(DEVICE)
    lightly.memory_bank.bank = criterion.queue.clone()
    queue_DK, ptr = criterion.queue.T.contiguous(), torch.zeros(1, dtype=torch.int64)
    labels = torch.zeros(batch, dtype=torch.int64, device=DEVICE)

    def official():
        """As MoCo's code: the queue is cloned, since it is written before the backward pass reads it."""
        query, key = F.normalize(q, dim=1), F.normalize(k, dim=1)
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue_DK.clone().detach()], 1) / TAU
        start = int(ptr)
        queue_DK[:, start : start + batch] = key.T
        ptr[0] = (start + batch) % length
        return F.cross_entropy(logits, labels)

    calls = {"ours": lambda: criterion(q, k), "official": official, "lightly": lambda: lightly(q, k)}
    compare(
        benchmark,
        Case(
            op="InfoNCELoss",
            size=f"B={batch}, D={width}, K={length:,}, fp32, forward + backward, enqueue",
            kernel="info_nce_fwd",
            contestants={name: forward_backward(call, q) for name, call in calls.items()},
            operations=4 * batch * length * width,
        ),
    )


def test_momentum_encoder(benchmark, momentum=0.999):
    """A ResNet-50 with the running statistics of its batch norms, which timm averages too."""
    model = timm.create_model("resnet50", pretrained=False).to(DEVICE)
    averages = {
        "ours": MomentumEncoder(model, momentum, buffers="average"),
        "official": copy.deepcopy(model),
        "lightly": copy.deepcopy(model),
        "timm": ModelEmaV3(model, momentum),
    }
    with torch.no_grad():
        for x in itertools.chain(model.parameters(), model.buffers()):
            if x.is_floating_point():
                x.add_(torch.rand_like(x))

    @torch.no_grad()
    def official(copy_of_model):
        """MoCo's loop over parameters."""
        for target, source in zip(copy_of_model.parameters(), model.parameters()):
            target.data = target.data * momentum + source.data * (1 - momentum)

    updates = {
        "ours": lambda ema: ema.update(model),
        "official": official,
        "lightly": lambda ema: update_momentum(model, ema, momentum),
        "timm": lambda ema: ema.update(model),
    }

    def run(name):
        updates[name](averages[name])
        return list(averages[name].parameters())

    compare(
        benchmark,
        Case(
            op="MomentumEncoder",
            size="ResNet-50, fp32; ours and timm with the buffers",
            kernel="ema_update_",
            contestants={name: lambda name=name: run(name) for name in averages},
        ),
    )


@pytest.mark.parametrize("batch", [64])
def test_random_masking(benchmark, batch, length=196, width=768, ratio=0.75):
    """Including the random numbers, which all contestants draw with the same seed."""
    x = torch.randn(batch, length, width, device=DEVICE, requires_grad=True)
    keep = int(length * (1 - ratio))

    def official(expand):
        ids_shuffle = torch.rand(batch, length, device=DEVICE).argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        ids = ids_shuffle[:, :keep, None]
        ids = ids.expand(-1, -1, width) if expand else ids.repeat(1, 1, width)
        mask = torch.ones(batch, length, device=DEVICE)
        mask[:, :keep] = 0
        return x.gather(1, ids), mask.gather(1, ids_restore), ids_restore

    def contestant(masking):
        def run():
            torch.manual_seed(0)
            kept, mask, ids_restore = masking()
            (dx,) = torch.autograd.grad(kept.sum(), x)
            return kept.detach(), mask, ids_restore, dx

        return run

    compare(
        benchmark,
        Case(
            op="random_masking (nn)",
            size=f"B={batch}, {length} → {keep} tokens, D={width}, fp32, forward + backward",
            kernel="random_masking",
            contestants={
                "ours": contestant(lambda: random_masking(x, ratio)),
                "official": contestant(lambda: official(expand=False)),
                "gather, expand": contestant(lambda: official(expand=True)),
            },
            bytes_moved=4 * batch * width * (2 * keep + keep + length),
        ),
    )


@pytest.mark.parametrize("batch", [64])
def test_masked_patch_loss(benchmark, batch, size=224, patch=16, masked=147):
    """From predictions of all patches and a mask, as in the official `forward_loss`."""
    side = size // patch
    images = torch.randn(batch, 3, size, size, device=DEVICE)
    pred = torch.randn(batch, side**2, patch**2 * 3, device=DEVICE, requires_grad=True)
    mask = (torch.rand(batch, side**2, device=DEVICE).argsort(1).argsort(1) < masked).float()

    def official():
        target = images.reshape(batch, 3, side, patch, side, patch).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        var, mean = torch.var_mean(target, dim=-1, keepdim=True)
        loss = (pred - (target - mean) / (var + 1e-6).sqrt()).square().mean(-1)
        return (loss * mask).sum() / mask.sum()

    criterion = MaskedPatchLoss(patch, norm_pix_loss=True)
    compare(
        benchmark,
        Case(
            op="MaskedPatchLoss",
            size=f"B={batch}, {size}², patch {patch}, norm_pix, {masked} of {side**2}, fp32, forward + backward",
            kernel="masked_patch_mse_fwd",
            contestants={
                "ours": forward_backward(lambda: criterion(images, pred, mask), pred),
                "official": forward_backward(official, pred),
            },
        ),
    )
