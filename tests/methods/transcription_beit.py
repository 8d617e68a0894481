"""BEiT in plain torch: a reference for whole training runs.

Written from the paper (Bao et al., 2021) and from what the official code does, without the methods and networks of this
package; tests/methods/test_beit.py proves it by the golden numbers. State dicts have the official names. All computes
in the dtype of the weights.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
NOT_DECAYED = ("pos_embed", "cls_token")


class Size(NamedTuple):
    """What a state dict does not tell."""

    grid: tuple[int, int]
    patch: int
    heads: int


class Step(NamedTuple):
    """A training step: images [B, 3, H, W], mask [B, L] bool, codes [B, L] int64."""

    images: Tensor
    mask: Tensor
    codes: Tensor


def relative_bias(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bias of every pair of tokens [heads, 1 + L, 1 + L], one pair after the other."""
    rows, columns = grid
    places = [(r, c) for r in range(rows) for c in range(columns)]
    pairs = (2 * rows - 1) * (2 * columns - 1)
    index = [[pairs + 2] + [pairs] * len(places)]
    for r, c in places:
        offsets = [(r - r2 + rows - 1) * (2 * columns - 1) + (c - c2 + columns - 1) for r2, c2 in places]
        index.append([pairs + 1, *offsets])
    return torch.stack([torch.stack([table[i] for i in line]) for line in index]).permute(2, 0, 1)


def attention(p: State, name: str, x: Tensor, size: Size, bias: Tensor | None) -> Tensor:
    width = x.shape[2]
    q, k, v = (x @ w.T for w in p[f"{name}.qkv.weight"].split(width))
    q, v = q + p[f"{name}.q_bias"], v + p[f"{name}.v_bias"]
    q, k, v = (t.unflatten(2, (size.heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = (q * (width // size.heads) ** -0.5) @ k.transpose(2, 3)
    own = p.get(f"{name}.relative_position_bias_table")
    for b in (bias, None if own is None else relative_bias(own, size.grid)):
        scores = scores if b is None else scores + b
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return out @ p[f"{name}.proj.weight"].T + p[f"{name}.proj.bias"]


def norm(p: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)


def tokens(p: State, images: Tensor, mask: Tensor | None, size: Size) -> Tensor:
    """Normalised tokens [B, 1 + L, D]."""
    x = F.conv2d(images, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=size.patch)
    x = x.flatten(2).transpose(1, 2)
    if mask is not None:
        w = mask[..., None].to(x.dtype)
        x = x * (1 - w) + p["mask_token"] * w
    x = torch.cat([p["cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + p["pos_embed"] if "pos_embed" in p else x
    shared = p.get("rel_pos_bias.relative_position_bias_table")
    bias = None if shared is None else relative_bias(shared, size.grid)
    for i in range(len({name.split(".")[1] for name in p if name.startswith("blocks.")})):
        b = f"blocks.{i}"
        x = x + p.get(f"{b}.gamma_1", 1) * attention(p, f"{b}.attn", norm(p, f"{b}.norm1", x), size, bias)
        h = norm(p, f"{b}.norm2", x) @ p[f"{b}.mlp.fc1.weight"].T + p[f"{b}.mlp.fc1.bias"]
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        x = x + p.get(f"{b}.gamma_2", 1) * (h @ p[f"{b}.mlp.fc2.weight"].T + p[f"{b}.mlp.fc2.bias"])
    return norm(p, "norm", x)


def logits(p: State, step: Step, size: Size) -> Tensor:
    """Logits of the masked patches [M, K], image by image."""
    return tokens(p, step.images, step.mask, size)[:, 1:][step.mask] @ p["lm_head.weight"].T + p["lm_head.bias"]


def loss(p: State, step: Step, size: Size) -> Tensor:
    """Mean over the masked patches of all images."""
    scores = logits(p, step, size)
    return (scores.logsumexp(1) - scores.gather(1, step.codes[step.mask][:, None])[:, 0]).mean()


def learning_rates(peak: float, end: float, warmup: int, steps: int) -> list[float]:
    """The rate of each step: a line from 0 that includes the peak, then half a cosine."""
    rising = [peak * i / (warmup - 1) for i in range(warmup)] if warmup > 1 else [0.0] * warmup
    rest = steps - warmup
    return rising + [end + 0.5 * (peak - end) * (1 + math.cos(math.pi * i / rest)) for i in range(rest)]


def run(
    state: State, steps: list[Step], size: Size, rates: list[float], decay: float, clip: float
) -> tuple[list[Tensor], State]:
    """Losses, and the weights after the last step. AdamW is written out, and the whole gradient is clipped."""
    p = {name: x.clone() for name, x in state.items() if x.is_floating_point()}
    first, second = ({name: torch.zeros_like(x) for name, x in p.items()} for _ in range(2))
    losses = []
    for count, (step, lr) in enumerate(zip(steps, rates, strict=True), 1):
        p = {name: x.detach().requires_grad_() for name, x in p.items()}
        value = loss(p, step, size)
        gradients = dict(zip(p, torch.autograd.grad(value, list(p.values()))))
        total = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        losses.append(value.detach())
        with torch.no_grad():
            for name, x in p.items():
                g = gradients[name] * min(1.0, clip / (total.item() + 1e-6))
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g * g
                mean, square = first[name] / (1 - 0.9**count), second[name] / (1 - 0.999**count)
                kept = x.ndim == 1 or name.endswith(".bias") or name in NOT_DECAYED
                x = x if kept else x * (1 - lr * decay)
                p[name] = x - lr * mean / (square.sqrt() + 1e-8)
    return losses, p
