"""Which training rows repeat each other, and which of them a model will be asked again on held-out prompts.

Compared is what the data says, turn by turn, never the rendered prompt: chat template, system prompt and template arguments belong to the run and are
the same in every row. Two prompts are *equal* when roles and texts are, as `rollout/words.py` normalises them; punctuation counts (the embedded brackets
are nothing else). Prompts of 13 words or more also *overlap* when they share 13 consecutive words outside of system turns; shorter ones can only be
equal.

Words, as in GPT-3 (Brown et al. 2020, appendix C), and not tokens: 13 tokens are 13 characters under a character tokenizer, which is chance, and they change
with a space or a capital before them.

What many prompts share is boilerplate and no overlap. A 13-gram is boilerplate
    - in more than ten different training prompts of one domain (GPT-3's rule: phrases and instructions rather than a question of the test set),
    - in half of the different prompts of a domain's training or held-out side, three at least (its instruction, where the data is small),
    - with fewer than seven different words (digits, bits, brackets one by one: two such rows meet by chance).
The 13 words that two prompts share must lie outside of boilerplate: the last 12 words of an instruction and a common word after it say nothing.
A row that holds every 13-gram of a held-out prompt overlaps all the same: a question that was copied with eleven different endings has become frequent, not
harmless. Known limits: a held-out question that was reworded is not found, nor one of fewer than 13 words with other text around it.

The held-out side is hashed, the training side streams past it and leaves 16 bytes a row. Hashes have 64 bits: among 10^8 training and 10^6 held-out
13-grams the chance of one false match is 10^-5.
"""

import hashlib
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from rollout.chat import Turns
from rollout.words import GRAM_WORDS, WordIds, gram_hashes, normal_text, words_of

LEAST_DIFFERENT_WORDS = 7
MOST_PROMPTS = 10
"""A 13-gram in more different training prompts of a domain is boilerplate."""
LEAST_PROMPTS = 3
"""A 13-gram in fewer is never boilerplate for being in half of them."""
ROWS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOverlap:
    """A training row that overlaps with a held-out prompt.

    source, index: the row. held_out: name of the held-out row, "DOMAIN/held_out:INDEX".
    is_equal: the two are equal; else they share 13 words.
    """

    source: str
    index: int
    held_out: str
    is_equal: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainOverlap:
    """What was found of the training rows of one domain.

    duplicates_within: rows equal to an earlier one of the domain, whatever the source.
    duplicates_across: rows equal to one of another domain.
    held_out: rows that overlap with a held-out prompt of any domain, in order.
    """

    duplicates_within: int = 0
    duplicates_across: int = 0
    held_out: tuple[RowOverlap, ...] = ()


class OverlapSearch:
    """Made from the held-out prompts of all domains; training rows are added, and then `findings` tells what they share."""

    def __init__(self, held_out: dict[str, list[Turns]]):
        prompts = {domain: [_normal(turns) for turns in rows] for domain, rows in held_out.items()}
        self.names = [f"{domain}/held_out:{index}" for domain, rows in prompts.items() for index in range(len(rows))]
        self.grams = _HeldOutGrams(prompts)
        self.number_of: dict[int, int] = {}
        for number, digest in enumerate(digest for rows in prompts.values() for digest in _digests(rows).tolist()):
            self.number_of.setdefault(digest, number)
        self.num_rows: dict[str, int] = defaultdict(int)
        self.begins: dict[str, list[tuple[int, str, np.ndarray]]] = defaultdict(list)
        self.digests: dict[str, list[np.ndarray]] = defaultdict(list)

    def add(self, domain: str, source: str, indices: list[int], rows: list[Turns]) -> None:
        """Look at training rows; indices: their places in the source."""
        self.begins[domain].append((self.num_rows[domain], source, np.array(indices)))
        for begin in range(0, len(rows), ROWS_AT_ONCE):
            part = [_normal(turns) for turns in rows[begin : begin + ROWS_AT_ONCE]]
            digests = _digests(part)
            self.grams.add(domain, self.num_rows[domain], part, digests)
            self.num_rows[domain] += len(part)
            self.digests[domain].append(digests)

    def findings(self) -> dict[str, DomainOverlap]:
        """What was found, by domain."""
        digests = {domain: np.concatenate(parts) for domain, parts in self.digests.items()}
        shared = self.grams.sharing_rows({domain: len(np.unique(own)) for domain, own in digests.items()})
        found = {}
        for domain, own in digests.items():
            others = [other for name, other in digests.items() if name != domain]
            equal = {row: self.number_of[digest] for row, digest in enumerate(own.tolist()) if digest in self.number_of}
            found[domain] = DomainOverlap(
                duplicates_within=len(own) - len(np.unique(own)),
                duplicates_across=int(np.isin(own, np.concatenate(others)).sum()) if others else 0,
                held_out=tuple(self._overlap(domain, row, equal, shared[domain]) for row in sorted(equal.keys() | shared[domain].keys())),
            )
        return found

    def _overlap(self, domain: str, row: int, equal: dict[int, int], shared: dict[int, int]) -> RowOverlap:
        begin, source, indices = self.begins[domain][bisect_right(self.begins[domain], row, key=lambda part: part[0]) - 1]
        prompt = equal[row] if row in equal else shared[row]
        return RowOverlap(source=source, index=int(indices[row - begin]), held_out=self.names[prompt], is_equal=row in equal)


