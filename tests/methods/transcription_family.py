"""SimCLR, BYOL, SimSiam, Barlow Twins and VICReg in plain torch: a reference for whole training runs.

Written from the papers and from what the official code does: formulas on a dict of tensors, nothing of fastssl.
tests/methods/test_transcription_family.py proves them by the golden numbers. All computes in float64.

`run_simclr`, `run_byol`, `run_simsiam`, `run_barlow` and `run_vicreg` share these arguments:

- `tensors`: the initial state under any names; it is copied. Names that end in running_mean, running_var or
  num_batches_tracked are buffers, names in `fixed` are never changed, everything else is trained and has to be used.
- `batches`: (view 1, view 2) for each step.
- `backbone(tensors, images)`: features [N, D] from the tensors of the current step. It may use `linear` and
  `batch_norm`, which updates the running statistics in place.
- `projector`, `predictor`: (name of the linear layer, name of its batch norm or None) for each layer. The tensors under
  these names have to be those of the paper's head: a bias too many or too few is refused.
- `optimizer`: an `Optimizer`.
- `running`: which running statistics the heads keep (see `batch_norm`).

Each returns a `Replay`.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
Tensors = dict[str, Tensor]
Names = Sequence[tuple[str, str | None]]


# Layers


def linear(p: Tensors, name: str, x: Tensor) -> Tensor:
    x = x @ p[f"{name}.weight"].T
    return x + p[f"{name}.bias"] if f"{name}.bias" in p else x


def batch_norm(p: Tensors, name: str, x: Tensor, running: str = "torch") -> Tensor:
    """Normalise by the biased variance of the batch; eps 1e-5. x: [N, C, …].

    Running statistics, where p has them, with decay 0.9: "torch" keeps the unbiased variance, "tensorflow" and "haiku"
    the biased one. "haiku" counts its steps in num_batches_tracked and divides mean and variance by 1 − 0.9^steps, so
    that they do not depend on their initial values.
    """
    dims, column = [d for d in range(x.ndim) if d != 1], (1, -1, *[1] * (x.ndim - 2))
    count = x.numel() // x.shape[1]
    mean = x.sum(dims) / count
    centred = x - mean.view(column)
    variance = centred.square().sum(dims) / count
    if f"{name}.running_mean" in p:
        unbiased = variance * count / (count - 1)
        steps = p[f"{name}.num_batches_tracked"].add_(1).item() if f"{name}.num_batches_tracked" in p else None
        for key, new in (("mean", mean), ("var", unbiased if running == "torch" else variance)):
            kept = p[f"{name}.running_{key}"]
            weight, total = (1 - 0.9 ** (steps - 1), 1 - 0.9**steps) if running == "haiku" else (1, 1)
            kept.copy_((0.9 * kept * weight + 0.1 * new.detach()) / total)
    x = centred / (variance.view(column) + 1e-5).sqrt()
    if f"{name}.weight" in p:
        x = x * p[f"{name}.weight"].view(column)
    return x + p[f"{name}.bias"].view(column) if f"{name}.bias" in p else x


# Heads: for each layer, whether the linear layer has a bias, and what the batch norm behind it has
AFFINE, SCALE, PLAIN, NONE = ("weight", "bias"), ("weight",), (), None


def simclr_layers(count: int):
    """Version 1 has 2 layers, version 2 has 3; the last norm has a scale alone."""
    return [(False, AFFINE)] * (count - 1) + [(False, SCALE)]


BYOL_LAYERS = [(True, AFFINE), (False, NONE)]  # projector and predictor
SIMSIAM_PROJECTOR = [(False, AFFINE), (False, AFFINE), (True, PLAIN)]
SIMSIAM_PREDICTOR = [(False, AFFINE), (True, NONE)]
BARLOW_LAYERS = [(False, AFFINE), (False, AFFINE), (False, NONE)]
VICREG_LAYERS = [(True, AFFINE), (True, AFFINE), (False, NONE)]


def head(p: Tensors, names: Names, x: Tensor, running: str = "torch") -> Tensor:
    """Linear layers, each with its batch norm, and ReLU behind all but the last."""
    for i, (name, norm) in enumerate(names):
        x = linear(p, name, x)
        x = x if norm is None else batch_norm(p, norm, x, running)
        x = x.relu() if i < len(names) - 1 else x
    return x


def check_head(p: Tensors, names: Names, layers, fixed: Collection[str] = ()):
    """Raise ValueError unless p has the tensors of these layers; an offset too many may be there if zero and fixed."""
    if len(names) != len(layers):
        raise ValueError(f"the head has {len(layers)} layers, but {len(names)} were named")
    for (name, norm), (has_bias, has) in zip(names, layers):
        if (f"{name}.bias" in p) != has_bias:
            raise ValueError(f"{name} must have {'a' if has_bias else 'no'} bias")
        if (norm is None) != (has is NONE):
            raise ValueError(f"behind {name} comes {'no' if has is NONE else 'a'} batch norm, but {norm} was named")
        for key in AFFINE if norm else ():
            there = f"{norm}.{key}" in p
            if there and key == "bias" and f"{norm}.bias" in fixed and not p[f"{norm}.bias"].any():
                there = "bias" in has
            if there != (key in has):
                raise ValueError(f"{norm} must have {'a' if key in has else 'no'} {key}")


# Losses


def unit(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Rows of length 1; `eps` bounds the squared length from below."""
    return x / x.square().sum(1, keepdim=True).clamp(min=eps).sqrt()


