"""The losses over prototypes and memory banks that benchmarks/memory.py measures, as memory_cases.py has the others.

References multiply their features with the prototypes first, as their heads do, and ours takes the features. Both give
gradients to the student's features and prototypes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.methods.swav import SwAV
from fastssl.nn import DINOLoss, IBOTPatchLoss
from fastssl.nn.heads import FactoredLogits
from fastssl.ops import sampled_info_nce, sampled_nce

from .harness import forward_backward
from .memory_cases import Case, leaves, unit

TEACHER_TAU, STUDENT_TAU = 0.04, 0.1


def prototype_inputs(students: int, teachers: int, width: int, prototypes: int) -> tuple[Tensor, ...]:
    """Features of student and teacher, and the prototypes of both."""
    student, weight = leaves((students, width), (prototypes, width))
    return student, weight, unit(teachers, width), unit(prototypes, width)


def dino_reference(images: int, crops: int, width: int, prototypes: int) -> Callable:
    """DINO's code: a softmax of the teacher, and a log-softmax for each pair of crops."""
    student, weight, teacher, teacher_weight = prototype_inputs(crops * images, 2 * images, width, prototypes)
    centre = torch.zeros(1, prototypes)

    def loss():
        views = (student @ weight.T / STUDENT_TAU).chunk(crops)
        targets = ((teacher @ teacher_weight.T - centre) / TEACHER_TAU).softmax(-1).chunk(2)
        total, pairs = 0.0, 0
        for i, target in enumerate(targets):
            for j, view in enumerate(views):
                if i != j:
                    total, pairs = total - (target * view.log_softmax(-1)).sum(-1).mean(), pairs + 1
        return total / pairs

    return forward_backward(loss, student, weight)


def dino_ours(images: int, crops: int, width: int, prototypes: int) -> Callable:
    student, weight, teacher, teacher_weight = prototype_inputs(crops * images, 2 * images, width, prototypes)
    criterion, theirs = DINOLoss(prototypes), FactoredLogits(teacher, teacher_weight)
    return forward_backward(
        lambda: criterion.cross_entropy(theirs, FactoredLogits(student, weight), TEACHER_TAU), student, weight
    )


def masked(images: int, patches: int, share: int) -> Tensor:
    """[images, patches] bool, True for one in `share` patches of each image."""
    return (torch.arange(patches) % share == 0).expand(images, patches)


def ibot_reference(images: int, patches: int, share: int, width: int, prototypes: int) -> Callable:
    """iBOT's code: scores of all patches of both large crops, of which the masked ones count."""
    student, weight, teacher, teacher_weight = prototype_inputs(*(2 * [2 * images * patches]), width, prototypes)
    mask, centre = masked(2 * images, patches, share).float(), torch.zeros(1, prototypes)

    def loss():
        views = (student @ weight.T / STUDENT_TAU).unflatten(0, (2, images, patches))
        targets = ((teacher @ teacher_weight.T - centre) / TEACHER_TAU).softmax(-1).unflatten(0, (2, images, patches))
        total = 0.0
        for view, target, seen in zip(views, targets, mask.unflatten(0, (2, images))):
            losses = -(target * view.log_softmax(-1)).sum(-1)
            total = total + ((losses * seen).sum(-1) / seen.sum(-1).clamp(min=1)).mean()
        return total / 2

    return forward_backward(loss, student, weight)


def ibot_ours(images: int, patches: int, share: int, width: int, prototypes: int) -> Callable:
    """The features of all patches are given, and those of masked ones are taken from them."""
    student, weight, teacher, teacher_weight = prototype_inputs(*(2 * [2 * images * patches]), width, prototypes)
    mask, criterion = masked(2 * images, patches, share), IBOTPatchLoss(prototypes)
    weights = (mask.float() / mask.sum(1, keepdim=True))[mask] / len(mask)
    rows = mask.flatten().nonzero().flatten()

    def loss():
        theirs = FactoredLogits(teacher[rows], teacher_weight)
        return criterion.cross_entropy(theirs, FactoredLogits(student[rows], weight), weights, TEACHER_TAU)

    return forward_backward(loss, student, weight)


def dinov2_reference(rows: int, width: int, prototypes: int) -> Callable:
    """DINOv2's code without xformers: scores of the masked patches alone."""
    student, weight, teacher, teacher_weight = prototype_inputs(rows, rows, width, prototypes)
    centre = torch.zeros(1, prototypes)

    def loss():
        target = ((teacher @ teacher_weight.T - centre) / TEACHER_TAU).softmax(-1)
        return -(target * (student @ weight.T / STUDENT_TAU).log_softmax(-1)).sum(-1).mean()

    return forward_backward(loss, student, weight)


def dinov2_ours(rows: int, width: int, prototypes: int) -> Callable:
    student, weight, teacher, teacher_weight = prototype_inputs(rows, rows, width, prototypes)
    criterion, weights = IBOTPatchLoss(prototypes), torch.full((rows,), 1 / rows)
    theirs = FactoredLogits(teacher, teacher_weight)
    return forward_backward(
        lambda: criterion.cross_entropy(theirs, FactoredLogits(student, weight), weights, TEACHER_TAU), student, weight
    )


