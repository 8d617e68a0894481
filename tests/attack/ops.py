"""One valid call of every public op, of random sizes, and mutations of its arguments."""

import inspect
import math
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import ops

Arguments = dict[str, Any]


def public_ops() -> dict[str, Callable]:
    return {name: op for name, op in vars(ops).items() if inspect.isfunction(op) and not name.startswith("_")}


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def ids(batch: int, count: int, length: int) -> Tensor:
    return torch.rand(batch, length).argsort(1)[:, :count].contiguous()


def _attention(n: random.Random) -> Arguments:
    batch, heads, width, keys = n.randint(1, 3), n.randint(1, 3), n.choice([1, 5, 16, 33]), n.randint(1, 40)
    q, k, v = (torch.randn(batch, length, heads, width) for length in (n.randint(1, 40), keys, keys))
    arguments = {"q": q, "k": k, "v": v, "scale": n.choice([None, 0.3])}
    if q.shape[1] == keys and n.random() < 0.5:
        return arguments | {"causal": True}
    bias = torch.randn(*n.choice([(), (batch,)]), heads, q.shape[1], keys)
    return arguments | {"bias": n.choice([None, bias])}


def _attention_packed(n: random.Random) -> Arguments:
    batch, length, heads = n.randint(1, 3), n.randint(1, 40), n.randint(1, 3)
    bias = torch.randn(*n.choice([(), (batch,)]), heads, length, length)
    qkv = torch.randn(batch, length, 3, heads, n.choice([1, 5, 16, 33]))
    return {"qkv": qkv, "scale": n.choice([None, 0.3]), "bias": n.choice([None, bias])}


def _augment(n: random.Random) -> Arguments:
    batch = n.randint(1, 3)
    images = torch.randint(256, (batch, 3, n.randint(2, 19), n.randint(2, 40)), dtype=torch.uint8)
    grey, solarize, flip = (torch.rand(batch) < 0.5 for _ in range(3))
    jitter = torch.cat([0.6 + 0.8 * torch.rand(batch, 3), 0.2 * torch.rand(batch, 1) - 0.1], 1)
    order, sigma = torch.rand(batch, 4).argsort(1), 2 * torch.rand(batch) * (torch.rand(batch) < 0.5)
    drawn = {"images": images, "jitter": jitter, "order": order, "grey": grey}
    return drawn | {
        "sigma": sigma,
        "solarize": solarize,
        "flip": flip,
        "law": ops.ColourLaw(*(n.random() < 0.5 for _ in range(3))),
    }


