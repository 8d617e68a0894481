"""Tokenizers: equal to the references on the strings of tests/golden/tokenizers.safetensors, and on odd text."""

import random
import sys
import unicodedata
from itertools import pairwise

import pytest

from fastssl.data.text import TextInput
from fastssl.data.tokenizers import build_tokenizer, clip, vocabulary
from fastssl.data.tokenizers.bert import _split, clean_caption
from fastssl.extras import MissingExtra
from tests.support.golden import read

CLIP, BERT = build_tokenizer("clip"), build_tokenizer("bert")
IDS, META = read("tokenizers")
STRINGS = META["strings"]
ODD = (
    "",
    " \t\n",
    "🧑🏽\u200d🚀 family 👨\u200d👩\u200d👧 🇫🇷",
    "İstanbul ΣΊΣΥΦΟΣ straße ﬁne ﬂow ①²½ Ⅷ ٣",
    "e\u0301cole école",
    "&lt;b&gt; &amp;amp;amp; &copy;2021 &#128512; &nbsp; AT&T &EACUTE;",
    "“don’t” — it’ll… we‘ve I’M",
    "schÃ¶n donâ€™t",
    "中文字幕 日本語 한국어 русский العربية",
    "\x00\x1b[31mred\x1b[0m\x85\u2028line\u202etxt\ufeff\ufffd",
    "\ud800 lone \udcff",
    "<|startoftext|> a <|endoftext|> b [MASK] [SEP] [mask]",
    "_under_score_ 12345 3.14 don't DON'T 'sup it's'",
    "a" * 10_000,
    "word " * 2_000,
    "x9 " * 3_000,
    "é" * 5_000,
)


def padded(ids, length):
    return ids + [0] * (length - len(ids))


@pytest.mark.parametrize("row", range(len(STRINGS)))
def test_clip_is_openais(row):
    if not clip.PLAIN.fullmatch(STRINGS[row]):
        pytest.importorskip("ftfy")
    assert padded(CLIP.encode(STRINGS[row], 77), 77) == IDS["clip.ids"][row].tolist()
    assert len(CLIP.encode(STRINGS[row])) == IDS["clip.lengths"][row]


@pytest.mark.parametrize("row", range(len(STRINGS)))
def test_bert_is_albefs(row):
    cleaning, raw = build_tokenizer("bert", separator=False, clean=True), build_tokenizer("bert", separator=False)
    assert padded(cleaning.encode(STRINGS[row], 25), 25) == IDS["albef.ids"][row].tolist()
    assert padded(raw.encode(STRINGS[row], 40), 40) == IDS["bert_raw.ids"][row].tolist()
    assert clean_caption(STRINGS[row]) == META["albef_captions"][row]


def test_a_final_sigma_is_like_any_other():
    assert BERT.encode("ΣΑΣ") == BERT.encode("σασ") != BERT.encode("σας")


def test_a_text_of_bert_ends_with_sep():
    assert BERT.encode("a dog") == [101, 1037, 3899, 102]
    assert BERT.encode("a dog and a cat", 4) == [101, 1037, 3899, 102]
    assert (BERT.vocabulary, BERT.pad, CLIP.vocabulary, CLIP.pad) == (30_522, 0, 49_408, 0)


def test_decoded_text_has_the_words():
    assert CLIP.decode(CLIP.encode("A small  Red star, upper left")) == "a small red star , upper left"
    assert CLIP.decode([*CLIP.encode("a dog"), 0, 0]) == "a dog"
    assert BERT.decode([*BERT.encode("An unaffable dog"), 0, 0]) == "an unaffable dog"


@pytest.mark.parametrize("tokenizer", [CLIP, BERT], ids=["clip", "bert"])
@pytest.mark.parametrize("number", range(len(ODD)))
def test_any_text_has_ids(tokenizer, number):
    text = ODD[number]
    if tokenizer is CLIP and not clip.PLAIN.fullmatch(text):
        pytest.importorskip("ftfy")
    whole, cut = tokenizer.encode(text), tokenizer.encode(text, 8)
    assert all(0 <= i < tokenizer.vocabulary for i in whole)
    assert cut == (whole if len(whole) <= 8 else [*whole[:7], whole[-1]])
    assert isinstance(tokenizer.decode(whole), str)


def test_merging_is_that_of_the_definition():
    def by_definition(symbols, ranks):
        while pairs := [pair for pair in pairwise(symbols) if pair in ranks]:
            first, second = min(pairs, key=ranks.__getitem__)
            merged, i = [], 0
            while i < len(symbols):
                step = 2 if symbols[i : i + 2] == [first, second] else 1
                merged.append("".join(symbols[i : i + step]))
                i += step
            symbols = merged
        return symbols

    rng = random.Random(0)
    for _ in range(2_000):
        parts = ["a", "b", "c", "aa", "ab", "ba", "abc", "bc", "aab"]
        pairs = [(rng.choice(parts), rng.choice(parts)) for _ in range(8)]
        ranks = {pair: rank for rank, pair in enumerate(dict.fromkeys(pairs))}
        word = rng.choices("abc", k=rng.randrange(1, 12))
        assert clip.merge_pairs(word, ranks) == by_definition(word, ranks), (word, ranks)


def test_plain_text_is_cut_as_any_other():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(chr(rng.choice((*range(128), *b"  \t\n"))) for _ in range(30))
        assert [*_split(text), "e"] == _split(f"{text} é")


def test_words_are_cut_by_unicodes_letters_and_numbers():
    pattern = clip._word_pattern()
    assert pattern.findall("α\u0345β") == ["α", "β"]  # as the reference's pattern, which ignores case, finds
    for code in range(0, sys.maxunicode + 1, 29):
        character = chr(code)
        if unicodedata.category(character)[0] in "LN":
            letter = unicodedata.category(character)[0] == "L"
            assert pattern.findall(f"{character}{character}") == ([2 * character] if letter else 2 * [character])
        elif code != 0x345:
            assert pattern.findall(f"a{character}1") == (["a", "1"] if character.isspace() else ["a", character, "1"])


def test_ftfy_is_needed_only_for_what_it_would_change(monkeypatch):

    monkeypatch.setattr(clip, "need", lambda package, **options: (_ for _ in ()).throw(MissingExtra("no ftfy")))
    assert CLIP.encode("Cats & dogs, 'quoted' <b> {x}\t~") == CLIP.encode("cats & dogs, 'quoted' <b> {x} ~")
    for text in ("café", "a &amp; b", "\x1b[0m", "&#64;"):
        with pytest.raises(MissingExtra):
            CLIP.encode(text)


def test_plain_text_is_what_ftfy_leaves():
    ftfy = pytest.importorskip("ftfy")
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(chr(rng.choice([*range(32, 127), 9, 10, 38, 32])) for _ in range(40))
        if clip.PLAIN.fullmatch(text):
            assert ftfy.fix_text(text) == text


def test_wrong_requests_get_a_sentence(monkeypatch):
    with pytest.raises(ValueError, match=r"data: the tokenizer must be clip or bert, got 'word'"):
        build_tokenizer("word")
    with pytest.raises(ValueError, match=r"data: the length of captions must be 2 to 65,535 tokens, got 1"):
        TextInput("clip", 1)
    with pytest.raises(ValueError, match=r"data: separator and clean are options of the tokenizer bert, got clip"):
        TextInput("clip", 77, clean=True)
    monkeypatch.setitem(vocabulary.SHA256, "bert_base_uncased", "0")
    with pytest.raises(
        ValueError, match=r"vocabulary bert_base_uncased of this installation is damaged \(its checksum"
    ):
        build_tokenizer("bert")
