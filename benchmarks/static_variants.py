"""Further calls that benchmarks/static.py compiles: other rows of the tables, other dtypes, and sizes of 1."""

import itertools

import torch

from fastssl.kernels import (
    bank,
    batchnorm,
    block_masks,
    contrastive,
    crops,
    gelu,
    masking,
    pairwise,
    patches,
    queue,
    tile,
)
from fastssl.kernels.pixels import normalise
from fastssl.ops.crops import MODES

from .static_cases import (
    BF16,
    FP16,
    FP32,
    FP64,
    NAMES,
    Case,
    both_directions,
    both_directions_with_a_bias,
    feature_maps,
    ids,
    meta,
    prototype_cases,
)


def variants() -> list[Case]:
    """The other rows of the tables, the other dtypes, and the branches that the recipes do not take."""
    return [
        *_contrastive_tables(),
        *_prototype_tables(),
        *_attention_tables(),
        *_attention_bias_tables(),
        *_bank_dtypes(),
        *_tokens_and_pixels_in_other_dtypes(),
        *_planes_and_other_sizes(),
        *_ones(),
    ]


def _prototype_tables() -> list[Case]:
    """Every row of the tables, and a width beyond the last."""
    widths = {BF16: (64, 128, 256, 384), FP32: (128, 256), FP64: (64, 128)}
    shapes = [(dtype, width) for dtype, several in widths.items() for width in several]
    return list(itertools.chain(*(prototype_cases(512, 1, 8192, D, d, f"D={D}, {NAMES[d]}") for d, D in shapes)))


def _bank_dtypes() -> list[Case]:
    cases, drawn = [], ids(8, 100)
    for q_dtype, bank_dtype, width in ((FP64, FP64, 64), (BF16, FP16, 300), (FP32, FP64, 2048), (FP16, FP32, 17)):
        q, memory, tau = meta(8, width, dtype=q_dtype), meta(50, width, dtype=bank_dtype), meta(dtype=FP32)
        size = f"D={width}, {NAMES[q_dtype]} with {NAMES[bank_dtype]}"
        shift = meta(dtype=FP64)
        cases += [
            Case("sampled_info_nce", size, bank.sampled_info_nce_fwd, (q, memory, drawn, tau, False)),
            Case("sampled_nce", size, bank.sampled_nce_fwd, (q, memory, drawn, tau, shift, True)),
            Case("update_bank_", size, bank.update_bank_, (memory, ids(8), q, 0.3)),
        ]
    return cases


def _contrastive_tables() -> list[Case]:
    cases, tau = [], meta(dtype=FP32)
    for dtype, width in itertools.product((BF16, FP32, FP64), (16, 64, 128, 256, 512, 1024)):
        q, negatives, lse = (
            meta(256, width, dtype=dtype),
            meta(8192, width, dtype=dtype),
            meta(256, dtype=tile.acc_dtype(dtype)),
        )
        for op, launcher, args in (
            ("info_nce", contrastive.info_nce_fwd, (q, q, negatives, tau, True)),
            ("batch_info_nce", contrastive.batch_info_nce_fwd, (q, q, tau, 0, True)),
            ("batch_info_nce, keys", contrastive.batch_info_nce_dkeys, (q, negatives, tau, 0, lse, lse)),
            ("nt_xent", contrastive.nt_xent_fwd, (q, tau)),
            ("nt_xent, backward", contrastive.nt_xent_bwd, (q, tau, lse, lse)),
            ("pairwise_sigmoid", pairwise.pairwise_sigmoid_fwd, (q, negatives, tau, tau, 0, True)),
        ):
            cases.append(Case(op, f"D={width}, {NAMES[dtype]}", launcher, args))
    for q_dtype, keys_dtype in ((BF16, FP64), (FP16, FP32), (FP64, BF16)):
        q, negatives, lse = (
            meta(256, 128, dtype=q_dtype),
            meta(8192, 128, dtype=keys_dtype),
            meta(256, dtype=tile.acc_dtype(q_dtype)),
        )
        size_name = f"D=128, {NAMES[q_dtype]} with {NAMES[keys_dtype]}"
        cases.append(Case("info_nce", size_name, contrastive.info_nce_fwd, (q, q, negatives, tau, True)))
        args = (q, negatives, tau, 0, lse, lse)
        cases.append(Case("batch_info_nce, keys", size_name, contrastive.batch_info_nce_dkeys, args))
        args = (q, negatives, tau, tau, 0, True)
        cases.append(Case("pairwise_sigmoid", size_name, pairwise.pairwise_sigmoid_fwd, args))
    args = (meta(256, 128), meta(8192, 128), tau, tau, 0, False)
    cases.append(Case("pairwise_sigmoid", "D=128, bf16, without gradients", pairwise.pairwise_sigmoid_fwd, args))
    return cases


