"""The losses that benchmarks/memory.py measures: the reference's formula in plain torch, and ours.

A maker gets the sizes of a case, makes the inputs on torch's default device, and returns a call that computes the mean
loss and the gradients.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.nn import BarlowTwinsLoss, CLIPLoss, NegativeCosineSimilarity, SigLIPLoss, VICRegLoss
from fastssl.nn.predictive import CPCLoss, DrawnCPCLoss
from fastssl.ops import batch_info_nce, dense_match, info_nce, nt_xent

from .harness import forward_backward

Maker = Callable[..., Callable[[], Any]]
TAU = 0.2


@dataclasses.dataclass(frozen=True)
class Case:
    """One loss at the size of a paper."""

    loss: str  # the public op or module
    methods: tuple[str, ...]
    size: str  # of the real inputs, in words
    real: tuple[int, ...]
    small: tuple[int, ...]  # where the reference is run as well
    reference: Maker
    ours: Maker


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [unit(*shape).requires_grad_() for shape in shapes]


def nt_xent_reference(images: int, width: int) -> Callable:
    """SimCLR's code: the logits of both views with both, the images themselves masked."""
    z1, z2 = leaves((images, width), (images, width))

    def loss():
        labels, mask = torch.arange(images, device=z1.device), torch.eye(images, device=z1.device) * 1e9
        (aa, bb), ab = (z @ z.T / TAU - mask for z in (z1, z2)), z1 @ z2.T / TAU
        ba = z2 @ z1.T / TAU
        return F.cross_entropy(torch.cat([ab, aa], 1), labels) + F.cross_entropy(torch.cat([ba, bb], 1), labels)

    return forward_backward(loss, z1, z2)


def nt_xent_ours(images: int, width: int) -> Callable:
    z1, z2 = leaves((images, width), (images, width))
    return forward_backward(lambda: 2 * nt_xent(z1, z2, TAU).mean(), z1, z2)


def batch_reference(images: int, width: int) -> Callable:
    q, keys = leaves((images, width), (images, width))
    return forward_backward(lambda: F.cross_entropy(q @ keys.T / TAU, torch.arange(images, device=q.device)), q, keys)


def batch_ours(images: int, width: int) -> Callable:
    q, keys = leaves((images, width), (images, width))
    return forward_backward(lambda: batch_info_nce(q, keys, TAU).loss.mean(), q, keys)


