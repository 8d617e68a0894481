"""iGPT in plain torch from its paper and its code, without this package: losses, palette and Adam's steps.

Weights are a dict with the names and layouts of the official code: `wpe`, `wte`, `sos`, `wtet`, `ln_f.g`, and for each
layer `hI.ln_1.g`, `hI.attn.{q,k,v}_proj` [heads, E / heads, E], `hI.attn.c_proj` [heads, E / heads, E], `hI.ln_2.g`,
`hI.mlp.c_fc.w` [E, 4 E], `hI.mlp.c_proj.w` [4 E, E].
"""

import math

import torch
from torch import Tensor

State = dict[str, Tensor]


def depth_of(p: State) -> int:
    return 1 + max(int(name[1 : name.index(".")]) for name in p if name.startswith("h"))


def norm(x: Tensor, g: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * g


def attend(p: State, name: str, x: Tensor, causal: bool) -> Tensor:
    q, k, v = (torch.einsum("bne,hde->bhnd", x, p[f"{name}.{part}_proj"]) for part in "qkv")
    logits = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(q.shape[-1])
    if causal:
        count = x.shape[1]
        seen = torch.ones(count, count, dtype=x.dtype).tril()
        logits = logits * seen - 1e10 * (1 - seen)
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhnm,bhmd,hde->bne", weights, v, p[f"{name}.c_proj"])


def mlp(p: State, name: str, x: Tensor) -> Tensor:
    hidden = x @ p[f"{name}.c_fc.w"]
    return hidden / (1 + torch.exp(-1.702 * hidden)) @ p[f"{name}.c_proj.w"]


def states(p: State, codes: Tensor, kept: Tensor | None) -> list[Tensor]:
    """The residual stream [B, n, E] before each layer and before the last norm: autoregressive without `kept`."""
    embedded = p["wte"][codes.long()]
    if kept is None:
        first = p["sos"].expand(len(codes), 1, -1)
        embedded = torch.cat([first, embedded[:, :-1]], 1)
    else:
        embedded = embedded * kept[:, :, None].to(embedded.dtype)
    x, found = embedded + p["wpe"], []
    for i in range(depth_of(p)):
        found.append(x)
        x = x + attend(p, f"h{i}.attn", norm(x, p[f"h{i}.ln_1.g"]), kept is None)
        x = x + mlp(p, f"h{i}.mlp", norm(x, p[f"h{i}.ln_2.g"]))
    return [*found, x]


def logits(p: State, codes: Tensor, kept: Tensor | None = None) -> Tensor:
    return norm(states(p, codes, kept)[-1], p["ln_f.g"]) @ p["wtet"].T


def nats(p: State, codes: Tensor, kept: Tensor | None = None) -> Tensor:
    """−ln of the probability of each code, [B, n]."""
    z = logits(p, codes, kept)
    top = z.amax(-1)
    lse = top + torch.log(torch.exp(z - top[..., None]).sum(-1))
    return lse - z.gather(-1, codes.long()[..., None])[..., 0]


def autoregressive(p: State, codes: Tensor) -> Tensor:
    return nats(p, codes).mean()


def bert(p: State, codes: Tensor, kept: Tensor) -> Tensor:
    """Mean over the masked positions of an image, then over the images; 0 for an image without any."""
    losses = nats(p, codes, kept)
    images = [image[~k].mean() if not bool(k.all()) else 0 * image.sum() for image, k in zip(losses, kept)]
    return torch.stack(images).mean()


def codes_of(pixels: Tensor, clusters: Tensor) -> Tensor:
    """Nearest cluster [B, H·W] of uint8 pixels [B, H, W, 3]; the first of equally near ones."""
    x = (pixels.double() / 127.5 - 1).reshape(len(pixels), -1, 1, 3)
    squares = ((x - clusters.double()) ** 2).sum(-1)
    return squares.argmin(-1)


def learning_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(p: State, losses, rates, betas=(0.9, 0.95), eps: float = 1e-8) -> tuple[State, list[Tensor]]:
    """Adam without weight decay: the weights after it, and the loss of each step.

    Args:
        p: initial weights, which stay as they are.
        losses: a function of the weights for each step.
        rates: a learning rate for each step.
    """
    p = {name: x.clone() for name, x in p.items()}
    first = {name: torch.zeros_like(x) for name, x in p.items()}
    second = {name: torch.zeros_like(x) for name, x in p.items()}
    found = []
    for step, (loss_of, rate) in enumerate(zip(losses, rates, strict=True), 1):
        p = {name: x.detach().requires_grad_() for name, x in p.items()}
        loss = loss_of(p)
        gradients = torch.autograd.grad(loss, list(p.values()), allow_unused=True)
        found.append(loss.detach())
        for (name, x), gradient in zip(list(p.items()), gradients, strict=True):
            g = torch.zeros_like(x) if gradient is None else gradient
            first[name] = betas[0] * first[name] + (1 - betas[0]) * g
            second[name] = betas[1] * second[name] + (1 - betas[1]) * g * g
            mean, variance = first[name] / (1 - betas[0] ** step), second[name] / (1 - betas[1] ** step)
            p[name] = x.detach() - rate * mean / (variance.sqrt() + eps)
    return p, found
