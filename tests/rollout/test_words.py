"""Words and 13-grams: what normalising makes equal and what it keeps apart, and hashes that are those of the words."""

import random

import numpy as np
import pytest

from rollout.words import GRAM_WORDS, WordIds, gram_hashes, normal_text, words_of


@pytest.mark.parametrize(
    "other",
    ["WHAT is\tthe\n\n  sum", "\uff37\uff48\uff41\uff54 is the sum", "What\u00a0is the\u2003sum", "What is\u200b the s\u00adum", "  What is the sum  "],
    ids=["case and spaces", "full-width letters", "other spaces", "invisible characters", "edges"],
)
def test_texts_that_read_the_same_are_the_same(other):
    assert normal_text(other) == normal_text("What is the sum")


def test_composed_and_decomposed_accents_are_the_same():
    assert normal_text("caf\u00e9") == normal_text("cafe\u0301")


@pytest.mark.parametrize(("one", "other"), [("7 + 5", "7 - 5"), ("B:([", "B:(["[:-1]), ("2.5", "25"), ("cafe", "caf\u00e9")])
def test_texts_of_another_meaning_stay_different(one, other):
    assert normal_text(one) != normal_text(other)
    assert words_of(normal_text(one)) != words_of(normal_text(other))


def test_words_lose_the_sentence_marks_at_their_ends_and_nothing_else():
    text = normal_text("\u201cStop!\u201d he said: (a + b) * 2.5, don't ... x[0].")
    assert words_of(text) == ["stop", "he", "said", "(a", "+", "b)", "*", "2.5", "don't", "x[0]"]


def test_each_character_of_text_without_spaces_is_a_word():
    assert words_of(normal_text("\u8ba1\u7b97 x+1 \u7684\u548c\u3002")) == ["\u8ba1", "\u7b97", "x+1", "\u7684", "\u548c"]


def test_a_hash_stands_for_its_words_and_only_for_them():
    """Texts over five words, so that 13-grams return; the oracle compares the words themselves."""
    rng = random.Random(0)
    texts = [[rng.choice("abcde") for _ in range(rng.randrange(40))] for _ in range(200)]
    texts += [texts[0] + ["unheard", *texts[1]]]
    ids = WordIds()
    ids.learnt(texts[:-1])
    array, text_of = ids.known(texts)
    starts, hashes = gram_hashes(array)
    expected = [(number, tuple(words[i : i + GRAM_WORDS])) for number, words in enumerate(texts) for i in range(len(words) - GRAM_WORDS + 1)]
    expected = [(number, gram) for number, gram in expected if "unheard" not in gram]
    assert text_of[starts].tolist() == [number for number, _ in expected]
    assert len({*zip(hashes.tolist(), (gram for _, gram in expected), strict=True)}) == len(np.unique(hashes)) == len({gram for _, gram in expected})


def test_too_short_a_text_has_no_13_gram():
    array, _ = WordIds().learnt([["a"] * (GRAM_WORDS - 1), []])
    assert len(gram_hashes(array)[0]) == 0