def queue_logits(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """MoCo's logits, against a copy of the queue."""
    return torch.cat([(q * k).sum(1, keepdim=True), q @ queue.clone().T], 1) / TAU


def queue_reference(images: int, width: int, length: int) -> Callable:
    (q,), k, queue = leaves((images, width)), unit(images, width), unit(length, width)
    labels = torch.zeros(images, dtype=torch.int64)
    return forward_backward(lambda: F.cross_entropy(queue_logits(q, k, queue), labels), q)


def queue_ours(images: int, width: int, length: int) -> Callable:
    (q,), k, queue = leaves((images, width)), unit(images, width), unit(length, width)
    return forward_backward(lambda: info_nce(q, k, queue, TAU).loss.mean(), q)


def dense_inputs(images: int, places: int, channels: int, width: int, length: int) -> tuple[Tensor, ...]:
    """Features of both backbones, dense queries and keys of all places, and the queue."""
    features = torch.randn(2, images, channels, places)
    (q,), k = leaves((images, places, width)), unit(images, places, width)
    return *features, q, k, unit(length, width)


def dense_reference(images: int, places: int, channels: int, width: int, length: int) -> Callable:
    """DenseCL's code: cosines of all places of an image, and logits [B · S, 1 + K]."""
    q_features, k_features, q, k, queue = dense_inputs(images, places, channels, width, length)
    labels = torch.zeros(images * places, dtype=torch.int64)

    def loss():
        similarity = F.normalize(q_features, dim=1).mT @ F.normalize(k_features, dim=1)
        matched = k.gather(1, similarity.argmax(2)[:, :, None].expand(-1, -1, width))
        positive = (q * matched).sum(2).view(-1, 1)
        negative = q.flatten(0, 1) @ queue.clone().T
        return F.cross_entropy(torch.cat([positive, negative], 1) / TAU, labels)

    return forward_backward(loss, q)


def dense_ours(images: int, places: int, channels: int, width: int, length: int) -> Callable:
    q_features, k_features, q, k, queue = dense_inputs(images, places, channels, width, length)

    def loss():
        match = dense_match(q_features, k_features)
        matched = k.gather(1, match[:, :, None].expand(-1, -1, width)).flatten(0, 1)
        return info_nce(q.flatten(0, 1), matched, queue, TAU).loss.mean()

    return forward_backward(loss, q)


def cpc_all_reference(images: int, side: int, width: int) -> Callable:
    """The appendix of CPC v2 for the offsets 3, 4 and 5: logits of all predictions with the places of the batch."""
    latents, context = leaves((images, side, side, width), (images, side, side, width))
    target, *heads = (torch.randn(width, 64) / width**0.5 for _ in range(4))
    place = torch.arange(images * side * side).view(images, side, side)

    def loss():
        targets, total = latents.flatten(0, 2) @ target, 0.0
        for offset, head in zip((3, 4, 5), heads):
            predictions = (context @ head)[:, :-offset].flatten(0, 2) * 0.1
            total = total + F.cross_entropy(predictions @ targets.T, place[:, offset:].flatten())
        return total

    return forward_backward(loss, latents, context)


def cpc_all_ours(images: int, side: int, width: int) -> Callable:
    latents, context = leaves((images, side, side, width), (images, side, side, width))
    criterion = CPCLoss(width).requires_grad_(False)
    channels_first = (0, 3, 1, 2)
    return forward_backward(
        lambda: criterion(latents.permute(channels_first), context.permute(channels_first)), latents, context
    )


def cpc_drawn_reference(images: int, side: int, width: int) -> Callable:
    """Greedy InfoMax's code: negatives gathered by an index that is repeated to their width, for five offsets."""
    latents, context = leaves((images, width, side, side), (images, width, side, side))
    heads = [torch.randn(width, width) / width**0.5 for _ in range(5)]

    def loss():
        total = 0.0
        for offset, head in zip((2, 3, 4, 5, 6), heads):
            targets = torch.einsum("bchw,dc->hwbd", latents[:, :, offset:], head).flatten(0, 2)
            contexts = context[:, :, :-offset].permute(2, 3, 0, 1).flatten(0, 2)
            drawn = torch.randint(len(targets), (len(targets) * 16, 1), device=latents.device).repeat(1, width)
            negatives = targets.gather(0, drawn).view(len(targets), 16, width)
            positive = (contexts * targets).sum(1, keepdim=True)
            scores = torch.cat([positive, (negatives @ contexts[:, :, None])[:, :, 0]], 1)
            total = total - torch.log(scores.softmax(1) + 1e-11)[:, 0].mean() / 5
        return total

    return forward_backward(loss, latents, context)


def cpc_drawn_ours(images: int, side: int, width: int) -> Callable:
    latents, context = leaves((images, width, side, side), (images, width, side, side))
    criterion, seeds = DrawnCPCLoss(width).requires_grad_(False), torch.arange(images)
    return forward_backward(lambda: criterion(latents, context, criterion.draw(seeds, side, side)), latents, context)


def cosine_reference(images: int, width: int) -> Callable:
    """BYOL's and SimSiam's loss of one direction."""
    (p,), z = leaves((images, width)), unit(images, width)
    return forward_backward(lambda: -F.cosine_similarity(p, z).mean(), p)


def cosine_ours(images: int, width: int) -> Callable:
    (p,), z, criterion = leaves((images, width)), unit(images, width), NegativeCosineSimilarity()
    return forward_backward(lambda: criterion(p, z), p)


def barlow_reference(images: int, width: int) -> Callable:
    """Barlow Twins' code: the correlation matrix, and its elements off the diagonal as a copy."""
    z1, z2 = leaves((images, width), (images, width))

    def loss():
        z = [(x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() for x in (z1, z2)]
        c = z[0].T @ z[1] / images
        off = c.flatten()[:-1].view(width - 1, width + 1)[:, 1:].flatten()
        return torch.diagonal(c).add(-1).pow(2).sum() + 0.0051 * off.pow(2).sum()

    return forward_backward(loss, z1, z2)


def vicreg_reference(images: int, width: int) -> Callable:
    """VICReg's code: both covariance matrices, and their elements off the diagonal as copies."""
    z1, z2 = leaves((images, width), (images, width))

    def loss():
        invariance, total = F.mse_loss(z1, z2), 0.0
        for z in (z1, z2):
            z = z - z.mean(0)
            total = total + 12.5 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
            off = (z.T @ z / (images - 1)).flatten()[:-1].view(width - 1, width + 1)[:, 1:].flatten()
            total = total + off.pow(2).sum() / width
        return 25 * invariance + total

    return forward_backward(loss, z1, z2)


def pair_inputs(pairs: int, width: int) -> tuple[Tensor, ...]:
    """Unit vectors of images and texts, and the initial scale and bias of the logits of SigLIP."""
    images, texts = leaves((pairs, width), (pairs, width))
    return images, texts, torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)


def clip_reference(pairs: int, width: int) -> Callable:
    """CLIP's code: the logits of both directions."""
    images, texts, scale, _ = pair_inputs(pairs, width)

    def loss():
        labels = torch.arange(pairs, device=images.device)
        of_images, of_texts = scale * images @ texts.T, scale * texts @ images.T
        return (F.cross_entropy(of_images, labels) + F.cross_entropy(of_texts, labels)) / 2

    return forward_backward(loss, images, texts, scale)


def clip_ours(pairs: int, width: int) -> Callable:
    images, texts, scale, _ = pair_inputs(pairs, width)
    criterion = CLIPLoss()
    return forward_backward(lambda: criterion(images, texts, scale), images, texts, scale)


def siglip_reference(pairs: int, width: int) -> Callable:
    """SigLIP's algorithm 1: all logits, and a matrix of 1 and −1."""
    inputs = images, texts, scale, bias = pair_inputs(pairs, width)

    def loss():
        logits = images @ texts.T * scale + bias
        labels = 2 * torch.eye(pairs, device=images.device) - torch.ones(pairs, pairs, device=images.device)
        return -F.logsigmoid(labels * logits).sum() / pairs

    return forward_backward(loss, *inputs)


def siglip_ours(pairs: int, width: int) -> Callable:
    inputs, criterion = pair_inputs(pairs, width), SigLIPLoss()
    return forward_backward(lambda: criterion(*inputs), *inputs)


def module_of_two(module: Callable[[], torch.nn.Module]) -> Maker:
    """A maker of one of our modules on two embeddings."""

    def make(images: int, width: int) -> Callable:
        z1, z2 = leaves((images, width), (images, width))
        criterion = module()
        return forward_backward(lambda: criterion(z1, z2), z1, z2)

    return make


NT_XENT = Case(
    "`ops.nt_xent`",
    ("simclr_v1", "simclr_v2"),
    "4,096 images, D 128",
    (4096, 128),
    (512, 128),
    nt_xent_reference,
    nt_xent_ours,
)
DENSE = Case(
    "`ops.dense_match`, `ops.info_nce`",
    ("densecl",),
    "256 images of 49 places, D 128, K 65,536",
    (256, 49, 2048, 128, 65536),
    (8, 49, 256, 128, 4096),
    dense_reference,
    dense_ours,
)
CONTRASTIVE_AND_REDUNDANCY = [
    NT_XENT,
    Case(
        "`ops.info_nce`",
        ("moco_v1", "moco_v2"),
        "256 images, D 128, K 65,536",
        (256, 128, 65536),
        (64, 128, 8192),
        queue_reference,
        queue_ours,
    ),
    Case(
        "`ops.batch_info_nce`",
        ("moco_v3",),
        "4,096 images, D 256",
        (4096, 256),
        (512, 256),
        batch_reference,
        batch_ours,
    ),
    DENSE,
    Case(
        "`nn.predictive.CPCLoss` (`ops.batch_info_nce`)",
        ("cpc",),
        "512 images of 7×7 places, C 2,048, 3 offsets",
        (512, 7, 2048),
        (16, 7, 256),
        cpc_all_reference,
        cpc_all_ours,
    ),
    Case(
        "`nn.predictive.DrawnCPCLoss` (`ops.sampled_scores`)",
        ("cpc",),
        "32 images of 7×7 places, C 1,024, 5 offsets, 16 drawn",
        (32, 7, 1024),
        (4, 7, 256),
        cpc_drawn_reference,
        cpc_drawn_ours,
    ),
    Case(
        "`nn.NegativeCosineSimilarity`",
        ("byol", "simsiam"),
        "512 images, D 2,048",
        (512, 2048),
        (64, 512),
        cosine_reference,
        cosine_ours,
    ),
    Case(
        "`nn.BarlowTwinsLoss`",
        ("barlow_twins",),
        "2,048 images, D 8,192",
        (2048, 8192),
        (64, 512),
        barlow_reference,
        module_of_two(BarlowTwinsLoss),
    ),
    Case(
        "`nn.VICRegLoss`",
        ("vicreg",),
        "2,048 images, D 8,192",
        (2048, 8192),
        (64, 512),
        vicreg_reference,
        module_of_two(VICRegLoss),
    ),
]
IMAGES_AND_TEXTS = [
    Case(
        "`nn.CLIPLoss` (`ops.batch_info_nce`)",
        ("clip",),
        "4,096 pairs, D 512",
        (4096, 512),
        (512, 256),
        clip_reference,
        clip_ours,
    ),
    *(
        Case(
            "`nn.SigLIPLoss` (`ops.pairwise_sigmoid`)",
            ("siglip",),
            f"{pairs:,} pairs, D 512",
            (pairs, 512),
            (512, 256),
            siglip_reference,
            siglip_ours,
        )
        for pairs in (4096, 32_768)
    ),
]
DEMO = [dataclasses.replace(NT_XENT, size="2 × 32,768 views, D 128", real=(32768, 128)), DENSE]
