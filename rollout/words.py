"""Words of a text, and hashes of every 13 of them in a row: what `rollout/overlap.py` compares prompts by.

Normalised text: Unicode NFKC (full-width letters, ligatures, superscripts are the plain ones), case folded, without invisible characters, every stretch
of white space one space. A word is what then stands between spaces, without sentence marks at its ends; `7 + 5` and `7 - 5` stay different, which they
would not if all punctuation went. Of Chinese and Japanese text, written without spaces, each character is a word.

Words are numbered by a vocabulary that is learnt from one side only: a word that this side does not have gets 0, and no 13-gram with a 0 in it is
hashed. A 0 also stands behind each text, so that many texts are one array and no 13-gram reaches from one into the next.
"""

import re
import unicodedata

import numpy as np

GRAM_WORDS = 13

INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"))
SENTENCE_MARKS = ".,;:!?\"'\u2018\u2019\u201c\u201d\u00ab\u00bb\u3001\u3002\u300c\u300d\u300e\u300f"
UNSPACED = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")

MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)


def normal_text(text: str) -> str:
    """The text as it is compared (module docstring)."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(INVISIBLE)
    return " ".join(text.casefold().split())


def words_of(text: str) -> list[str]:
    """The words of a normalised text."""
    if not text.isascii():
        text = UNSPACED.sub(r" \1 ", text)
    return [word for part in text.split() if (word := part.strip(SENTENCE_MARKS))]


class WordIds:
    """Numbers of words, from 1."""

    def __init__(self):
        self.id_of: dict[str, int] = {}

    def learnt(self, texts: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        """As `known`, with new words taken into the vocabulary."""
        for words in texts:
            for word in words:
                self.id_of.setdefault(word, len(self.id_of) + 1)
        return self.known(texts)

    def known(self, texts: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        """The words' numbers, 0 for unknown ones and behind each text; and which text each stands in."""
        get, ids = self.id_of.get, []
        for words in texts:
            ids += [get(word, 0) for word in words]
            ids.append(0)
        return np.array(ids, np.int64), np.repeat(np.arange(len(texts)), [len(words) + 1 for words in texts])


def gram_hashes(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where 13 words in a row without a 0 begin, and a 64-bit hash of each such 13-gram."""
    known = np.concatenate([np.zeros(1, np.int64), np.cumsum(ids != 0)])
    starts = np.flatnonzero(known[GRAM_WORDS:] - known[:-GRAM_WORDS] == GRAM_WORDS)
    codes = _scrambled(ids.astype(np.uint64))
    hashes = np.zeros(len(starts), np.uint64)
    for offset in range(GRAM_WORDS):
        hashes = hashes * MULTIPLIER + codes[starts + offset]
    return starts, hashes


def _scrambled(numbers: np.ndarray) -> np.ndarray:
    """64 well-mixed bits for each number (splitmix64, Steele et al. 2014); consecutive numbers as they are would make sums collide."""
    mixed = numbers * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