class _HeldOutGrams:
    """The 13-grams of the held-out prompts, and the training rows that have one.

    hashes: of the different 13-grams, sorted. is_boilerplate: known so far, in the same order.
    gram, prompt, place: of each occurrence of a 13-gram, its index in `hashes`, its held-out prompt, and its first word's place among the words of all
        prompts, which stand behind each other with a gap.
    prompts_by_rarest: 13-gram -> the 13-grams and number of each held-out prompt of which it is the rarest one.
    counts: domain -> different training prompts that have each 13-gram. seen: their digests.
    pending: domain -> rows and the 13-grams they have, where that was no boilerplate yet. copies: domain -> row -> held-out prompt that it holds wholly.
    """

    def __init__(self, held_out: dict[str, list[Turns]]):
        self.word_ids = WordIds()
        hashes, has_few_words = self._read([turns for rows in held_out.values() for turns in rows])
        self.hashes, first, self.gram = np.unique(hashes, return_index=True, return_inverse=True)
        self.is_boilerplate = has_few_words[first]
        self.may_have = np.zeros(1 << (8 * len(self.hashes)).bit_length(), bool)  # by the hash's last bits: most of the others are told apart in one look
        self.may_have[self._slot(self.hashes)] = True
        prompt, gram = _different_pairs(self.prompt, self.gram)
        self.prompts_by_rarest = self._by_rarest(prompt, gram)
        begin = 0
        for rows in held_out.values():
            different = begin + np.unique(_digests(rows), return_index=True)[1]
            self._mark_half(np.bincount(gram[np.isin(prompt, different)], minlength=len(self.hashes)), len(different))
            begin += len(rows)
        self.counts: dict[str, np.ndarray] = {}
        self.seen: dict[str, set[int]] = defaultdict(set)
        self.pending: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
        self.copies: dict[str, dict[int, int]] = defaultdict(dict)

    def add(self, domain: str, first_row: int, prompts: list[Turns], digests: np.ndarray) -> None:
        """Note which of the training prompts, numbered from `first_row`, have a held-out 13-gram."""
        row, gram = self._known_grams(prompts)
        if not len(row):
            return
        counts = self.counts.setdefault(domain, np.zeros(len(self.hashes), np.int32))
        numbers, begins = np.unique(row, return_index=True)
        for number, grams in zip(numbers.tolist(), np.split(gram, begins)[1:], strict=True):
            digest = int(digests[number])
            if digest not in self.seen[domain]:
                self.seen[domain].add(digest)
                counts[grams] += 1
            self._note_copy(domain, first_row + number, grams)
        self.is_boilerplate[gram[counts[gram] > MOST_PROMPTS]] = True
        is_open = ~self.is_boilerplate[gram]
        self.pending[domain].append((row[is_open] + first_row, gram[is_open]))

    def sharing_rows(self, num_different: dict[str, int]) -> dict[str, dict[int, int]]:
        """domain -> row -> a held-out prompt with which it shares 13 words; num_different: different training prompts of each domain."""
        for domain, counts in self.counts.items():
            self._mark_half(counts, num_different[domain])
        prompt_of, found = self._evidence(), {}
        for domain in num_different:
            found[domain] = dict(self.copies[domain])
            for row, gram in self.pending[domain]:
                is_shared = prompt_of[gram] >= 0
                for number, prompt in zip(row[is_shared].tolist(), prompt_of[gram[is_shared]].tolist(), strict=True):
                    found[domain].setdefault(number, prompt)
        return found

    def _read(self, prompts: list[Turns]) -> tuple[np.ndarray, np.ndarray]:
        """Sets `prompt` and `place`; returns the hash of each occurrence, and whether its words are too few different ones."""
        columns, num_words = [], 0
        for begin in range(0, max(1, len(prompts)), ROWS_AT_ONCE):
            ids, prompt_of = self.word_ids.learnt([_words(turns) for turns in prompts[begin : begin + ROWS_AT_ONCE]])
            starts, hashes = gram_hashes(ids)
            words = np.sort(ids[starts[:, None] + np.arange(GRAM_WORDS)], axis=1)
            has_few_words = (np.diff(words, axis=1) != 0).sum(axis=1) + 1 < LEAST_DIFFERENT_WORDS
            columns.append((begin + prompt_of[starts], num_words + starts, hashes, has_few_words))
            num_words += len(ids)
        self.prompt, self.place, hashes, has_few_words = (np.concatenate(column) for column in zip(*columns, strict=True))
        return hashes, has_few_words

    def _slot(self, hashes: np.ndarray) -> np.ndarray:
        return hashes & np.uint64(len(self.may_have) - 1)

    def _known_grams(self, prompts: list[Turns]) -> tuple[np.ndarray, np.ndarray]:
        """The different pairs of a prompt (its place in the list) and a held-out 13-gram that it has."""
        ids, row_of = self.word_ids.known([_words(turns) for turns in prompts])
        starts, hashes = gram_hashes(ids)
        may_have = self.may_have[self._slot(hashes)]
        starts, hashes = starts[may_have], hashes[may_have]
        gram = np.searchsorted(self.hashes, hashes)
        gram[gram == len(self.hashes)] = 0
        is_known = self.hashes[gram] == hashes
        return _different_pairs(row_of[starts[is_known]], gram[is_known])

    def _by_rarest(self, prompt: np.ndarray, gram: np.ndarray) -> dict[int, list[tuple[np.ndarray, int]]]:
        """`prompts_by_rarest` from the different pairs of prompt and 13-gram, in order of prompts; of prompts with the same 13-grams, the first."""
        frequency = np.bincount(gram, minlength=len(self.hashes))
        found, known = defaultdict(list), set()
        numbers, begins = np.unique(prompt, return_index=True)
        for number, grams in zip(numbers.tolist(), np.split(gram, begins)[1:], strict=True):
            if grams.tobytes() not in known:
                known.add(grams.tobytes())
                found[int(grams[frequency[grams].argmin()])].append((grams, number))
        return found

    def _mark_half(self, counts: np.ndarray, num_different: int) -> None:
        self.is_boilerplate |= (counts >= LEAST_PROMPTS) & (2 * counts >= num_different)

    def _note_copy(self, domain: str, row: int, own_grams: np.ndarray) -> None:
        for gram in own_grams.tolist():
            for grams, prompt in self.prompts_by_rarest.get(gram, ()):
                if len(np.intersect1d(grams, own_grams, assume_unique=True)) == len(grams):
                    self.copies[domain].setdefault(row, prompt)

    def _evidence(self) -> np.ndarray:
        """The first held-out prompt that has each 13-gram in words of its own; -1 where every occurrence has a word in boilerplate."""
        num_boilerplate = np.zeros(int(self.place.max(initial=0)) + 2 * GRAM_WORDS, np.int64)
        num_boilerplate[self.place[self.is_boilerplate[self.gram]] + GRAM_WORDS] = 1
        num_boilerplate = np.cumsum(num_boilerplate)  # that begin before a place, GRAM_WORDS further on
        is_own = num_boilerplate[self.place + 2 * GRAM_WORDS - 1] == num_boilerplate[self.place]
        gram, first = np.unique(self.gram[is_own], return_index=True)
        prompt_of = np.full(len(self.hashes), -1)
        prompt_of[gram] = self.prompt[is_own][first]
        return prompt_of


def _different_pairs(row: np.ndarray, gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each pair once, in order of rows and then 13-grams."""
    width = int(gram.max(initial=0)) + 1
    pairs = np.unique(row * width + gram)
    return pairs // width, pairs % width


def _normal(turns: Turns) -> Turns:
    return [(role, normal_text(text)) for role, text in turns]


def _words(turns: Turns) -> list[str]:
    return [word for role, text in turns if role != "system" for word in words_of(text)]


def _digests(prompts: list[Turns]) -> np.ndarray:
    """64 bits of each prompt, by which equal ones are found."""
    texts = ("\0".join(part for turn in turns for part in turn) for turns in prompts)
    return np.array([int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little") for text in texts], np.uint64)
