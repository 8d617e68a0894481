"""BERT's tokenizer: WordPiece of lower-case text without accents (Devlin et al., 2019; Wu et al., 2016).

A text is cut at blanks and around punctuation and Chinese characters. A word becomes the longest token that it starts
with, then the longest that continues it ("##s"), and so on; a word that has no such tokens is [UNK].
"""

import functools
import re
import unicodedata
from collections.abc import Sequence

from .vocabulary import SHA256, read_vocabulary

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LONGEST_WORD = 100  # characters; a longer word is [UNK]
MOST_WORDS = 30  # of a cleaned caption
ASCII_WORD = re.compile(r"[a-z0-9]+|[!-/:-@[-`{-~]")
ASCII_CONTROLS = {code: None for code in (*range(32), 127) if code not in b"\t\n\r"}  # are dropped
IDEOGRAPHS = (  # first and last code points
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


class BertTokenizer:
    """WordPiece of bert-base-uncased. [CLS] (101) starts a text, [SEP] (102) ends it, [PAD] (0) fills shorter ones.

    Args:
        separator: end a text with [SEP]; ALBEF's texts have none.
        clean: clean a caption as ALBEF does, see `clean_caption`.

    Raises:
        ValueError: the vocabulary of this installation is damaged.
    """

    def __init__(self, separator: bool = True, clean: bool = False):
        self._tokens = read_vocabulary("bert_base_uncased")
        self._ids = {token: number for number, token in enumerate(self._tokens)}
        self._separator, self._clean = separator, clean
        self._word_ids = functools.lru_cache(65_536)(self._encode_word)
        self.pad, self.unknown, self.start, self.end, self.mask = (self._ids[token] for token in SPECIAL)
        self.vocabulary = len(self._tokens)
        options = f"separator={separator} clean={clean}"
        self.identity = f"bert {SHA256['bert_base_uncased']} {options} {unicodedata.unidata_version}"

    def encode(self, text: str, length: int | None = None) -> list[int]:
        """Ids of a text after [CLS], with [SEP] behind unless `separator` is False; cut to `length`."""
        ids = [self.start]
        end = [self.end] if self._separator else []
        for part in re.split(r"(\[(?:PAD|UNK|CLS|SEP|MASK)\])", clean_caption(text) if self._clean else text):
            words = [part] if part in SPECIAL else _split(part)
            for word in words:
                if length is not None and len(ids) >= length:
                    break
                ids += (self._ids[word],) if word in SPECIAL else self._word_ids(word)
        return [*(ids if length is None else ids[: length - len(end)]), *end]

    def decode(self, ids: Sequence[int]) -> str:
        """The text, in lower case, with blanks between words and around punctuation."""
        hidden = {self.pad, self.start, self.end}
        return " ".join(self._tokens[number] for number in ids if number not in hidden).replace(" ##", "")

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if len(word) > LONGEST_WORD:
            return (self.unknown,)
        ids: list[int] = []
        first = 0
        while first < len(word):
            mark = "##" if first else ""
            ends = (end for end in range(len(word), first, -1) if mark + word[first:end] in self._ids)
            if (end := next(ends, None)) is None:
                return (self.unknown,)
            ids.append(self._ids[mark + word[first:end]])
            first = end
        return tuple(ids)


def clean_caption(text: str) -> str:
    """A caption in lower case, without punctuation, of at most 30 words, as ALBEF's `pre_caption` makes it."""
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower())
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:MOST_WORDS])


def _split(text: str) -> list[str]:
    """Words of a text, in lower case and without accents; each punctuation mark and each ideograph is a word."""
    if text.isascii():  # the same, ten times as fast
        return ASCII_WORD.findall(text.translate(ASCII_CONTROLS).lower())
    shown = "".join(" " if _is_blank(c) else f" {c} " if _is_ideograph(c) else c for c in text if not _is_control(c))
    lower = "".join(map(str.lower, shown))  # each character alone, as the reference does: a final Σ becomes σ
    words = "".join(c for c in unicodedata.normalize("NFD", lower) if unicodedata.category(c) != "Mn")
    return "".join(f" {c} " if _is_punctuation(c) else c for c in words).split()


def _is_blank(character: str) -> bool:
    return character in " \t\n\r" or unicodedata.category(character) == "Zs"


def _is_control(character: str) -> bool:
    """True for what is dropped: control and private characters, surrogates, the unassigned, and U+FFFD."""
    return character == "�" or (unicodedata.category(character)[0] == "C" and character not in "\t\n\r")


def _is_ideograph(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in IDEOGRAPHS)


def _is_punctuation(character: str) -> bool:
    """True for Unicode's punctuation and for all of ASCII that is neither a letter, a digit nor a blank."""
    return unicodedata.category(character)[0] == "P" or ("!" <= character <= "~" and not character.isalnum())
