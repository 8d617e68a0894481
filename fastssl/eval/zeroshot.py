"""Zero-shot classification: an image gets the class whose sentences are nearest to it."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import all_gather_object, rank, world_size
from fastssl.text import printable

from .features import all_gather_uneven
from .knn import nearest
from .labels import Accuracy
from .prompts import PLACE
from .texts import BATCH, Row, Texts


def build_prompts(names: Sequence[str], templates: Sequence[str], texts: Texts) -> list[list[Row]]:
    """Tokens of every template about every class: C lists of T rows.

    Raises:
        ValueError: two classes have the same tokens in every template: no image could tell them apart.
    """
    prompts = [[texts.encode(template.replace(PLACE, name)) for template in templates] for name in names]
    known: dict[tuple[Row, ...], int] = {}
    for number, rows in enumerate(prompts):
        before = known.setdefault(tuple(rows), number)
        if before != number:
            same, name = printable(names[before][:60]), printable(names[number][:60])
            raise ValueError(
                f'eval zeroshot: classes must differ in their names, got "{same}" for class {before} and "{name}" for '
                f"class {number}, equal tokens to the method (tokenizer {texts.text.tokenizer}, at most "
                f"{texts.text.length} a text): tell them apart in --classes FILE"
            )
    return prompts


@torch.no_grad()
def class_features(
    embed_text: Callable[[Tensor], Tensor],
    prompts: Sequence[Sequence[Row]],
    texts: Texts,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Unit vectors [C, D] float32 of classes: the unit mean of the unit vectors of their sentences.

    On several ranks each embeds its part of the classes, and all get all of them.

    Args:
        embed_text: tokens [B, L] → unit vectors [B, D].
        prompts: C lists of T rows, see `build_prompts`.
        texts: makes batches of rows.
        device: device of the tokens.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, section
    3.1.4.
    """
    count, number, world = len(prompts), rank(), world_size()
    mine = prompts[number * count // world : (number + 1) * count // world]
    each = max(1, BATCH // len(prompts[0]))  # classes a pass
    groups = [mine[start : start + each] for start in range(0, len(mine), each)] or [mine]
    means = []
    for group in groups:
        vectors = texts.embed(embed_text, [row for rows in group for row in rows], device)
        means.append(F.normalize(vectors.view(len(group), len(prompts[0]), -1), dim=2).mean(1) if group else vectors)
    return all_gather_uneven(F.normalize(torch.cat(means), dim=1))


@torch.no_grad()
def zeroshot_accuracy(images: Tensor, labels: Tensor, classes: Tensor) -> Accuracy:
    """Accuracy of the classes nearest to images; among equally near ones the smaller label comes first.

    On several ranks each passes its part of the images, which may be empty, and all get the accuracy of the whole.

    Args:
        images: vectors [N, D]. labels: [N] int64.
        classes: vectors [C, D] of the classes of labels 0, 1, ….

    Raises:
        ValueError: no images, or vectors that are not finite.
    """
    finite = bool(images.isfinite().all() and classes.isfinite().all())
    right = nearest(classes, images, 5) == labels[:, None]
    top1, top5, counts, all_finite = zip(
        *all_gather_object((int(right[:, :1].sum()), int(right.sum()), len(images), finite))
    )
    if not all(all_finite) or not sum(counts):
        detail = "" if all(all_finite) else ", some of which are not"
        raise ValueError(f"eval zeroshot: features must be finite, got those of {sum(counts)} images{detail}")
    return Accuracy(sum(top1) / sum(counts), sum(top5) / sum(counts) if len(classes) > 5 else None)