def _attention_tables() -> list[Case]:
    resident = itertools.product((50, 65, 197, 257), (32, 64))
    shapes = [(BF16, *shape) for shape in (*resident, (197, 80), (65, 128))]
    shapes += [(BF16, 17, width) for width in (32, 64, 128)]
    shapes += [(dtype, 197, width) for dtype in (FP16, FP32, FP64) for width in (32, 64)]
    return list(itertools.chain(*(both_directions(2, L, 4, E, d, f"L={L}, E={E}, {NAMES[d]}") for d, L, E in shapes)))


def _attention_bias_tables() -> list[Case]:
    shapes = [(BF16, L, E) for L in (50, 197) for E in (32, 64, 128)]
    shapes += [(dtype, 197, width) for dtype in (FP16, FP32, FP64) for width in (32, 64)]
    return list(
        itertools.chain(
            *(both_directions_with_a_bias(2, L, 4, E, d, f"L={L}, E={E}, {NAMES[d]}") for d, L, E in shapes)
        )
    )


def _tokens_and_pixels_in_other_dtypes() -> list[Case]:
    cases, keep, places, rest = [], ids(8, 49), ids(8, 196), ids(8, 147)
    for dtype in (FP32, FP64, FP16):
        images, x, kept = (meta(8, *shape, dtype=dtype) for shape in ((3, 224, 224), (196, 768), (49, 768)))
        maps, row_sums = feature_maps(8, 768, 14, dtype), meta(768, dtype=tile.acc_dtype(dtype))
        moments = [meta(2, 768, dtype=tile.acc_dtype(dtype)) for _ in range(2)]
        pred, pos, row = (meta(*shape, dtype=dtype) for shape in ((8, 147, 768), (196, 768), (768,)))
        for op, launcher, args in (
            ("random_masking, L=196", masking.random_masking, (meta(8, 196, dtype=dtype), 49)),
            ("random_masking, L=1,000", masking.random_masking, (meta(8, 1000, dtype=dtype), 49)),
            ("keep_tokens", masking.keep_tokens_fwd, (x, keep, pos)),
            ("keep_tokens, backward", masking.keep_tokens_bwd, (kept, keep, 196)),
            ("restore_tokens", masking.restore_tokens_fwd, (kept, row, places, pos, 0)),
            ("restore_tokens, backward", masking.restore_tokens_bwd, (x, places, 0, 49)),
            ("patchify, p=14", patches.patchify, (images, 14)),
            ("keep_patches", patches.keep_patches_fwd, (images, keep, 16)),
            ("keep_patches, backward", patches.keep_patches_bwd, (kept, keep, 16, 224, 224)),
            ("masked_patch_mse", patches.masked_patch_mse_fwd, (pred, images, rest, 16, False, True)),
            ("masked_patch_mse, norm_pix", patches.masked_patch_mse_fwd, (pred, images, rest, 16, True, True)),
            ("batch_norm", batchnorm.batch_norm_fwd, (maps, row_sums, row_sums, None, 1e-5, 2, False)),
            ("batch_norm, backward", batchnorm.batch_norm_bwd, (maps, maps, maps, row_sums, row_sums, *moments, True)),
            ("bias_gelu", gelu.bias_gelu_fwd, (x[0], row)),
            ("bias_gelu, backward", gelu.bias_gelu_bwd, (x[0], x[0], row)),
            ("enqueue_", queue.enqueue_, (meta(99, 128, dtype=dtype), ids(1), meta(9, 128))),
        ):
            cases.append(Case(op, NAMES[dtype], launcher, args))
    return cases


def _planes_and_other_sizes() -> list[Case]:
    """Crops of planes beside RGB, narrower than a tile and wider than one."""
    cases, windows = [], torch.tensor([[3, 5, 90, 91], [1, 1, 20, 31]])
    images = [meta(150, 100, dtype=torch.uint8), meta(40, 64, 3, dtype=torch.uint8)[:, :50]]
    for height, width in ((8, 8), (7, 300), (384, 1)):
        for kernel, name in enumerate(MODES):
            out = meta(2, 3, height, width, dtype=torch.uint8)
            size = f"RGB and YUV to {height} × {width}, {name}"
            cases.append(Case("resized_crops_", size, crops.resized_crops_, (out, images, windows, kernel)))
    args = (meta(2, 3, 5, 7, dtype=torch.uint8), [0.5, 0.4, 0.3], [0.5, 0.4, 0.3], FP16)
    return [*cases, Case("normalise", "fp16", normalise, args)]


