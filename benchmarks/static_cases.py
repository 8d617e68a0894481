"""Calls that benchmarks/static.py compiles: the sizes of the papers' recipes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fastssl.kernels import (
    attention,
    attention_bias,
    augment,
    bank,
    batchnorm,
    block_masks,
    contrastive,
    crops,
    gelu,
    masking,
    norm,
    pairwise,
    patches,
    prototypes,
    queue,
    tile,
)
from fastssl.kernels.pixels import normalise
from fastssl.ops.crops import MODES
from tests.support import kernel_model as model

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAMES = {FP32: "fp32", FP64: "fp64", BF16: "bf16", FP16: "fp16"}


@dataclasses.dataclass
class Case:
    """One call of a launcher."""

    op: str
    size: str
    launcher: Callable[..., Any]
    args: tuple
    moved: Callable[[str], model.Moved] | None = None  # by architecture; None where only the code is checked
    factor_bytes: int = 2  # of the operands of matrix products


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def feature_maps(batch: int, channels: int, side: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return meta(batch, channels, side, side, dtype=dtype).to(memory_format=torch.channels_last)


def ids(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int64)


def recipes() -> list[Case]:
    """The sizes of the papers' recipes."""
    return [
        *_moco(),
        *_in_batch(),
        *_pairs(),
        *_prototypes(),
        *_tokens(),
        *_pixels(),
        *_augmentation(),
        *_crops(),
        *_norms(),
        *_gelus(),
        *_batch_norms(),
        *_attention(),
        *_attention_bias(),
        *_banks(),
    ]


def _moco() -> list[Case]:
    cases, tau = [], meta(dtype=FP32)
    for length, dtype in ((65_536, BF16), (1_048_576, BF16), (65_536, FP32)):
        q, negatives, size = meta(256, 128, dtype=dtype), meta(length, 128, dtype=dtype), dtype.itemsize

        def moved(arch, length=length, size=size):
            return model.info_nce_fwd(256, length, 128, size, True, arch)

        size_name = f"B=256, D=128, K={length:,}, {NAMES[dtype]}"
        cases.append(Case("info_nce", size_name, contrastive.info_nce_fwd, (q, q, negatives, tau, True), moved, size))
    moved = lambda arch: model.enqueue_(65_536, 128, 256, 2, 2, arch)  # noqa: E731
    args = (meta(65_536, 128), ids(1), meta(256, 128))
    return [*cases, Case("enqueue_", "256 into K=65,536, D=128, bf16", queue.enqueue_, args, moved)]


def _in_batch() -> list[Case]:
    tau, q, z = meta(dtype=FP32), meta(4096, 256), meta(8192, 128)
    per_q, per_z = meta(4096, dtype=FP32), meta(8192, dtype=FP32)
    moco_v3, simclr = "B=M=4,096, D=256, bf16", "2 × 4,096, D=128, bf16"
    return [
        Case(
            "batch_info_nce",
            moco_v3,
            contrastive.batch_info_nce_fwd,
            (q, q, tau, 0, True),
            lambda arch: model.batch_info_nce_fwd(4096, 4096, 256, 2, True, arch),
        ),
        Case(
            "batch_info_nce, keys",
            moco_v3,
            contrastive.batch_info_nce_dkeys,
            (q, q, tau, 0, per_q, per_q),
            lambda arch: model.batch_info_nce_dkeys(4096, 4096, 256, 2, arch),
        ),
        Case("nt_xent", simclr, contrastive.nt_xent_fwd, (z, tau), lambda arch: model.nt_xent_fwd(8192, 128, 2, arch)),
        Case(
            "nt_xent, backward",
            simclr,
            contrastive.nt_xent_bwd,
            (z, tau, per_z, per_z),
            lambda arch: model.nt_xent_bwd(8192, 128, 2, arch),
        ),
    ]


def _pairs() -> list[Case]:
    """SigLIP's loss, with all gradients."""
    cases, number = [], meta(dtype=FP32)
    for batch, width in ((4096, 512), (32_768, 768)):
        q = meta(batch, width)

        def moved(arch, batch=batch, width=width):
            return model.pairwise_sigmoid_fwd(batch, batch, width, 2, True, arch)

        args = (q, q, number, number, 0, True)
        size_name = f"B=M={batch:,}, D={width}, bf16"
        cases.append(Case("pairwise_sigmoid", size_name, pairwise.pairwise_sigmoid_fwd, args, moved))
    return cases


def _prototypes() -> list[Case]:
    """DINO's crops (2 + 8 of 64 images, two teachers each) and DINOv2's masked patches, D = 256, in bfloat16."""
    cases = []
    for rows, teachers, counts in ((640, 2, (65_536,)), (3771, 1, (4096, 65_536, 131_072))):
        for count in counts:
            cases += prototype_cases(rows, teachers, count, 256, BF16, f"N={rows:,}, P={count:,}, D=256, bf16", True)
    return cases


