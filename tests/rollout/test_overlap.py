"""Overlap of training rows with held-out prompts against a quadratic oracle, and the cases that a careless search gets wrong."""

import functools
import random
import string

import pytest

from rollout.overlap import DomainOverlap, OverlapSearch
from rollout.synthetic import SYNTHETIC_DOMAINS, synthetic_rows
from rollout.words import normal_text, words_of

TALE = "an old ferryman rows nine goats over the wide river before the church bells of the far town ring for the evening"
"""22 words, no two 13-grams alike."""
OTHER = "three tired painters share five buckets of green paint while their youngest brother counts every plank in that long wooden fence"
INSTRUCTION = "read the question below with care then think about it step by step and write only the final answer in one line"


def asked(text: str) -> list[tuple[str, str]]:
    return [("user", text)]


def search(training: dict[str, list], held_out: dict[str, list]) -> dict[str, DomainOverlap]:
    """Findings of rows given as texts or conversations, one source per domain."""
    as_turns = {name: [asked(row) if isinstance(row, str) else row for row in rows] for name, rows in held_out.items()}
    found = OverlapSearch(as_turns)
    for name, rows in training.items():
        found.add(name, "prompts", list(range(len(rows))), [asked(row) if isinstance(row, str) else row for row in rows])
    return found.findings()


def overlapping(training: list, held_out: list) -> list[int]:
    return [row.index for row in search({"law": training}, {"law": held_out})["law"].held_out]


def fillers(count: int, words: int = 15, seed: int = 0) -> list[str]:
    """Texts that have nothing in common."""
    rng = random.Random(seed)
    return [" ".join("".join(rng.choices(string.ascii_lowercase, k=8)) for _ in range(words)) for _ in range(count)]


# The definition, compared all with all


@functools.cache
def grams(text: str) -> list[tuple[str, ...]]:
    words = words_of(normal_text(text))
    return [tuple(words[i : i + 13]) for i in range(len(words) - 12)]


def oracle(training: dict[str, list[str]], held_out: dict[str, list[str]]) -> dict[str, list[tuple[int, bool]]]:
    """(row, is equal) of every overlapping row by the module's definition, every prompt against every other."""
    common = set()
    for side, limit in ((training, 10), (held_out, None)):
        for rows in side.values():
            different = {normal_text(text): set(grams(text)) for text in rows}
            for gram in set().union(*different.values()):
                count = sum(gram in own for own in different.values())
                if (limit is not None and count > limit) or (count >= 3 and count >= len(different) / 2) or len(set(gram)) < 7:
                    common.add(gram)
    evidence, whole = set(), []
    for text in [text for rows in held_out.values() for text in rows]:
        own = grams(text)
        evidence |= {gram for i, gram in enumerate(own) if not any(near in common for near in own[max(0, i - 12) : i + 13])}
        whole += [set(own)] if own else []
    equal = {normal_text(text) for rows in held_out.values() for text in rows}
    found = {}
    for name, rows in training.items():
        found[name] = []
        for index, text in enumerate(rows):
            own = set(grams(text))
            if normal_text(text) in equal or own & evidence or any(prompt <= own for prompt in whole):
                found[name].append((index, normal_text(text) in equal))
    return found


def random_text(rng: random.Random, phrases: list[str]) -> str:
    """One to three phrases, some cut, so that texts share long and short stretches, some of them often."""
    parts = [rng.choice(phrases).split() for _ in range(rng.randrange(1, 4))]
    parts = [part[rng.randrange(4) :] if rng.random() < 0.4 else part for part in parts]
    return " ".join(word.upper() if rng.random() < 0.05 else word for part in parts for word in part)


@pytest.mark.parametrize("seed", range(12))
def test_the_rows_found_are_those_of_a_comparison_of_all_with_all(seed):
    rng = random.Random(seed)
    phrases = fillers(rng.choice([8, 40, 120]), words=16, seed=seed) + [INSTRUCTION] * rng.randrange(30) + ["0 1 1 0 1 0 0 1 1 1 0 1 0 1 0 0"]
    training = {name: [random_text(rng, phrases) for _ in range(size)] for name, size in (("law", 60), ("code", 7))}
    held_out = {name: [random_text(rng, phrases) for _ in range(size)] for name, size in (("law", 12), ("code", 3))}
    found = search(training, held_out)
    assert {name: [(row.index, row.is_equal) for row in domain.held_out] for name, domain in found.items()} == oracle(training, held_out)


@pytest.mark.parametrize("seed", range(3))
def test_duplicates_are_those_of_a_comparison_of_all_with_all(seed):
    rng = random.Random(seed)
    training = {name: [str(rng.randrange(30)) for _ in range(20)] for name in ("law", "code", "tools")}
    for name, domain in search(training, {}).items():
        rows = training[name]
        assert domain.duplicates_within == sum(text in rows[:index] for index, text in enumerate(rows))
        assert domain.duplicates_across == sum(any(text in training[other] for other in training if other != name) for text in rows)


