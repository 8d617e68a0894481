"""Retrieval: the texts nearest to each image, and the images nearest to each text.

Captions that are the same text to the method's tokenizer are one text: one candidate and one query, and every image
that has it is right. An image counts with the best of its captions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl.contract import MatchesText
from fastssl.data.source import Source, Subset, read_captions
from fastssl.distributed import rank, world_size

from .features import all_gather_uneven, evaluation_loader, extract
from .knn import nearest_on_all_ranks
from .texts import Row, Texts

KS = (1, 5, 10)  # places among which a right one counts
PAIRS = 64  # pairs in one pass of a second stage
WHOLE = 1.0  # share of the sides that crops take: captions name what is at the edges


class Captions(NamedTuple):
    """The distinct texts of the images of a source."""

    texts: list[str]  # U texts, as they are first spelled
    rows: list[Row]  # their tokens
    pairs: Tensor  # [P, 2] int64: image and text of each pair that belongs together, distinct, ascending


class Retrieved(NamedTuple):
    """What was found for the images and texts of a source, the best first."""

    images: Tensor  # [N] numbers of the images that can be decoded
    captions: Captions  # of these images
    texts_of_images: Tensor  # [N, K] numbers of texts
    images_of_texts: Tensor  # [U, K] numbers of images

    @property
    def right_texts(self) -> Tensor:
        """[N, K] bool: whether a text is the image's own."""
        return _belong(self.images, self.texts_of_images, self.captions.pairs)

    @property
    def right_images(self) -> Tensor:
        """[U, K] bool: whether an image has the text."""
        texts = torch.arange(len(self.images_of_texts), device=self.images.device)
        return _belong(texts, self.images_of_texts, self.captions.pairs.flip(1))

    def recall(self) -> "Recall":
        """Shares of images and texts with a right one among the first 1, 5 and 10."""
        sides = (self.right_texts, self.right_images)
        shares = ({k: right[:, :k].any(1).double().mean().item() for k in KS} for right in sides)
        return Recall(*shares, len(self.images), len(self.captions.texts))