def _ones() -> list[Case]:
    """Sizes and strides of 1, which Triton compiles as constants: a kernel must compile with any of them constant."""
    tau, q, row, lse = meta(dtype=FP32), meta(1, 1), meta(1), meta(1, dtype=FP32)
    pixel, pixels = feature_maps(2, 1, 1), meta(1, 3, 1, 1, dtype=torch.uint8)
    launches = {
        "info_nce": (contrastive.info_nce_fwd, (q, q, q, tau, True)),
        "batch_info_nce": (contrastive.batch_info_nce_fwd, (q, meta(2, 1), tau, 1, True)),
        "batch_info_nce, keys": (contrastive.batch_info_nce_dkeys, (q, q, tau, 1, lse, lse)),
        "nt_xent": (contrastive.nt_xent_fwd, (meta(2, 1), tau)),
        "nt_xent, backward": (contrastive.nt_xent_bwd, (meta(2, 1), tau, meta(2, dtype=FP32), meta(2, dtype=FP32))),
        "pairwise_sigmoid": (pairwise.pairwise_sigmoid_fwd, (q, meta(2, 1), tau, tau, 1, True)),
        "random_masking": (masking.random_masking, (meta(1, 1, dtype=FP32), 1)),
        "keep_tokens": (masking.keep_tokens_fwd, (meta(1, 1, 1), ids(1, 1), q)),
        "keep_tokens without pos": (masking.keep_tokens_fwd, (meta(1, 1, 1), ids(1, 1), None)),
        "keep_tokens, backward": (masking.keep_tokens_bwd, (meta(1, 1, 1), ids(1, 1), 1)),
        "restore_tokens": (masking.restore_tokens_fwd, (meta(1, 2, 1), row, ids(1, 1), meta(2, 1), 1)),
        "restore_tokens without pos": (masking.restore_tokens_fwd, (meta(1, 1, 1), row, ids(1, 1), None, 0)),
        "restore_tokens, backward": (masking.restore_tokens_bwd, (meta(1, 2, 1), ids(1, 1), 1, 1)),
        "patchify": (patches.patchify, (meta(1, 1, 1, 1), 1)),
        "unpatchify": (patches.unpatchify, (meta(1, 1, 1), 1, 1, 1)),
        "keep_patches": (patches.keep_patches_fwd, (meta(1, 1, 1, 1), ids(1, 1), 1)),
        "keep_patches, backward": (patches.keep_patches_bwd, (meta(1, 1, 1), ids(1, 1), 1, 1, 1)),
        "masked_patch_mse": (patches.masked_patch_mse_fwd, (meta(1, 1, 1), meta(1, 1, 1, 1), ids(1, 1), 1, True, True)),
        "enqueue_": (queue.enqueue_, (q, ids(1), q)),
        "batch_norm": (batchnorm.batch_norm_fwd, (pixel, lse, lse, None, 1e-5, 1, True)),
        "batch_norm, backward": (batchnorm.batch_norm_bwd, (pixel, pixel, None, lse, lse, q.float(), q.float(), True)),
        "bias_gelu": (gelu.bias_gelu_fwd, (q, row)),
        "bias_gelu, backward": (gelu.bias_gelu_bwd, (q, q, row)),
        "block_mask": (block_masks.block_mask, (ids(1), ids(1), 1, 1, [1, 1], 1, 1, 1)),
        "resized_crops_": (
            crops.resized_crops_,
            (pixels, [meta(1, 1, 3, dtype=torch.uint8)], torch.tensor([[0, 0, 1, 1]]), False),
        ),
        "normalise": (normalise, (pixels, [0.0, 1.0, 0.0], [1.0, 1.0, 1.0], BF16)),
        "sampled_info_nce": (bank.sampled_info_nce_fwd, (q, q, ids(1, 2), tau, True)),
        "sampled_nce": (bank.sampled_nce_fwd, (q, q, ids(1, 1), tau, tau, True)),
        "update_bank_": (bank.update_bank_, (q, ids(1), q, 1.0)),
    }
    cases = [Case(op, "sizes of 1, bf16", launcher, args) for op, (launcher, args) in launches.items()]
    for dtype in (BF16, FP32):
        cases += prototype_cases(1, 1, 1, 1, dtype, f"sizes of 1, {NAMES[dtype]}")
        cases += both_directions(1, 1, 1, 1, dtype, f"sizes of 1, {NAMES[dtype]}")
    return cases
