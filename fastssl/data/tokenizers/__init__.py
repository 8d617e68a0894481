"""Tokenizers: text to token ids and back, equal to the reference implementations.

build_tokenizer("clip")     byte pair encoding of OpenAI's CLIP, 49,408 tokens
build_tokenizer("bert")     WordPiece of BERT, uncased, 30,522 tokens
"""

from typing import Protocol

from ..text import TextInput
from .bert import BertTokenizer
from .clip import ClipTokenizer


class Tokenizer(Protocol):
    """Text to token ids and back."""

    vocabulary: int  # number of tokens; ids are below it
    pad: int  # id that fills shorter captions
    identity: str  # changes with everything that changes the ids of a text

    def encode(self, text: str, length: int | None = None) -> list[int]:
        """Ids of a text, those at its ends included.

        Args:
            text: any text.
            length: most ids; a longer text is cut, and keeps the id at its end.
        """
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without those at the ends and padding; case and blanks are not the original's."""
        ...


def build_tokenizer(name: str, *, separator: bool = True, clean: bool = False) -> Tokenizer:
    """The tokenizer with this name.

    Args:
        name: "clip" or "bert".
        separator, clean: options of "bert", see `TextInput`.

    Raises:
        ValueError: there is no such tokenizer.
    """
    TextInput(name, 2, separator=separator, clean=clean)
    return ClipTokenizer() if name == "clip" else BertTokenizer(separator, clean)


def tokenizer_of(text: TextInput) -> Tokenizer:
    """The tokenizer that a method's captions want."""
    return build_tokenizer(text.tokenizer, separator=text.separator, clean=text.clean)