class Recall(NamedTuple):
    """Shares of queries, 0 … 1, that find a right one among the first k: {k: share}."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    images: int
    texts: int  # distinct ones


def captioned(source: Source, encode: Callable[[str], Row]) -> tuple[Source, Captions]:
    """(the images of a source that have a caption, their captions); the source itself if all have one.

    Args:
        source: images, maybe with captions.
        encode: a text's tokens.
    """
    numbers: dict[Row, int] = {}
    texts: list[str] = []
    images: list[int] = []
    pairs: list[tuple[int, int]] = []
    for index in range(len(source)):
        own = set()
        for caption in read_captions(source, index):
            row = encode(caption)
            if row not in numbers:
                numbers[row] = len(texts)
                texts.append(caption)
            own.add(numbers[row])
        if own:
            pairs += [(len(images), number) for number in sorted(own)]
            images.append(index)
    whole = len(images) == len(source)
    table = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return source if whole else Subset(source, images), Captions(texts, list(numbers), table)


@torch.no_grad()
def retrieve(
    method: Any,
    source: Source,
    captions: Captions,
    size: tuple[int, int],
    texts: Texts,
    rerank: int = 0,
    **loading: Any,
) -> Retrieved:
    """Searches the texts for each image and the images for each text, by cosine; all ranks get the whole.

    Each rank embeds its part of both. Of images and texts that are equally near those with smaller numbers come first.

    Args:
        method: in evaluation mode; `EmbedsText`, and `MatchesText` with `rerank`.
        source: images that all have captions.
        captions: of all these images, see `captioned`.
        size: (height, width) in pixels of the method's images.
        texts: makes batches of tokens.
        rerank: number of the best ones that `method.match` sorts again; 0 for none.
        loading: `mean`, `std`, `device`, `workers` and `engine`, as for `evaluation_loader`.

    Raises:
        ValueError: none of the images can be decoded, or vectors are not finite.

    Memory: vectors and tokens of all images and texts, and tiles of cosines, see `nearest_on_all_ranks`.
    """
    device, part = torch.device(loading["device"]), (rank(), world_size())
    vectors, _, mine = extract(method.embed_images, source, size, part=part, centre=WHOLE, **loading)
    order = all_gather_uneven(mine)
    if not len(order):
        raise ValueError("eval retrieval: none of the images can be decoded")
    images = order.sort().values
    captions = _of_images(captions, images.cpu())
    count = len(captions.rows)
    own = range(part[0] * count // part[1], (part[0] + 1) * count // part[1])
    text_vectors = texts.embed(method.embed_text, captions.rows[own.start : own.stop], device)
    tags = torch.arange(own.start, own.stop, device=device)
    k = max(*KS, rerank)
    texts_of_images = nearest_on_all_ranks(text_vectors, tags, vectors, k)[order.argsort()]
    images_of_texts = nearest_on_all_ranks(vectors, mine, text_vectors, k)
    captions = captions._replace(pairs=captions.pairs.to(device))
    found = Retrieved(images, captions, texts_of_images, images_of_texts)
    if not rerank:
        return found
    return _rerank(found, method, rerank, evaluation_loader(source, size, 32, part, WHOLE, **loading), texts)


def _of_images(captions: Captions, images: Tensor) -> Captions:
    """The captions of some of the images, which are given in ascending order; texts are numbered anew."""
    pairs = captions.pairs[torch.isin(captions.pairs[:, 0], images)]
    kept, numbers = pairs[:, 1].unique(return_inverse=True)
    texts, rows = ([column[number] for number in kept.tolist()] for column in (captions.texts, captions.rows))
    return Captions(texts, rows, torch.stack([pairs[:, 0], numbers], 1))


def _belong(queries: Tensor, found: Tensor, pairs: Tensor) -> Tensor:
    """[Q, K] bool: whether what was found for a query makes a pair with it."""
    base = int(max(found.max(), pairs[:, 1].max())) + 1
    return torch.isin(queries[:, None] * base + found, pairs[:, 0] * base + pairs[:, 1])


def _rerank(found: Retrieved, method: MatchesText, k: int, loader: Any, texts: Texts) -> Retrieved:
    """The first k of both directions, sorted by the method's judgement of each pair; equal scores keep their order.

    Every image is encoded once, with all texts that it is paired with in either direction.
    """
    rows, device = found.captions.rows, found.images.device
    by_image = found.images[:, None] * len(rows) + found.texts_of_images[:, :k]
    by_text = found.images_of_texts[:, :k] * len(rows) + torch.arange(len(rows), device=device)[:, None]
    keys = torch.cat([by_image.flatten(), by_text.flatten()]).unique()
    parts = [(keys[:0], torch.empty(0, device=device))]
    for batch in loader.epoch(0):
        for image, number in zip(batch.views[0], batch.index):
            start, end = torch.searchsorted(keys, torch.stack([number, number + 1]) * len(rows)).tolist()
            for own in keys[start:end].split(PAIRS):
                if len(own):
                    tokens = texts.batch([rows[text] for text in (own % len(rows)).tolist()], device)
                    parts.append((own, method.match(image[None], tokens).float()))
    scored, scores = (all_gather_uneven(torch.cat(column)) for column in zip(*parts))
    if not scores.isfinite().all():
        raise ValueError("eval retrieval: scores of match must be finite, some of them are not")
    table = torch.full((len(keys),), -torch.inf, device=device)
    table[torch.searchsorted(keys, scored)] = scores
    return found._replace(
        texts_of_images=_sorted_again(found.texts_of_images, table[torch.searchsorted(keys, by_image)]),
        images_of_texts=_sorted_again(found.images_of_texts, table[torch.searchsorted(keys, by_text)]),
    )


def _sorted_again(found: Tensor, scores: Tensor) -> Tensor:
    """Columns of found [Q, K], the first k of which are sorted by their scores [Q, k]."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    k = scores.shape[1]
    return torch.cat([found[:, :k].gather(1, order), found[:, k:]], 1)