def prototype_cases(N, G, P, D, dtype, size_name, counted=False) -> list[Case]:
    acc, M, size = tile.acc_dtype(dtype), N if G == 1 else 128, dtype.itemsize
    student, weight, teacher, teacher_weight = (meta(rows, D, dtype=dtype) for rows in (N, P, M, P))
    tau, per_row, per_key, lse = (meta(*shape, dtype=acc) for shape in ((), (M,), (P,), (2, N)))
    dloss, pairs, target = meta(N, dtype=acc), None if G == 1 else ids(N, G), ids(N)
    args = student, weight, tau, teacher, teacher_weight, tau, per_row, per_key, pairs
    hard = student, weight, tau, target

    def backward(launcher, arguments, *numbers):
        return [(launcher, (dloss, *arguments, *numbers, not prototype, prototype)) for prototype in (False, True)]

    soft_backward = backward(prototypes.soft_cross_entropy_bwd, args, lse, dloss)
    hard_backward = backward(prototypes.linear_cross_entropy_bwd, hard, lse)
    soft = (N, P, D, D, size)
    rows = [
        ("prototype_lse", prototypes.prototype_lse, (teacher, weight, tau, per_key, 1),
         lambda arch: model.prototype_lse(M, P, D, size, True, arch)),
        ("prototype_lse, over rows", prototypes.prototype_lse, (teacher, weight, tau, per_row, 0),
         lambda arch: model.prototype_lse(P, M, D, size, True, arch)),
        ("soft_cross_entropy", prototypes.soft_cross_entropy_fwd, args,
         lambda arch: model.soft_cross_entropy_fwd(*soft, G, M, arch)),
        ("soft_cross_entropy, students", *soft_backward[0],
         lambda arch: model.soft_cross_entropy_bwd(*soft, False, G, M, arch)),
        ("soft_cross_entropy, prototypes", *soft_backward[1],
         lambda arch: model.soft_cross_entropy_bwd(*soft, True, G, M, arch)),
        ("linear_cross_entropy", prototypes.linear_cross_entropy_fwd, hard, None),
        ("linear_cross_entropy, rows", *hard_backward[0], None),
        ("linear_cross_entropy, prototypes", *hard_backward[1], None),
    ]  # fmt: skip
    with_hard = not counted and D in (1, 256)  # hard targets need less than soft ones, so a width is enough
    return [
        Case(op, size_name, launcher, given, moved if counted else None, size)
        for op, launcher, given, moved in rows
        if moved or with_hard
    ]


def _tokens() -> list[Case]:
    keep, restore = "B=256, 49 of 196, D=768, bf16", "B=256, 50 to 197, D=512, bf16"
    return [
        Case(
            "block_mask",
            "B=256, 14 × 14",
            block_masks.block_mask,
            (ids(256), ids(256), 14, 14, [4 * 256, 98 * 256], 2**28, 10, 0),
            lambda _: model.block_mask(256, 196),
        ),
        Case(
            "random_masking",
            "B=256, L=196",
            masking.random_masking,
            (meta(256, 196, dtype=FP32), 49),
            lambda _: model.random_masking(256, 196, 4),
        ),
        Case(
            "keep_tokens",
            keep,
            masking.keep_tokens_fwd,
            (meta(256, 196, 768), ids(256, 49), meta(196, 768)),
            lambda _: model.keep_tokens_fwd(256, 196, 49, 768, 2, 2),
        ),
        Case(
            "keep_tokens, backward",
            keep,
            masking.keep_tokens_bwd,
            (meta(256, 49, 768), ids(256, 49), 196),
            lambda arch: model.keep_tokens_bwd(256, 196, 49, 768, 2, arch),
        ),
        Case(
            "restore_tokens",
            restore,
            masking.restore_tokens_fwd,
            (meta(256, 50, 512), meta(512), ids(256, 196), meta(197, 512), 1),
            lambda arch: model.restore_tokens_fwd(256, 196, 49, 512, 1, 2, 2, 2, arch),
        ),
        Case(
            "restore_tokens, backward",
            restore,
            masking.restore_tokens_bwd,
            (meta(256, 197, 512), ids(256, 196), 1, 49),
            lambda arch: model.restore_tokens_bwd(256, 196, 49, 512, 1, 2, arch),
        ),
    ]


