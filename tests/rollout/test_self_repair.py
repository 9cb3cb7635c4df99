"""Backspaces, and answers with errors that are taken back."""

import random
import re

import pytest

from rollout.self_repair import ERROR_RATE, MOST_ERRORS, after_backspaces, mistyped, repaired_answer

DIGITS = "0123456789"


@pytest.mark.parametrize(("text", "left"), [("", ""), ("123", "123"), ("13<2", "12"), ("19<8<2", "12"), ("198<<2", "12"), ("12<<", ""), ("<<12", "12"),
                                            ("1<<2", "2"), ("123<", "12")])  # fmt: skip
def test_a_backspace_takes_back_the_character_before_it_if_there_is_one(text, left):
    assert after_backspaces(text) == left


def test_backspaces_give_what_taking_pairs_out_gives():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choice("ab<") for _ in range(12))
        by_pairs = text
        while (shorter := re.sub("^<|[^<]<", "", by_pairs, count=1)) != by_pairs:
            by_pairs = shorter
        assert after_backspaces(text) == by_pairs


@pytest.fixture(scope="module")
def cases() -> list[tuple[str, object]]:
    rng = random.Random(0)
    answers = ["".join(rng.choices(DIGITS, k=rng.choice([1, 6, 10]))) for _ in range(1000)]
    return [(answer, repaired_answer(answer, DIGITS, rng)) for answer in answers]


def test_the_repaired_text_comes_to_the_answer(cases):
    assert all(after_backspaces(repaired.text) == answer for answer, repaired in cases)


def test_every_row_has_an_error_and_none_more_than_the_most(cases):
    assert {len(repaired.errors) for _, repaired in cases} == set(range(1, MOST_ERRORS + 1))


def test_without_its_errors_and_backspaces_the_text_is_the_answer(cases):
    for answer, repaired in cases:
        kept = [character for place, character in enumerate(repaired.text) if place not in repaired.errors and character != "<"]
        assert "".join(kept) == answer


def test_the_errors_are_the_characters_that_are_taken_back(cases):
    """Each backspace takes the last position that is still there."""
    for _, repaired in cases:
        there, taken = [], []
        for place, character in enumerate(repaired.text):
            if character == "<":
                taken.append(there.pop())
            else:
                there.append(place)
        assert sorted(taken) == list(repaired.errors)


def test_an_error_differs_from_the_character_that_belongs_there(cases):
    """The first of a stretch does; what is typed after it is wrong whatever it is."""
    for answer, repaired in cases:
        for place in repaired.errors:
            if place - 1 not in repaired.errors:
                assert repaired.text[place] != answer[len(after_backspaces(repaired.text[:place]))]


def test_errors_come_singly_and_in_stretches_at_every_place(cases):
    stretches = {len(stretch) for _, repaired in cases for stretch in re.findall("<+", repaired.text)}
    assert {1, 2, 3} <= stretches
    first_places = {repaired.errors[0] for answer, repaired in cases if len(answer) == 6}
    assert first_places == set(range(6))


def test_a_mistyped_answer_has_an_error_at_least_and_others_by_chance_and_is_as_long():
    rng = random.Random(0)
    answers = ["".join(rng.choices(DIGITS, k=8)) for _ in range(1000)]
    errors = [sum(one != other for one, other in zip(answer, mistyped(answer, DIGITS, rng), strict=True)) for answer in answers]
    assert min(errors) == 1
    assert sum(errors) == pytest.approx(1000 * (1 + 7 * ERROR_RATE), abs=5 * (7000 * ERROR_RATE * (1 - ERROR_RATE)) ** 0.5)