def swav_reference(images: int, crops: int, width: int, prototypes: int) -> Callable:
    """SwAV's code: scores of all crops, and Sinkhorn-Knopp of the matrix of those of a large crop."""
    z, weight = leaves((crops * images, width), (prototypes, width))

    def codes(scores: Tensor) -> Tensor:
        q = (scores / 0.05).exp().T
        q = q / q.sum()
        for _ in range(3):
            q = q / q.sum(1, keepdim=True) / prototypes
            q = q / q.sum(0, keepdim=True) / images
        return (q * images).T

    def loss():
        scores, total = (z @ weight.T).chunk(crops), 0.0
        for i in range(2):
            with torch.no_grad():
                target = codes(scores[i].detach())
            losses = [-(target * (s / 0.1).log_softmax(1)).sum(1).mean() for j, s in enumerate(scores) if j != i]
            total = total + torch.stack(losses).mean()
        return total / 2

    return forward_backward(loss, z, weight)


def swav_ours(images: int, crops: int, width: int, prototypes: int) -> Callable:
    z, weight = leaves((crops * images, width), (prototypes, width))
    method = SwAV(nn.Identity(), nn.Identity(), nn.Linear(width, prototypes, bias=False))
    method.prototypes.weight = nn.Parameter(weight.detach())
    parameters = (z, method.prototypes.weight)
    return forward_backward(lambda: method.swapped_prediction(z.unflatten(0, (crops, images))), *parameters)


def bank_inputs(images: int, drawn: int, width: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, the bank, and drawn rows with the positive's first."""
    (q,), bank = leaves((images, width)), unit(length, width)
    return q, bank, torch.randint(length, (images, 1 + drawn))


def instdisc_reference(images: int, drawn: int, width: int, length: int) -> Callable:
    """InstDisc's code: noise-contrastive estimation with gathered rows."""
    q, bank, indices = bank_inputs(images, drawn, width, length)
    noise = drawn / length

    def loss():
        rows = bank.index_select(0, indices.flatten()).view(images, 1 + drawn, width)
        p = ((rows @ q[:, :, None])[:, :, 0] / 0.07).exp() / length
        positive = (p[:, 0] / (p[:, 0] + noise + 1e-7)).log()
        return -(positive.sum() + (noise / (p[:, 1:] + noise + 1e-7)).log().sum()) / images

    return forward_backward(loss, q)


def instdisc_ours(images: int, drawn: int, width: int, length: int) -> Callable:
    q, bank, indices = bank_inputs(images, drawn, width, length)
    return forward_backward(lambda: sampled_nce(q, bank, indices, 0.07, float(length)).loss.mean(), q)


def cmc_reference(images: int, drawn: int, width: int, length: int) -> Callable:
    """CMC's code with softmax: each channel's query with rows of the other's bank, and the same draws."""
    (l_query, ab_bank, indices), (ab_query, l_bank, _) = (bank_inputs(images, drawn, width, length) for _ in range(2))
    labels = torch.zeros(images, dtype=torch.int64)

    def loss():
        total = 0.0
        for q, bank in ((l_query, ab_bank), (ab_query, l_bank)):
            rows = bank.index_select(0, indices.flatten()).view(images, 1 + drawn, width)
            total = total + F.cross_entropy((rows @ q[:, :, None])[:, :, 0] / 0.07, labels)
        return total

    return forward_backward(loss, l_query, ab_query)


def cmc_ours(images: int, drawn: int, width: int, length: int) -> Callable:
    (l_query, ab_bank, indices), (ab_query, l_bank, _) = (bank_inputs(images, drawn, width, length) for _ in range(2))
    pairs = (l_query, ab_bank), (ab_query, l_bank)
    return forward_backward(
        lambda: sum(sampled_info_nce(q, bank, indices, 0.07).loss.mean() for q, bank in pairs), l_query, ab_query
    )


PROTOTYPES_AND_BANKS = [
    Case(
        "`nn.DINOLoss` (`ops.soft_cross_entropy`)",
        ("dino",),
        "64 images, 10 crops, K 65,536, width 256",
        (64, 10, 256, 65536),
        (4, 4, 16, 2048),
        dino_reference,
        dino_ours,
    ),
    Case(
        "`nn.IBOTPatchLoss` (`ops.soft_cross_entropy`)",
        ("ibot",),
        "2 × 64 crops of 196 patches, one in 7 masked, K 8,192, width 256",
        (64, 196, 7, 256, 8192),
        (4, 28, 7, 16, 512),
        ibot_reference,
        ibot_ours,
    ),
    Case(
        "`nn.IBOTPatchLoss` (`ops.soft_cross_entropy`)",
        ("dinov2",),
        "3,726 masked patches, K 65,536, width 256",
        (3726, 256, 65536),
        (64, 16, 1024),
        dinov2_reference,
        dinov2_ours,
    ),
    Case(
        "`nn.SinkhornKnopp`'s potentials, `ops.soft_cross_entropy`",
        ("swav",),
        "512 images, 8 crops, K 3,000, D 128",
        (512, 8, 128, 3000),
        (16, 4, 16, 100),
        swav_reference,
        swav_ours,
    ),
    Case(
        "`ops.sampled_nce`",
        ("instdisc",),
        "256 images, 4,096 drawn of 100,000, D 128",
        (256, 4096, 128, 100_000),
        (16, 64, 32, 1000),
        instdisc_reference,
        instdisc_ours,
    ),
    Case(
        "`ops.sampled_info_nce`",
        ("cmc",),
        "256 images, 2 × 16,384 drawn of 100,000, D 128",
        (256, 16384, 128, 100_000),
        (16, 64, 32, 1000),
        cmc_reference,
        cmc_ours,
    ),
]
