"""Texts as a method of images and text reads them: tokens, padded batches, and unit vectors."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastssl.data.text import TextInput
from fastssl.data.token_table import MOST_CHARACTERS, STEP
from fastssl.data.tokenizers import tokenizer_of

BATCH = 256  # texts in one pass of a text tower
Row = tuple[int, ...]  # the token ids of a text, without padding


class Texts:
    """Texts as tokens of a method.

    Args:
        text: the method's `config.text`.
    """

    def __init__(self, text: TextInput):
        self.text, self._tokenizer = text, tokenizer_of(text)

    def encode(self, text: str) -> Row:
        """The tokens of a text, cut to the method's length."""
        return tuple(self._tokenizer.encode(text[:MOST_CHARACTERS], self.text.length))

    def batch(self, rows: Sequence[Row], device: torch.device | str = "cpu") -> Tensor:
        """Padded tokens [B, L] int64 of texts, cut to the longest text as the method's batches are in training."""
        length = self.text.length
        if self.text.trim:
            length = min(length, -(-max(map(len, rows)) // STEP) * STEP)
        padding = [self._tokenizer.pad] * length
        return torch.tensor([[*row, *padding[len(row) :]] for row in rows], device=device)

    @torch.no_grad()
    def embed(
        self, embed_text: Callable[[Tensor], Tensor], rows: Sequence[Row], device: torch.device | str = "cpu"
    ) -> Tensor:
        """Vectors [N, D] float32 of texts; texts of like length share a batch, which needs less padding."""
        if not rows:  # a table of the right width, for collectives
            return embed_text(self.batch([self.encode("")], device))[:0].float()
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        groups = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        vectors = [embed_text(self.batch([rows[number] for number in group], device)).float() for group in groups]
        return torch.cat(vectors)[torch.tensor(order, device=device).argsort()]