def _crops(n: random.Random) -> Arguments:
    images, windows = [], []
    for _ in range(n.randint(1, 3)):
        height, width = 2 * n.randint(1, 20), 2 * n.randint(1, 20)
        shape = n.choice([(height, width, 3), (3 * height // 2, width)])
        images.append(torch.randint(256, shape, dtype=torch.uint8))
        top, left = n.randrange(height), n.randrange(width)
        windows.append([top, left, n.randint(1, height - top), n.randint(1, width - left)])
    out = torch.zeros(len(images), 3, n.randint(1, 40), n.randint(1, 40), dtype=torch.uint8)
    drawn = {"out": out, "images": images, "windows": torch.tensor(windows)}
    return drawn | {"interpolation": n.choice(["bilinear", "bicubic", "lanczos"])}


def _normalise(n: random.Random) -> Arguments:
    pixels = torch.randint(256, (n.randint(1, 3), 3, n.randint(1, 9), n.randint(1, 40)), dtype=torch.uint8)
    dtype = n.choice([torch.float32, torch.bfloat16, torch.float16])
    return {"pixels": pixels, "mean": (0.5, 0.4, 0.3), "std": (0.3, 0.2, 0.1), "dtype": dtype}


def _block_mask(n: random.Random) -> Arguments:
    batch, rows, columns = n.randint(1, 5), n.randint(1, 9), n.randint(1, 9)
    count = torch.rand(batch) * rows * columns
    drawn = {"seed": torch.randint(2**62, (batch,)), "count": n.choice([count, count.long()]), "grid": (rows, columns)}
    return drawn | {"min_patches": n.randint(1, 9), "max_patches": n.choice([None, 9.5]), "stream": n.randint(0, 9)}


def _batch_norm(n: random.Random) -> Arguments:
    channels, splits = n.randint(1, 37), n.randint(1, 2)
    shape = (splits * n.randint(2, 5), channels, *n.choice([(), (n.randint(1, 5), n.randint(1, 5))]))
    running = ops.Running(torch.zeros(channels), torch.ones(channels), 0.1)
    drawn = {"x": torch.randn(shape), "weight": torch.rand(channels), "bias": torch.randn(channels), "running": running}
    residual = n.choice([None, torch.randn(shape)])
    return drawn | {"eps": 1e-5, "splits": splits, "relu": n.random() < 0.5, "residual": residual}


def _ema(n: random.Random) -> Arguments:
    shapes = [n.choice([(), (1,), (37,), (3, 5), (2, 3, 1, 2)]) for _ in range(n.randint(1, 4))]
    shadows = n.choice([None, [torch.zeros(shape).bfloat16() for shape in shapes]])
    targets, sources = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    return {"targets": targets, "sources": sources, "momentum": 0.9, "shadows": shadows}


def _enqueue(n: random.Random) -> Arguments:
    length, width = n.randint(1, 30), n.randint(1, 20)
    ptr = torch.tensor([n.randrange(length)])
    return {"queue": torch.randn(length, width), "ptr": ptr, "keys": torch.randn(n.randint(0, 40), width)}


def _tokens(n: random.Random) -> tuple[int, int, int, int]:
    length = n.randint(1, 40)
    return n.randint(1, 3), length, n.randint(1, length), n.choice([1, 5, 16, 33])


def _keep_tokens(n: random.Random) -> Arguments:
    batch, length, kept, width = _tokens(n)
    pos = n.choice([None, torch.randn(length, width), torch.randn(1, length, width)])
    return {"x": torch.randn(batch, length, width), "ids_keep": ids(batch, kept, length), "pos": pos}


def _restore_tokens(n: random.Random) -> Arguments:
    batch, length, kept, width = _tokens(n)
    prefix = n.randint(0, 2)
    x, pos = torch.randn(batch, prefix + kept, width), n.choice([None, torch.randn(prefix + length, width)])
    drawn = {"x": x, "mask_token": torch.randn(n.choice([(width,), (1, 1, width)]))}
    return drawn | {"ids_restore": ids(batch, length, length), "pos": pos, "prefix": prefix}


def _images(n: random.Random) -> tuple[Tensor, int, int]:
    """(images, patch, patches of an image)"""
    patch, rows, columns = n.randint(1, 5), n.randint(1, 4), n.randint(1, 4)
    return torch.rand(n.randint(1, 3), n.choice([1, 3, 4]), rows * patch, columns * patch), patch, rows * columns


def _keep_patches(n: random.Random) -> Arguments:
    images, patch, length = _images(n)
    return {"images": images, "ids_keep": ids(len(images), n.randint(1, length), length), "patch": patch}


def _masked_patch_mse(n: random.Random) -> Arguments:
    images, patch, length = _images(n)
    masked = ids(len(images), n.randint(1, length), length)
    pred, norm_pix = torch.randn(*masked.shape, images.shape[1] * patch**2), n.random() < 0.5
    return {"pred": pred, "images": images, "ids": masked, "patch": patch, "norm_pix": norm_pix}


def _unpatchify(n: random.Random) -> Arguments:
    images, patch, _ = _images(n)
    return {"patches": ops.patchify(images, patch), "patch": patch, "height": images.shape[2], "width": images.shape[3]}


def _linear(n: random.Random) -> Arguments:
    rows, depth, columns = n.choice([1, 70, 97]), n.randint(1, 40), n.randint(1, 40)
    weight, bias = torch.randn(columns, depth), n.choice([None, torch.randn(columns)])
    return {"x": torch.randn(rows, depth), "weight": weight, "bias": bias, "gelu": n.random() < 0.5}


def _bias_gelu(n: random.Random) -> Arguments:
    width = n.randint(1, 40)
    return {"x": torch.randn(n.randint(1, 3), n.randint(1, 9), width), "bias": torch.randn(width)}


def _residual_norm(n: random.Random) -> Arguments:
    shape = (n.randint(1, 3), n.randint(1, 9), n.randint(2, 40))
    weight, bias = torch.rand(shape[2]), torch.randn(shape[2])
    drawn = {"x": torch.randn(shape), "delta": n.choice([None, torch.randn(shape)]), "weight": weight, "bias": bias}
    return drawn | {"eps": 1e-6, "dtype": n.choice([None, torch.bfloat16])}


def _info_nce(n: random.Random) -> Arguments:
    batch, width = n.randint(1, 20), n.choice([1, 5, 16, 33])
    return {"q": unit(batch, width), "k": unit(batch, width), "queue": unit(n.randint(1, 200), width), "tau": 0.2}


def _batch_info_nce(n: random.Random) -> Arguments:
    batch, width, offset = n.randint(1, 20), n.choice([1, 5, 16, 33]), n.randint(0, 9)
    keys = unit(offset + batch + n.randint(0, 90), width)
    return {"q": unit(batch, width), "keys": keys, "tau": 0.2, "label_offset": offset}


def _nt_xent(n: random.Random) -> Arguments:
    batch, width = n.randint(1, 40), n.choice([2, 5, 16, 33])
    return {"z1": unit(batch, width), "z2": unit(batch, width), "tau": 0.5}


def _dense_match(n: random.Random) -> Arguments:
    batch, width = n.randint(1, 40), n.choice([1, 5, 16, 33])
    return {"q": torch.randn(batch, width, n.randint(1, 20)), "k": torch.randn(batch, width, n.randint(1, 20))}


def _sampled_scores(n: random.Random) -> Arguments:
    batch, width, length = n.randint(1, 20), n.choice([1, 5, 16, 33]), n.randint(1, 60)
    index = torch.randint(length, (batch, n.randint(1, 30)))
    return {"q": torch.randn(batch, width), "rows": torch.randn(length, width), "index": index}


def _sampled(n: random.Random) -> Arguments:
    batch, rows, width = n.randint(1, 9), n.randint(1, 40), n.choice([1, 5, 16, 33])
    indices = torch.randint(rows, (batch, n.randint(2, 50)))
    return {"q": unit(batch, width), "bank": unit(rows, width), "indices": indices, "tau": 0.2}


def _update_bank(n: random.Random) -> Arguments:
    rows, batch, width = n.randint(1, 30), n.randint(0, 40), n.randint(1, 20)
    indices = torch.randint(rows, (batch,))
    return {"bank": unit(rows, width), "indices": indices, "features": unit(batch, width), "momentum": 0.5}


def _prototype_lse(n: random.Random) -> Arguments:
    rows, length, width, dim = n.randint(1, 20), n.randint(1, 200), n.choice([1, 5, 16, 33]), n.randint(0, 1)
    offset = n.choice([None, torch.randn((rows, length)[dim])])
    return {"x": unit(rows, width), "weight": unit(length, width), "tau": 0.1, "offset": offset, "dim": dim}


def _soft_cross_entropy(n: random.Random) -> Arguments:
    rows, teachers, length, width = n.randint(1, 20), n.randint(1, 9), n.randint(1, 200), n.choice([1, 5, 16, 33])
    teacher, weight, centre = unit(teachers, 8), unit(length, 8), torch.randn(length)
    offset = -ops.prototype_lse(teacher, weight, 0.1, centre)
    targets = ops.PrototypeTargets(teacher, weight, 0.1, offset, centre)
    drawn = {"student": unit(rows, width), "weight": unit(length, width), "tau": 0.1, "targets": targets}
    return drawn | {"rows": torch.randint(-1, teachers, (rows, n.randint(1, 3)))}


def _linear_cross_entropy(n: random.Random) -> Arguments:
    rows, length, width = n.randint(1, 20), n.randint(1, 200), n.choice([1, 5, 16, 33])
    target = torch.randint(length, (rows,)).where(torch.rand(rows) < 0.8, -100)
    return {"x": unit(rows, width), "weight": unit(length, width), "tau": 0.1, "target": target}


CALLS: dict[str, Callable[[random.Random], Arguments]] = {
    "attention": _attention,
    "attention_packed": _attention_packed,
    "augment_": _augment,
    "batch_info_nce": _batch_info_nce,
    "batch_norm": _batch_norm,
    "bias_gelu": _bias_gelu,
    "dense_match": _dense_match,
    "block_mask": _block_mask,
    "ema_update_": _ema,
    "enqueue_": _enqueue,
    "info_nce": _info_nce,
    "keep_patches": _keep_patches,
    "keep_tokens": _keep_tokens,
    "linear": _linear,
    "linear_cross_entropy": _linear_cross_entropy,
    "masked_patch_mse": _masked_patch_mse,
    "normalise": _normalise,
    "nt_xent": _nt_xent,
    "patchify": lambda n: dict(zip(("images", "patch"), _images(n))),
    "prototype_lse": _prototype_lse,
    "random_masking": lambda n: {"noise": torch.rand(n.randint(1, 3), n.randint(5, 40)), "keep": n.randint(1, 5)},
    "residual_norm": _residual_norm,
    "resized_crops_": _crops,
    "restore_tokens": _restore_tokens,
    "sampled_scores": _sampled_scores,
    "sampled_info_nce": _sampled,
    "sampled_nce": lambda n: _sampled(n) | {"z": 30.0, "eps": 1e-7},
    "soft_cross_entropy": _soft_cross_entropy,
    "unpatchify": _unpatchify,
    "update_bank_": _update_bank,
}


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    """Writes a value to one place of a copy."""

    def fill(x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        if x.numel():
            x.view(-1)[x.numel() // 2] = value
        return x

    return fill


def _expanded(x: Tensor) -> Tensor:
    return x[:1].expand_as(x) if x.ndim else x


def _strided(x: Tensor) -> Tensor:
    """Every other value of wider memory, whose other values are NaN, or the largest of an integer dtype."""
    garbage = math.nan if x.is_floating_point() else True if x.dtype == torch.bool else torch.iinfo(x.dtype).max
    wide = torch.stack([x, torch.full_like(x, garbage)], -1)
    return wide[..., 0]


def _reordered(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.ndim > 1 else x


FLOATS = {"nan": math.nan, "infinity": math.inf, "minus infinity": -math.inf, "1e30": 1e30, "1e-30": 1e-30}
INTEGERS = {"-1": -1, "next": 40, "2**62": 2**62, "-2**63": -(2**63)}  # 40: beyond, or beside, the longest rows

# {kind: mutation of a tensor}; a layout changes no value, so the op must return what it returns for a clone
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": _strided,
    "expanded": _expanded,
    "reordered": _reordered,
    "offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}
TENSORS: dict[str, Callable[[Tensor], Any]] = {
    **LAYOUTS,
    **{str(d): lambda x, d=d: x.to(d) for d in (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)},
    "complex": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
    "empty batch": lambda x: x[:0] if x.ndim else x,
    "empty rows": lambda x: x[..., :0] if x.ndim else x,
    "longer": lambda x: torch.cat([x, x]) if x.ndim else x[None],
    "wider": lambda x: torch.cat([x, x], -1) if x.ndim else x[None],
    "another dimension": lambda x: x[None],
    "a dimension less": lambda x: x.sum(0).to(x.dtype) if x.ndim else x[None, None],
    "requires a gradient": lambda x: x.clone().requires_grad_() if x.is_floating_point() else x.clone(),
    "None": lambda x: None,
    "list": lambda x: x.tolist(),
    "number": lambda x: 1.0,
}
SCALARS = (None, 0, -1, 1, 2, 3, 7, 10**9, 0.5, 1e-10, 1e-40, 1e300, math.nan, math.inf, -math.inf, "x", torch.int64)


def mutations_of(value: Any) -> dict[str, Any]:
    """{kind: mutated value}; the value itself is not changed."""
    if isinstance(value, Tensor):
        floating = value.is_floating_point()
        values = FLOATS if floating else INTEGERS if value.dtype == torch.int64 else {}
        made = {kind: mutate(value.clone()) for kind, mutate in TENSORS.items()}
        return made | {kind: _filled(number)(value) for kind, number in values.items()}
    if isinstance(value, list):  # of tensors: one of them, or their number
        made = {f"first {kind}": [new, *value[1:]] for kind, new in mutations_of(value[0]).items()}
        return made | {"one less": value[1:], "repeated": [value[0], *value[:-1]], "None": None}
    if isinstance(value, ops.Running):
        means = {f"mean {kind}": value._replace(mean=new) for kind, new in mutations_of(value.mean).items()}
        variances = {f"var {kind}": value._replace(var=new) for kind, new in mutations_of(value.var).items()}
        return means | variances | {"one tensor": value._replace(var=value.mean)}
    if isinstance(value, ops.PrototypeTargets):
        fields = ((field, mutations_of(part)) for field, part in value._asdict().items())
        made = {
            f"{field} {kind}": value._replace(**{field: new}) for field, kinds in fields for kind, new in kinds.items()
        }
        return made | {"tuple": tuple(value), "None": None}
    if isinstance(value, bool):
        return {}
    return {repr(scalar): scalar for scalar in SCALARS}


def copied(value: Any) -> Any:
    """A copy with the same strides, as far as it can be written to, and the same need of a gradient."""
    if isinstance(value, ops.Running):
        return ops.Running(copied(value.mean), copied(value.var), value.momentum)
    if isinstance(value, ops.PrototypeTargets):
        return ops.PrototypeTargets(*map(copied, value))
    if isinstance(value, list):
        return [copied(item) for item in value]
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    if not value.is_contiguous() and value.numel():  # a view: copy the memory it is in
        memory = value.detach().as_strided((value.untyped_storage().size() // value.element_size(),), (1,), 0).clone()
        return memory.as_strided(value.shape, value.stride(), value.storage_offset()).requires_grad_(
            value.requires_grad
        )
    return value.detach().clone().requires_grad_(value.requires_grad)


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return [tensor for item in value.values() for tensor in tensors_in(item)] if isinstance(value, dict) else []
