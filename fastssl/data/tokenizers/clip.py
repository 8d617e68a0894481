"""CLIP's tokenizer: byte pair encoding of cleaned, lower-case text (Radford et al., 2021; Sennrich et al., 2016).

A text is mended by the package ftfy (mojibake, ligatures, curled quotes), HTML entities are resolved, and blanks are
reduced to one. It is then cut into words: runs of letters, single digits, runs of other characters, and endings such as
'll. The UTF-8 bytes of a word are the first symbols; pairs of neighbours merge, the earliest of the vocabulary first.
"""

import functools
import heapq
import html
import importlib.metadata
import re
import sys
import unicodedata
from collections.abc import Sequence
from itertools import groupby

from fastssl.extras import need

from .vocabulary import SHA256, read_vocabulary

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 48_894  # pairs of the file that CLIP uses
WORD_END = "</w>"  # a part of the last symbol of a word
PLAIN = re.compile(r"(?:[\t\n\r -%'-~]|&(?![#A-Za-z]))*")  # ASCII without entities: ftfy leaves it as it is


class ClipTokenizer:
    """Byte pairs of OpenAI's CLIP. Ids 49406 and 49407 are the start and the end of a text; 0 fills shorter ones.

    Raises:
        ValueError: the vocabulary of this installation is damaged.
    """

    pad = 0

    def __init__(self) -> None:
        lines = read_vocabulary("clip_bpe")[1 : MERGES + 1]
        pairs = [(first, second) for first, second in map(str.split, lines)]
        self._alphabet = _alphabet()
        letters = list(self._alphabet.values())
        self._symbols = [*letters, *(letter + WORD_END for letter in letters), *map("".join, pairs), START, END]
        self._ids = {symbol: number for number, symbol in enumerate(self._symbols)}
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self._word_ids = functools.lru_cache(65_536)(self._encode_word)
        self.start, self.end = self._ids[START], self._ids[END]
        self.vocabulary = len(self._symbols)
        self.identity = f"clip {SHA256['clip_bpe']} {unicodedata.unidata_version} {_ftfy_version()}"

    def encode(self, text: str, length: int | None = None) -> list[int]:
        """Ids of a text between those of the start and the end; cut to `length`, the end included.

        Raises:
            MissingExtra: the text has more than plain ASCII, and ftfy is not installed.
        """
        ids = [self.start]
        for word in _word_pattern().findall(_clean(text)):
            if length is not None and len(ids) >= length:
                break
            ids += (self._ids[word],) if word in (START, END) else self._word_ids(word)
        return [*(ids if length is None else ids[: length - 1]), self.end]

    def decode(self, ids: Sequence[int]) -> str:
        """The text up to the first end, in lower case, with blanks between words."""
        kept = list(ids)[: list(ids).index(self.end)] if self.end in ids else list(ids)
        symbols = "".join(self._symbols[number] for number in kept if number != self.start)
        values = {letter: value for value, letter in self._alphabet.items()}
        words = (bytes(values[letter] for letter in word).decode(errors="replace") for word in symbols.split(WORD_END))
        return " ".join(words).strip()

    def _encode_word(self, word: str) -> tuple[int, ...]:
        letters = [self._alphabet[value] for value in word.encode()]
        letters[-1] += WORD_END
        return tuple(self._ids[symbol] for symbol in merge_pairs(letters, self._ranks))


def merge_pairs(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """The symbols after all merges: again and again every pair of the lowest rank, from left to right.

    Takes time O(N log N) for N symbols.

    Args:
        symbols: [N] symbols of a word.
        ranks: rank of each pair that may merge.
    """
    symbols, ends = list(symbols), len(symbols)
    after, before = list(range(1, ends + 1)), list(range(-1, ends - 1))  # neighbours that are left
    alive = [True] * ends

    def candidates(lefts: Sequence[int]) -> list[tuple[int, int, str, str]]:
        pairs = ((i, symbols[i], symbols[after[i]]) for i in lefts if i >= 0 and after[i] < ends)
        return [(ranks[left, right], i, left, right) for i, left, right in pairs if (left, right) in ranks]

    queue = candidates(range(ends))
    heapq.heapify(queue)
    while queue:
        lowest = queue[0][0]
        changed: list[int] = []
        while queue and queue[0][0] == lowest:
            _, i, left, right = heapq.heappop(queue)
            j = after[i]
            if not alive[i] or j >= ends or (symbols[i], symbols[j]) != (left, right):
                continue  # one of the two has merged with another neighbour
            symbols[i], symbols[j], alive[j], after[i] = left + right, "", False, after[j]
            if after[j] < ends:
                before[after[j]] = i
            changed += (before[i], i)
        for candidate in candidates(changed):
            heapq.heappush(queue, candidate)
    return [symbol for symbol, left in zip(symbols, alive) if left]


def _clean(text: str) -> str:
    """The text mended, without entities, with single blanks and in lower case."""
    if not PLAIN.fullmatch(text):
        text = need("ftfy", what="the tokenizer clip, for text with more than plain ASCII,", extra="text").fix_text(
            text
        )
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip().lower()


def _ftfy_version() -> str:
    try:
        return importlib.metadata.version("ftfy")
    except importlib.metadata.PackageNotFoundError:
        return "without ftfy"


def _alphabet() -> dict[int, str]:
    """A visible letter for each byte, in the vocabulary's order: Latin-1's own where they are visible, then others."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in visible]
    return {value: chr(value) for value in visible} | {value: chr(256 + i) for i, value in enumerate(others)}


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    """Pattern of a word; takes 0.2 seconds, as Python's patterns have no classes for letters and numbers."""
    kinds = groupby(range(sys.maxunicode + 1), key=lambda code: unicodedata.category(chr(code))[0])
    ranges: dict[str, str] = {}
    for kind, group in kinds:
        codes = list(group)
        ranges[kind] = ranges.get(kind, "") + f"{_escape(codes[0])}-{_escape(codes[-1])}"
    letters, numbers = ranges["L"], ranges["N"]
    none = r"\s\u0345"  # in no word: blanks, and the iota below a vowel, a mark whose upper case is a letter
    special = f"{re.escape(START)}|{re.escape(END)}"
    return re.compile(rf"{special}|(?i:'s|'t|'re|'ve|'m|'ll|'d)|[{letters}]+|[{numbers}]|[^{none}{letters}{numbers}]+")


def _escape(code: int) -> str:
    return f"\\U{code:08x}"
