"""SwAV and DeepCluster-v2 in plain torch: a reference for whole training runs.

Written from the paper (Caron et al., 2020) and from what the official code does, without the methods of this package.
tests/methods/test_swav.py and test_deepcluster.py prove both by the golden numbers. Layers and LARC
are those of transcription_family.py. All computes in float64.

`run_swav` and `run_deepcluster` share these arguments:

- `tensors`: the initial state under any names; it is copied.
- `batches`: the crops of each step, large ones first; crops of one size follow each other. DeepCluster-v2's are pairs
  (index of the images, crops).
- `backbone(tensors, images)`: features [N, D] of the crops of one size.
- `projector`: names of (first linear layer, its batch norm, second linear layer).
- `optimizer`: an `Optimizer` of transcription_family.
"""

import torch
from torch import Tensor

from tests.methods.transcription_family import BUFFERS, Optimizer, Replay, Tensors, batch_norm, double, linear, unit

ASSIGNED = 2  # the large crops


def sinkhorn(scores: Tensor, epsilon: float, rounds: int) -> Tensor:
    """Codes [B, K]: exp, then alternately equal sums of the prototypes and of the samples."""
    q = (scores / epsilon).exp().T
    q = q / q.sum()
    k, b = q.shape
    for _ in range(rounds):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / b
    return (q * b).T


def embed(p: Tensors, crops: list[Tensor], backbone, projector) -> Tensor:
    """Unit embeddings [V·B, D]: the backbone sees the crops of one size together, the projector all crops."""
    groups: list[list[Tensor]] = []
    for crop in crops:
        if groups and groups[-1][0].shape[2:] == crop.shape[2:]:
            groups[-1].append(crop)
        else:
            groups.append([crop])
    features = torch.cat([backbone(p, torch.cat(group)) for group in groups])
    first, norm, second = projector
    return unit(linear(p, second, batch_norm(p, norm, linear(p, first, features)).relu()))


def swapped_loss(scores: list[Tensor], codes: list[Tensor], tau: float) -> Tensor:
    """Each code is predicted from all crops but its own."""
    total = 0
    for own, code in enumerate(codes):
        for crop, logits in enumerate(scores):
            if crop != own:
                log_p = logits / tau - (logits / tau).logsumexp(1, keepdim=True)
                total = total - (code * log_p).sum(1).mean()
    return total / (len(scores) - 1) / len(codes)


def update(p: Tensors, gradients: Tensors, states: dict, optimizer: Optimizer, step: int) -> None:
    for name, gradient in gradients.items():
        lr, excluded = optimizer.lr(step, name), name in optimizer.excluded
        p[name] = optimizer.rule(p[name].detach(), gradient, lr, states.setdefault(name, {}), optimizer, excluded)


def run_swav(
    tensors, batches, *, backbone, projector, optimizer, prototypes="prototypes.weight", tau=0.1, epsilon=0.05,
    rounds=3, queue=0, queue_start=0, frozen=0, codes_of_steps=None,
) -> Replay:  # fmt: skip
    """`queue` rows a large crop from step `queue_start` on; prototypes have no gradient in the first `frozen` steps.

    `codes_of_steps`, a list, gets the codes of each step.
    """
    p = {name: double(x) for name, x in tensors.items()}
    trained = [name for name in p if not name.endswith(BUFFERS)]
    memory, states, losses, gradients = None, {}, [], []
    for step, crops in enumerate(batches):
        p[prototypes] = unit(p[prototypes].detach(), eps=0)
        if queue and step == queue_start:
            memory = torch.zeros(ASSIGNED, queue, p[prototypes].shape[1], dtype=torch.float64)
        for name in trained:
            p[name] = p[name].detach().requires_grad_()
        crops = [double(x) for x in crops]
        size, z = len(crops[0]), embed(p, crops, backbone, projector)
        scores, codes = list((z @ p[prototypes].T).split(size)), []
        for i in range(ASSIGNED):
            rows = scores[i].detach()
            if memory is not None:
                if memory[i, -1].any():
                    rows = torch.cat([memory[i] @ p[prototypes].detach().T, rows])
                memory[i] = torch.cat([z[i * size : (i + 1) * size].detach(), memory[i, :-size]])
            codes.append(sinkhorn(rows, epsilon, rounds)[-size:])
        loss = swapped_loss(scores, codes, tau)
        found = dict(zip(trained, torch.autograd.grad(loss, [p[name] for name in trained])))
        if step < frozen:
            found.pop(prototypes)
        update(p, found, states, optimizer, step)
        losses.append(loss.detach())
        gradients.append(found)
        if codes_of_steps is not None:
            codes_of_steps.append(codes)
    return Replay(losses, gradients, p)