# What counts


def test_thirteen_words_in_a_row_overlap_and_twelve_do_not():
    words = TALE.split()
    held_out = [*fillers(5), TALE]
    assert overlapping([*fillers(5, seed=1), "first " + " ".join(words[3:16]) + " last"], held_out) == [5]
    assert overlapping([*fillers(5, seed=1), "first " + " ".join(words[3:15]) + " last"], held_out) == []


def test_the_held_out_row_is_named_with_its_domain():
    found = search({"law": fillers(3), "code": [*fillers(3, seed=1), "so " + TALE]}, {"law": [OTHER, TALE], "code": [OTHER]})
    [row] = found["code"].held_out
    assert (row.source, row.index, row.held_out, row.is_equal) == ("prompts", 3, "law/held_out:1", False)


def test_a_row_that_is_equal_is_called_so_even_where_it_shares_words_with_an_earlier_one():
    [row] = search({"law": [TALE, *fillers(9)]}, {"law": ["so " + TALE, TALE, *fillers(9, seed=1)]})["law"].held_out
    assert (row.held_out, row.is_equal) == ("law/held_out:1", True)


@pytest.mark.parametrize("other", [TALE.upper(), TALE.replace(" ", "\n  "), TALE.replace("river", "ri\u00adver") + "\u200b", TALE.replace("e", "\uff45")])
def test_case_white_space_and_unicode_forms_hide_nothing(other):
    [row] = search({"law": [other]}, {"law": [TALE]})["law"].held_out
    assert row.is_equal


def test_punctuation_at_words_hides_no_13_gram():
    assert overlapping(["Well: " + TALE.replace(" ", ", ") + "!"], [TALE]) == [0]


def test_short_prompts_overlap_when_they_are_equal_only():
    assert overlapping(["what is 7 + 5 ?", "what is 7 + 6 ?", "now, what is 7 + 5 ?"], ["what is 7 + 5 ?"]) == [0]


def test_punctuation_alone_tells_short_prompts_apart():
    assert overlapping(["B:([{<(=", "B:(<{<(="], ["B:(<[<(=", "B:([{<(="]) == [0]


def test_the_roles_of_turns_tell_prompts_apart():
    dialogue = [("user", "hello"), ("assistant", "what is it"), ("user", "2+2")]
    other = [("user", "hello"), ("user", "what is it"), ("user", "2+2")]
    assert overlapping([dialogue, other], [dialogue]) == [0]


def test_the_same_question_after_other_turns_is_found_by_its_words():
    dialogue = [("user", "hello"), ("assistant", "what is it"), ("user", TALE)]
    assert overlapping([dialogue], [TALE]) == [0]


def test_text_without_spaces_is_compared_by_its_characters():
    question = "\u4e00\u4e2a\u519c\u6c11\u6709\u4e09\u5341\u53ea\u9e21\u548c\u4e8c\u5341\u5934\u732a\u95ee\u5171\u6709\u591a\u5c11\u53ea\u811a"
    other = "\u5c0f\u660e\u6bcf\u5929\u8d70\u8def\u53bb\u5b66\u6821\u8981\u82b1\u8d39\u534a\u4e2a\u5c0f\u65f6\u95ee\u4e00\u5468\u82b1\u591a\u4e45"
    assert overlapping(["\u8bf7\u95ee\uff1a" + question + "\u3002", other], [question]) == [0]


def test_held_out_prompts_of_all_domains_count_for_all():
    found = search({"law": [TALE], "code": [OTHER]}, {"law": [OTHER], "code": [TALE]})
    assert {name: [row.held_out for row in domain.held_out] for name, domain in found.items()} == {"law": ["code/held_out:0"], "code": ["law/held_out:0"]}


# What does not count


def test_a_system_turn_in_common_is_no_overlap():
    training = [[("system", TALE), ("user", "what is 2+2")]]
    assert overlapping(training, [[("system", TALE), ("user", "what is 3+3")]]) == []


