"""How a method wants its captions: which tokenizer, how many tokens, and how a batch is padded."""

from dataclasses import dataclass

TOKENIZERS = ("clip", "bert")


@dataclass(frozen=True)
class TextInput:
    """Token ids of captions, `config.text` of a method that learns from images and text.

    Batches then have ``extras["tokens"]``, [B, L] int64: one caption of each image, chosen by (seed, epoch, image).

    Args:
        tokenizer: "clip" (byte pairs, 49,408 tokens) or "bert" (WordPiece, uncased, 30,522 tokens).
        length: most tokens of a caption, those at its ends included; longer ones are cut.
        trim: cut a batch to its longest caption, rounded up to a multiple of 8; False: L is always `length`, for a
            method that reads the last position.
        separator: end a caption with [SEP]; ALBEF's have none. For "bert" only, "clip" always has its end token.
        clean: lower the case, delete punctuation and keep 30 words, as ALBEF does before its tokenizer. For "bert".

    Raises:
        ValueError: there is no such tokenizer, the length is too small, or an option is not for this tokenizer.
    """

    tokenizer: str
    length: int
    trim: bool = True
    separator: bool = True
    clean: bool = False

    def __post_init__(self) -> None:
        if self.tokenizer not in TOKENIZERS:
            raise ValueError(f"data: the tokenizer must be {' or '.join(TOKENIZERS)}, got {self.tokenizer!r}")
        if not 2 <= self.length <= 65_535:
            raise ValueError(f"data: the length of captions must be 2 to 65,535 tokens, got {self.length}")
        if self.tokenizer == "clip" and (self.clean or not self.separator):
            raise ValueError("data: separator and clean are options of the tokenizer bert, got clip")