def k_means(x: Tensor, centroids: Tensor, rounds: int = 10) -> tuple[Tensor, Tensor]:
    """(centroids, nearest centroid of each row) of spherical k-means; one without rows stays where it is."""
    for _ in range(rounds):
        nearest = (x @ centroids.T).argmax(1)
        for k in range(len(centroids)):
            members = x[nearest == k]
            if len(members):
                centroids = torch.cat([centroids[:k], members.mean(0, keepdim=True), centroids[k + 1 :]])
        centroids = unit(centroids, eps=0)
    return centroids, (x @ centroids.T).argmax(1)


def run_deepcluster(
    tensors, batches, *, backbone, projector, optimizer, images, heads, epoch_length, tau=0.1, rounds=10,
    prototypes="prototypes.prototypes{}.weight", memory=None,
) -> Replay:  # fmt: skip
    """`heads` heads; every `epoch_length` steps the memory is clustered, from rows that torch.randperm draws.

    `memory` is (embeddings [2, rows, D], image of each row). None fills it in a pass over the first epoch, one large
    crop at a time, in training mode. `images` is the number of images.
    """
    p = {name: double(x) for name, x in tensors.items()}
    heads_names = [prototypes.format(head) for head in range(heads)]
    trained = [name for name in p if not name.endswith(BUFFERS) and name not in heads_names]
    states, losses, gradients = {}, [], []
    if memory is None:
        parts: list[list[Tensor]] = [[], []]
        for _, crops in batches[:epoch_length]:
            for i in range(ASSIGNED):
                parts[i].append(embed(p, [double(crops[i])], backbone, projector).detach())
        memory = torch.stack([torch.cat(x) for x in parts]), torch.cat([i for i, _ in batches[:epoch_length]])
    stored, numbers = memory[0].double().clone(), memory[1].clone()
    for step, (index, crops) in enumerate(batches):
        if step % epoch_length == 0:
            labels = torch.full((heads, images), -100)
            for head, name in enumerate(heads_names):
                rows = stored[head % ASSIGNED]
                first = torch.randperm(len(rows))[: len(p[name])]
                p[name], nearest = k_means(rows, rows[first], rounds)
                labels[head, numbers] = nearest
        for name in trained:
            p[name] = p[name].detach().requires_grad_()
        crops = [double(x) for x in crops]
        z = embed(p, crops, backbone, projector)
        loss = 0
        for head, name in enumerate(heads_names):
            logits, wanted = z @ p[name].T / tau, labels[head, index].repeat(len(crops))
            log_p = logits - logits.logsumexp(1, keepdim=True)
            known = wanted >= 0
            loss = loss - log_p[known].gather(1, wanted[known, None]).mean() / heads
        found = dict(zip(trained, torch.autograd.grad(loss, [p[name] for name in trained])))
        update(p, found, states, optimizer, step)
        start, size = step % epoch_length * len(index), len(index)
        numbers[start : start + size] = index
        stored[:, start : start + size] = torch.stack(z.detach().split(size)[:ASSIGNED])
        losses.append(loss.detach())
        gradients.append(found)
    p["memory"], p["memory_index"] = stored, numbers
    return Replay(losses, gradients, p)