def _pixels() -> list[Case]:
    images = meta(256, 3, 224, 224, dtype=FP32)
    return [
        Case(
            "patchify",
            "B=256, 224², p=16, fp32",
            patches.patchify,
            (images, 16),
            lambda _: model.patchify(256, 196, 768, 4),
        ),
        Case(
            "keep_patches",
            "B=256, 49 of 196, p=16, fp32",
            patches.keep_patches_fwd,
            (images, ids(256, 49), 16),
            lambda _: model.keep_patches_fwd(256, 49, 768, 4),
        ),
        Case(
            "masked_patch_mse",
            "B=256, 147 of 196, p=16, bf16 pred",
            patches.masked_patch_mse_fwd,
            (meta(256, 147, 768), images, ids(256, 147), 16, True, True),
            lambda arch: model.masked_patch_mse_fwd(256, 147, 768, 2, 4, 16, True, arch),
        ),
    ]


def _augmentation() -> list[Case]:
    """MoCo v2's colours, half of the images blurred; the parameters are on the CPU."""
    images, half = meta(256, 3, 224, 224, dtype=torch.uint8), torch.arange(256) % 2 == 0
    jitter, order = torch.tensor([1.2, 0.8, 1.1, 0.05]).repeat(256, 1), torch.arange(4).repeat(256, 1)
    moved = model.augment_(images.numel(), images.numel() // 2)
    return [
        Case(
            "augment_",
            f"B=256, 224², {name}",
            augment.augment_,
            (images, jitter, order, half, half * 1.5, half, half, *law),
            lambda _: moved,
        )
        for name, law in (("torchvision", (False, False, False)), ("BYOL", (False, True, True)))
    ]


def _crops() -> list[Case]:
    """Crops of photographs of 400 × 600 pixels, as of MAE, DINO and BEiT's tokenizer; windows are on the CPU."""
    cases, images = [], [meta(400, 600, 3, dtype=torch.uint8)] * 256
    for name, window, side in (
        ("bicubic", (380, 380), 224),
        ("bilinear", (380, 380), 224),
        ("bicubic", (180, 180), 96),
        ("lanczos", (380, 380), 112),
    ):
        kernel = MODES.index(name)
        windows, out = torch.tensor([[10, 15, *window]] * 256), meta(256, 3, side, side, dtype=torch.uint8)
        moved = model.resized_crops_([window] * 256, (side, side), kernel)
        size = f"B=256, {window[0]}² to {side}², {name}"
        cases.append(
            Case("resized_crops_", size, crops.resized_crops_, (out, images, windows, kernel), lambda _, m=moved: m)
        )
    pixels, scales = meta(256, 3, 224, 224, dtype=torch.uint8), [0.5, 0.4, 0.3]
    for dtype in (FP32, BF16):
        moved = model.normalise(pixels.numel(), dtype.itemsize)
        args = (pixels, scales, scales, dtype)
        cases.append(Case("normalise", f"B=256, 224², {NAMES[dtype]}", normalise, args, lambda _, m=moved: m))
    return cases


def _norms() -> list[Case]:
    """As under autocast: residual stream in float32; outputs of sublayers and normalised rows in bfloat16."""
    cases = []
    for name, length, width in (("encoder", 50, 768), ("decoder", 197, 512)):
        x, delta = meta(256, length, width, dtype=FP32), meta(256, length, width)
        weight, moment = meta(width, dtype=FP32), meta(256, length, dtype=FP32)
        size_name, rows = f"{name}: B=256, L={length}, D={width}, bf16 beside fp32", 256 * length
        cases += [
            Case(
                "residual_norm",
                size_name,
                norm.residual_norm_fwd,
                (x, delta, weight, weight, 1e-6, BF16),
                lambda _, rows=rows, width=width: model.residual_norm_fwd(rows, width, 4, 2, 2),
            ),
            Case(
                "residual_norm, backward",
                size_name,
                norm.residual_norm_bwd,
                (delta, x, x, moment, moment, weight, BF16),
                lambda arch, rows=rows, width=width: model.residual_norm_bwd(rows, width, 4, 2, 2, arch=arch),
            ),
        ]
    return cases


def _gelus() -> list[Case]:
    """Between the linear layers of the MLPs, 4·D wide."""
    cases = []
    for name, length, width in (("encoder", 50, 3072), ("decoder", 197, 2048)):
        x, bias, rows = meta(256 * length, width), meta(width, dtype=FP32), 256 * length
        size_name = f"{name}: B=256, L={length}, K={width:,}, bf16"
        cases += [
            Case(
                "bias_gelu",
                size_name,
                gelu.bias_gelu_fwd,
                (x, bias),
                lambda arch, rows=rows, width=width: model.bias_gelu_fwd(rows, width, 2, arch=arch),
            ),
            Case(
                "bias_gelu, backward",
                size_name,
                gelu.bias_gelu_bwd,
                (x, x, bias),
                lambda arch, rows=rows, width=width: model.bias_gelu_bwd(rows, width, 2, arch=arch),
            ),
        ]
    return cases


def _batch_norms() -> list[Case]:
    """The stem of a ResNet-50 and the end of a block of its last stage, with MoCo's split statistics and without."""
    cases = []
    for channels, side, splits, residual in ((64, 112, 8, False), (256, 56, 1, True), (2048, 7, 1, True)):
        x = feature_maps(64, channels, side)
        weight, moments, rows = meta(channels, dtype=FP32), meta(splits, channels, dtype=FP32), 64 * side**2
        size_name = f"B=64, C={channels:,}, {side}², bf16, splits={splits}" + ", residual" * residual
        shape = (rows, channels, 2, splits, residual)
        forward = (x, weight, weight, x if residual else None, 1e-5, splits, True)
        backward = (x, x, x if residual else None, weight, weight, moments, moments, True)
        cases += [
            Case(
                "batch_norm",
                size_name,
                batchnorm.batch_norm_fwd,
                forward,
                lambda arch, shape=shape: model.batch_norm_fwd(*shape, arch),
            ),
            Case(
                "batch_norm, backward",
                size_name,
                batchnorm.batch_norm_bwd,
                backward,
                lambda arch, shape=shape: model.batch_norm_bwd(*shape, arch),
            ),
        ]
    return cases


def _attention() -> list[Case]:
    cases = []
    for name, length, heads, width in (("encoder", 50, 12, 64), ("decoder", 197, 16, 32), ("ViT-B", 197, 12, 64)):

        def forward(arch, shape=(256, length, heads, width)):
            return model.attention_fwd(*shape, 2, arch)

        def backward(arch, shape=(256, length, heads, width)):
            return model.attention_bwd(*shape, 2, arch)

        size_name = f"{name}: B=256, L={length}, H={heads}, E={width}, bf16"
        cases += both_directions(256, length, heads, width, BF16, size_name, forward, backward)
    return cases


def both_directions(B, L, H, E, dtype, size_name, forward=None, backward=None) -> list[Case]:
    q, k, v = meta(B, L, 3, H, E, dtype=dtype).unbind(2)
    out, lse = meta(B, L, H, E, dtype=dtype), meta(B, H, L, dtype=tile.acc_dtype(dtype))
    return [
        Case("attention", size_name, attention.attention_fwd, (q, k, v, 0.1), forward),
        Case("attention, backward", size_name, attention.attention_bwd, (out, q, k, v, out, lse, 0.1), backward),
    ]


def _attention_bias() -> list[Case]:
    """BEiT ViT-B, with a bias [H, L, L] in float32."""
    shape = (256, 197, 12, 64)

    def forward(arch):
        return model.attention_bias_fwd(*shape, 2, 4, arch)

    def backward(arch):
        return model.attention_bias_bwd(*shape, 2, 4, arch)

    return both_directions_with_a_bias(*shape, BF16, "ViT-B: B=256, L=197, H=12, E=64, bf16", forward, backward)


def both_directions_with_a_bias(B, L, H, E, dtype, size_name, forward=None, backward=None) -> list[Case]:
    q, k, v = meta(B, L, 3, H, E, dtype=dtype).unbind(2)
    out, lse = meta(B, L, H, E, dtype=dtype), meta(B, H, L, dtype=tile.acc_dtype(dtype))
    bias = meta(H, L, L, dtype=tile.acc_dtype(dtype))
    gradients = (out, q, k, v, bias, out, lse, 0.1, True)
    return [
        Case("attention with a bias", size_name, attention_bias.attention_bias_fwd, (q, k, v, bias, 0.1), forward),
        Case("attention with a bias, backward", size_name, attention_bias.attention_bias_bwd, gradients, backward),
    ]


def _banks() -> list[Case]:
    """InstDisc: 4,096 negatives for each of 256 images, from ImageNet's 1.28 M; queries in float32."""
    cases, q, tau, drawn = [], meta(256, 128, dtype=FP32), meta(dtype=FP32), ids(256, 4097)
    for dtype in (FP32, BF16):
        memory, size = meta(1_281_167, 128, dtype=dtype), f"B=256, m=4,096, D=128, {NAMES[dtype]} bank"
        for op, launcher, args in (
            ("sampled_info_nce", bank.sampled_info_nce_fwd, (q, memory, drawn, tau, True)),
            ("sampled_nce", bank.sampled_nce_fwd, (q, memory, drawn, tau, tau, True)),
        ):

            def moved(arch, nce=op == "sampled_nce", size=dtype.itemsize):
                return model.sampled_fwd(256, 4096, 128, 4, size, True, nce, arch)

            cases.append(Case(op, size, launcher, args, moved, 4))
        args, update = (memory, ids(256), q, 0.5), f"B=256, D=128, {NAMES[dtype]} bank"
        moved = lambda _, size=dtype.itemsize: model.update_bank_(256, 128, size, 4)  # noqa: E731
        cases.append(Case("update_bank_", update, bank.update_bank_, args, moved, 4))
    return cases