def ntxent_rows(z1: Tensor, z2: Tensor, tau: float) -> Tensor:
    """The loss of each image [N]: cross entropies of its two rows among the 2N − 1 others, added."""
    n, z = len(z1), unit(torch.cat([z1, z2]))
    logits = (z @ z.T / tau).masked_fill(torch.eye(2 * n, dtype=torch.bool), -math.inf)
    rows = logits.logsumexp(1) - logits.diagonal(n).repeat(2)
    return rows[:n] + rows[n:]


def ntxent(z1: Tensor, z2: Tensor, tau: float) -> Tensor:
    """SimCLR's loss of raw embeddings [N, D], as the code has it: twice the paper's mean over 2N rows."""
    return ntxent_rows(z1, z2, tau).mean()


def byol(p1: Tensor, p2: Tensor, t1: Tensor, t2: Tensor) -> Tensor:
    """Squared distances of the unit predictions from the other view's unit target: 0 … 8."""
    t1, t2 = t1.detach(), t2.detach()
    return sum((unit(p) - unit(t)).square().sum(1).mean() for p, t in ((p1, t2), (p2, t1)))


def simsiam(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Minus the mean cosine of predictions and the other view's embedding."""
    pairs = ((p1, z2.detach()), (p2, z1.detach()))
    return -sum((unit(p, 1e-16) * unit(z, 1e-16)).sum(1).mean() for p, z in pairs) / 2


def correlation(z1: Tensor, z2: Tensor, batch_size: int | None = None, p: Tensors | None = None, bn="bn") -> Tensor:
    """c [D, D]: both views through one batch norm without affine, divided by the nominal batch size."""
    z1, z2 = (batch_norm(p or {}, bn, z) for z in (z1, z2))
    return z1.T @ z2 / (batch_size or len(z1))


def barlow(c: Tensor, lambd: float = 0.0051) -> Tensor:
    """Sums over the diagonal and outside it, not divided by the number of dimensions."""
    outside = ~torch.eye(len(c), dtype=torch.bool)
    return (c.diagonal() - 1).square().sum() + lambd * c[outside].square().sum()


def vicreg_terms(x: Tensor, y: Tensor, batch_size: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Invariance (mean over rows and D), variance (half of each branch) and covariance (both branches), unweighted."""
    std = cov = 0
    for z in (x, y):
        z = z - z.mean(0)
        deviation = (z.square().sum(0) / (len(z) - 1) + 1e-4).sqrt()
        std = std + (1 - deviation).relu().mean() / 2
        c = z.T @ z / ((batch_size or len(z)) - 1)
        cov = cov + (c.square().sum() - c.diagonal().square().sum()) / len(c)
    return (x - y).square().mean(), std, cov


def vicreg(x: Tensor, y: Tensor, coefficients=(25.0, 25.0, 1.0), batch_size: int | None = None) -> Tensor:
    return sum(weight * term for weight, term in zip(coefficients, vicreg_terms(x, y, batch_size)))


# Optimizers: the new value of one tensor. `state` is a dict of its own for each tensor, `options` its `Optimizer`;
# `excluded` tensors have neither weight decay nor a trust ratio.


def sgd(p: Tensor, gradient: Tensor, lr: float, state: dict, options: "Optimizer", excluded: bool) -> Tensor:
    gradient = gradient if excluded else gradient + options.weight_decay * p
    state["v"] = options.momentum * state.get("v", 0) + gradient
    return p - lr * state["v"]


def trusted(p: Tensor, gradient: Tensor, options: "Optimizer") -> Tensor:
    """The decayed gradient, as long as 0.001 times the tensor; as it is where one of them is zero."""
    gradient = gradient + options.weight_decay * p
    length, size = gradient.norm(), p.norm()
    return gradient * (options.trust * size / length) if size > 0 and length > 0 else gradient


def lars_a(p: Tensor, gradient: Tensor, lr: float, state: dict, options: "Optimizer", excluded: bool) -> Tensor:
    """BYOL, Barlow Twins, VICReg: the learning rate multiplies the momentum."""
    gradient = gradient if excluded else trusted(p, gradient, options)
    state["v"] = options.momentum * state.get("v", 0) + gradient
    return p - lr * state["v"]


def lars_b(p: Tensor, gradient: Tensor, lr: float, state: dict, options: "Optimizer", excluded: bool) -> Tensor:
    """SimCLR: the learning rate is in the momentum."""
    gradient = gradient if excluded else trusted(p, gradient, options)
    state["v"] = options.momentum * state.get("v", 0) + lr * gradient
    return p - state["v"]


def lars_c(p: Tensor, gradient: Tensor, lr: float, state: dict, options: "Optimizer", excluded: bool) -> Tensor:
    """LARC around SGD: without decay and trust ratio where the tensor or its gradient is zero."""
    length, size, decay = gradient.norm(), p.norm(), options.weight_decay
    if not excluded and size > 0 and length > 0:
        gradient = (gradient + decay * p) * options.trust * size / (length + decay * size + 1e-8)
    state["v"] = options.momentum * state.get("v", 0) + gradient
    return p - lr * state["v"]


class Optimizer(NamedTuple):
    rule: Callable  # sgd, lars_a, lars_b or lars_c
    lr: Callable[[int, str], float]  # of the step and the tensor's name
    weight_decay: float = 0.0
    excluded: Collection[str] = ()  # names of tensors
    momentum: float = 0.9
    trust: float = 0.001


def vectors(tensors: Tensors) -> set[str]:
    """Names of the tensors that Barlow Twins and VICReg exclude: those with one dimension."""
    return {name for name, x in tensors.items() if x.ndim == 1}


# Schedules: learning rates of a step


def cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * min(progress, 1))) / 2


def warmup_cosine(step: float, peak: float, warmup: int, total: int, end: float = 0.0) -> float:
    """From 0 to `peak` in `warmup` steps, then along a cosine to `end`."""
    if step < warmup:
        return peak * step / warmup
    q = cosine((step - warmup) / (total - warmup))
    return peak * q + end * (1 - q)


def simclr_lr(step, base, batch, images, epochs, warmup_epochs=10, scaling="linear") -> float:
    peak = base * math.sqrt(batch) if scaling == "sqrt" else base * batch / 256
    return warmup_cosine(step, peak, round(warmup_epochs * images // batch), images * epochs // batch + 1)


def byol_lr(step, base, batch, warmup, total) -> float:
    return warmup_cosine(step, base * batch / 256, warmup, total)


def byol_tau(step, base, total) -> float:
    return 1 - (1 - base) * cosine(step / total)


def simsiam_lr(step, base, batch, epochs, steps_per_epoch) -> tuple[float, float]:
    """Of the encoder, constant within an epoch, and of the predictor, which is fixed."""
    peak = base * batch / 256
    return peak * cosine(step // steps_per_epoch / epochs), peak


def barlow_lr(step, batch, epochs, steps_per_epoch, warmup_epochs=10, bases=(0.2, 0.0048)) -> tuple[float, ...]:
    """Of weights, and of biases and norms."""
    warmup, total = warmup_epochs * steps_per_epoch, epochs * steps_per_epoch
    q = warmup_cosine(step, batch / 256, warmup, total, end=batch / 256 * 0.001)
    return tuple(base * q for base in bases)


def vicreg_lr(step, base, batch, epochs, steps_per_epoch, warmup_epochs=10) -> float:
    return barlow_lr(step, batch, epochs, steps_per_epoch, warmup_epochs, (base,))[0]


def choose(pair: Callable[[int], Sequence[float]], second: Collection[str]) -> Callable[[int, str], float]:
    """A learning rate for `Optimizer` from two: the second one for the tensors named."""
    return lambda step, name: pair(step)[name in second]


# Runs


class Replay(NamedTuple):
    losses: list[Tensor]
    gradients: list[Tensors]  # of each step, by name; without weight decay
    tensors: Tensors  # the state after the last step


def part(p: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): x for name, x in p.items() if name.startswith(prefix)}


def double(x: Tensor) -> Tensor:
    return x.detach().to(torch.float64, copy=True) if x.is_floating_point() else x.detach().clone()


def train(p, batches, loss_of, optimizer, fixed=(), after_step=lambda p, step: None) -> Replay:
    """Train p: the loss `loss_of(p, batch)`, one update of each trained tensor, then `after_step(p, step)`."""
    trained = [name for name in p if name not in fixed and not name.endswith(BUFFERS)]
    losses, gradients, states = [], [], {name: {} for name in trained}
    for step, batch in enumerate(batches):
        for name in trained:
            p[name] = p[name].detach().requires_grad_()
        loss = loss_of(p, [double(x) for x in batch])
        found = dict(zip(trained, torch.autograd.grad(loss, [p[name] for name in trained])))
        for name, gradient in found.items():
            lr, excluded = optimizer.lr(step, name), name in optimizer.excluded
            p[name] = optimizer.rule(p[name].detach(), gradient, lr, states[name], optimizer, excluded)
        after_step(p, step)
        losses.append(loss.detach())
        gradients.append(found)
    return Replay(losses, gradients, p)


def run_simclr(
    tensors, batches, *, backbone, projector, tau, optimizer, fixed=(), running="torch", loss_scale=1.0, joint=True
) -> Replay:
    """Both views go through the network as one batch of 2N, as in the code; each alone where not `joint`.

    `loss_scale` 0.5 gives the paper's loss.
    """
    p = {name: double(x) for name, x in tensors.items()}
    check_head(p, projector, simclr_layers(len(projector)), fixed)

    def embed(p, images):
        return head(p, projector, backbone(p, images), running)

    def loss_of(p, views):
        z1, z2 = embed(p, torch.cat(views)).chunk(2) if joint else (embed(p, x) for x in views)
        return loss_scale * ntxent(z1, z2, tau)

    return train(p, batches, loss_of, optimizer, fixed)


def run_byol(
    tensors, batches, *, backbone, projector, predictor, tau, optimizer, fixed=(), running="torch",
    online="online.", target="target.", classifier=None,
) -> Replay:  # fmt: skip
    """`tau(step)` is the target's momentum coefficient; it is used after the step's update.

    `online` and `target` are the prefixes of the two networks' names ("" for the online network is allowed); names of
    heads and those that the backbone reads are without them. With `classifier`, the name of a linear layer of the
    online network, batches are (view 1, view 2, labels) and the losses include its cross entropy on view 1.
    """
    p = {name: double(x) for name, x in tensors.items()}
    fixed = {*fixed, *(name for name in p if name.startswith(target))}
    averaged = [name for name in part(p, target) if not name.endswith(BUFFERS)]
    check_head(part(p, online), projector, BYOL_LAYERS)
    check_head(part(p, target), projector, BYOL_LAYERS)
    check_head(part(p, online), predictor, BYOL_LAYERS)

    def project(network, images):
        features = backbone(network, images)
        return features, head(network, projector, features, running)

    def loss_of(p, batch):
        predictions, targets, loss = [], [], 0
        for i, images in enumerate(batch[:2]):
            network, other = part(p, online), part(p, target)
            features, z = project(network, images)
            predictions.append(head(network, predictor, z, running))
            if classifier is not None and i == 0:
                logits, labels = linear(network, classifier, features.detach()), batch[2]
                loss = (logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]).mean()
            with torch.no_grad():
                targets.append(project(other, images)[1])
                if f"{predictor[0][0]}.weight" in other:  # its prediction is not used, but its norm sees the batch
                    head(other, predictor, targets[-1], running)
        return byol(*predictions, *targets) + loss

    def average(p, step):
        for name in averaged:
            p[target + name] += (1 - tau(step)) * (p[online + name] - p[target + name])

    return train(p, batches, loss_of, optimizer, fixed, average)


def run_simsiam(tensors, batches, *, backbone, projector, predictor, optimizer, fixed=(), running="torch") -> Replay:
    """The bias of the projector's last layer stays at its initial value."""
    p = {name: double(x) for name, x in tensors.items()}
    check_head(p, projector, SIMSIAM_PROJECTOR)
    check_head(p, predictor, SIMSIAM_PREDICTOR)

    def loss_of(p, views):
        z1, z2 = (head(p, projector, backbone(p, x), running) for x in views)
        p1, p2 = (head(p, predictor, z, running) for z in (z1, z2))
        return simsiam(p1, p2, z1, z2)

    return train(p, batches, loss_of, optimizer, {*fixed, f"{projector[-1][0]}.bias"})


def run_barlow(
    tensors, batches, *, backbone, projector, optimizer, bn="bn", lambd=0.0051, batch_size=None, ranks=1, fixed=(),
    running="torch",
) -> Replay:  # fmt: skip
    """`batch_size` divides c where the last batch is smaller; None stands for the number of rows.

    `ranks` divides the gradient, as in the code: c is summed over ranks outside autograd, then gradients are averaged.
    """
    p = {name: double(x) for name, x in tensors.items()}
    check_head(p, projector, BARLOW_LAYERS)

    def loss_of(p, views):
        z1, z2 = (head(p, projector, backbone(p, x), running) for x in views)
        loss = barlow(correlation(z1, z2, batch_size, p, bn), lambd)
        return loss.detach() + (loss - loss.detach()) / ranks  # the value of the loss, and the gradient divided

    return train(p, batches, loss_of, optimizer, fixed)


def run_vicreg(
    tensors, batches, *, backbone, projector, optimizer, coefficients=(25.0, 25.0, 1.0), batch_size=None, fixed=(),
    running="torch",
) -> Replay:  # fmt: skip
    """`coefficients` of invariance, variance and covariance; (25, 50, 1) gives the paper's variance term."""
    p = {name: double(x) for name, x in tensors.items()}
    check_head(p, projector, VICREG_LAYERS)

    def loss_of(p, views):
        x, y = (head(p, projector, backbone(p, x), running) for x in views)
        return vicreg(x, y, coefficients, batch_size)

    return train(p, batches, loss_of, optimizer, fixed)