@pytest.mark.parametrize("size", [5, 2000])
def test_an_instruction_that_all_rows_share_is_no_overlap(size):
    """With few rows by its share, with many by its number; what follows it begins with the same word now and then."""
    rng = random.Random(0)

    def rows(count: int, seed: int) -> list[str]:
        return [f"{INSTRUCTION} {rng.choice(['the', 'a', 'one', 'two'])} {text}" for text in fillers(count, words=20, seed=seed)]

    assert overlapping(rows(size, 1), rows(max(3, size // 10), 2)) == []


def test_one_of_several_instructions_is_no_overlap():
    """Twenty instructions, each of a twentieth of the rows: no share to speak of on the held-out side, which has each once or twice."""
    instructions = fillers(20, words=16)
    training = [f"{instructions[index % 20]} {text}" for index, text in enumerate(fillers(400, words=6, seed=1))]
    held_out = [f"{instructions[index % 20]} {text}" for index, text in enumerate(fillers(30, words=6, seed=2))]
    assert overlapping(training, held_out) == []


def test_a_held_out_question_behind_a_shared_instruction_is_found():
    training = [f"{INSTRUCTION} {text}" for text in [*fillers(30, seed=1), TALE]]
    assert overlapping(training, [f"{INSTRUCTION} {text}" for text in [*fillers(9, seed=2), "now " + TALE]]) == [30]


PHRASE = " ".join(INSTRUCTION.split()[:13])


@pytest.mark.parametrize(("taken", "is_overlap"), [(0, True), (1, False)])
@pytest.mark.parametrize("is_before", [True, False])
def test_the_shared_words_begin_behind_boilerplate_and_end_before_it(taken, is_overlap, is_before):
    """13 shared words that touch a phrase of all rows, or take one word of it."""
    question, phrase = TALE.split(), PHRASE.split()
    if is_before:
        held_out, row = [*phrase, *question], ["so", *phrase[13 - taken :], *question[: 13 - taken], "end"]
    else:
        held_out, row = [*question, *phrase], ["so", *question[22 - 13 + taken :], *phrase[:taken], "end"]
    training = [*(f"{PHRASE} {text}" for text in fillers(20, seed=1)), " ".join(row)]
    assert overlapping(training, [*fillers(9, seed=2), " ".join(held_out)]) == ([20] if is_overlap else [])


@pytest.mark.parametrize(("with_phrase", "rows", "is_boilerplate"), [(3, 6, True), (3, 7, False), (2, 2, False), (10, 40, False), (11, 40, True)])
def test_boilerplate_is_in_more_than_ten_rows_or_in_half_of_them_and_three(with_phrase, rows, is_boilerplate):
    texts = fillers(rows, seed=1)
    training = [*(f"{PHRASE} {text}" for text in texts[:with_phrase]), *texts[with_phrase:]]
    assert overlapping(training, [*fillers(30, seed=2), f"{PHRASE} {OTHER}"]) == ([] if is_boilerplate else list(range(with_phrase)))


@pytest.mark.parametrize(("with_phrase", "rows", "is_boilerplate"), [(3, 6, True), (3, 7, False), (2, 2, False)])
def test_a_phrase_in_half_of_the_held_out_prompts_and_three_is_boilerplate(with_phrase, rows, is_boilerplate):
    texts = fillers(rows, seed=1)
    held_out = [*(f"{PHRASE} {text}" for text in texts[:with_phrase]), *texts[with_phrase:]]
    assert overlapping([*fillers(30, seed=2), f"{PHRASE} {OTHER}"], held_out) == ([] if is_boilerplate else [30])


def test_a_question_copied_with_many_endings_is_found():
    """More than ten different rows have it, so its 13-grams are as frequent as an instruction's."""
    training = [*fillers(300, seed=1), *(f"{TALE} and then {ending}" for ending in fillers(40, words=1, seed=2))]
    assert overlapping(training, [*fillers(20, seed=3), TALE]) == list(range(300, 340))


def test_a_row_repeated_often_does_not_become_boilerplate():
    assert overlapping([*fillers(50), *["so " + TALE] * 50], [*fillers(5, seed=1), TALE + " day"]) == list(range(50, 100))


@pytest.mark.parametrize("symbols", ["01", "()["])
def test_rows_of_a_few_symbols_meet_by_chance(symbols):
    rng = random.Random(0)
    training, held_out = ([" ".join(rng.choices(symbols, k=40)) for _ in range(size)] for size in (500, 50))
    assert {gram for text in training for gram in grams(text)} & {gram for text in held_out for gram in grams(text)}
    assert overlapping(training, held_out) == []


def test_nothing_is_found_where_nothing_is_held_out():
    assert search({"law": [TALE, TALE], "code": []}, {})["law"] == DomainOverlap(duplicates_within=1)


def test_the_embedded_domains_are_clean():
    """Also one against the held-out prompts of another, and no prompt comes twice."""
    training = {name: [row["prompt"] for row in synthetic_rows(name, "train", 1500)] for name in SYNTHETIC_DOMAINS}
    held_out = {name: [row["prompt"] for row in synthetic_rows(name, "held_out", 500)] for name in SYNTHETIC_DOMAINS}
    assert set(search(training, held_out).values()) == {DomainOverlap()}


def test_a_search_in_parts_finds_what_one_in_a_whole_does(monkeypatch):
    rng = random.Random(0)
    phrases = fillers(60, words=16)
    training, held_out = ([random_text(rng, phrases) for _ in range(size)] for size in (60, 12))
    whole = search({"law": training}, {"law": held_out})
    monkeypatch.setattr("rollout.overlap.ROWS_AT_ONCE", 7)
    assert search({"law": training}, {"law": held_out}) == whole
    assert whole["law"].held_out
