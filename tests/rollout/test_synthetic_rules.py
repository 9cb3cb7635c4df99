"""The rules of the embedded domains: right answers by another implementation, well-formed slips from one misconception, at every difficulty."""

import datetime
import itertools
import json
import re
from collections import Counter, deque

import pytest

from rollout.self_repair import RepairedAnswer, after_backspaces
from rollout.synthetic import SYNTHETIC_DOMAINS, synthetic_rows
from rollout.synthetic_rules import DIFFICULTIES, LONGEST_ANSWER

ROWS = {1: 1000, 2: 300, 3: 300}
"""Rows of each split that are looked at, by difficulty."""


@pytest.fixture(params=itertools.product(SYNTHETIC_DOMAINS, DIFFICULTIES), ids=lambda param: f"{param[0]}-{param[1]}", scope="module")
def case(request) -> tuple[str, int]:
    return request.param


@pytest.fixture(scope="module")
def domain(case) -> str:
    return case[0]


@pytest.fixture(scope="module")
def rows(case) -> list[dict]:
    name, difficulty = case
    return [row for split in ("train", "held_out") for row in synthetic_rows(name, split, ROWS[difficulty], difficulty)]


def question_of(row: dict) -> str:
    return row["prompt"][2:-1]


def add_on_paper(question: str, flips_first_carry: bool = False) -> str:
    """Column by column from the right with a carry, written down in that order."""
    left, right = question.split("+")
    written, carry = "", 0
    for place, (upper, lower) in enumerate(zip(reversed(left), reversed(right), strict=True)):
        column = int(upper) + int(lower) + carry
        written += str(column % 10)
        carry = int((column > 9) != (flips_first_carry and place == 0))
    return f"{written}{carry}"


def sort_by_counting(question: str) -> str:
    return "".join(digit * question.count(digit) for digit in "0123456789")


def close_brackets(question: str) -> str:
    """Whatever closes the innermost open bracket, until none is open."""
    opened, written = list(question), ""
    while opened:
        written += {"(": ")", "[": "]", "{": "}", "<": ">"}[opened.pop()]
    return written


def call_tools(question: str, swaps: bool = True) -> str:
    (first, own), (second, other) = re.findall(r"([a-z])(\d+)", question)
    return "{" + f"{second}({own if swaps else other})" + ";" + f"{first}({other if swaps else own})" + "}"


def multiply_by_adding(question: str) -> str:
    factor, modulus, digits = re.fullmatch(r"(\d)\|(\d)\*(\d+)", question).groups()
    written = ""
    for digit in map(int, digits):
        total = 0
        for _ in range(int(factor)):
            total += digit
            while total >= int(modulus):
                total -= int(modulus)
        written += str(total)
    return written


def count_on(question: str) -> str:
    factor, modulus, digits = re.fullmatch(r"(\d)\|(\d)\*(\d+)", question).groups()
    clock = [str(hour) for hour in range(int(modulus))] * 20
    return "".join(clock[int(digit) :][int(factor)] for digit in digits)


def rotate(question: str, counted_from: int = 0) -> str:
    text, offset = question.split("+")
    letters = deque(text)
    letters.rotate(counted_from - int(offset))
    return "".join(letters)


def parity_by_turns(question: str) -> str:
    """Every odd digit turns the parity over."""
    turns = itertools.accumulate((digit in "13579" for digit in question), lambda parity, is_odd: parity != is_odd)
    return "".join("1" if parity else "0" for parity in turns)


def convert_whole_number(question: str) -> str:
    """As one number, divided by four until nothing is left."""
    number, written = int(question, 16), ""
    while number:
        number, digit = divmod(number, 4)
        written = f"{digit}{written}"
    return written.rjust(2 * len(question), "0")


def repair_by_trying(question: str) -> str:
    """The one text that is JSON of the form asked for and has one structural character more than the question."""
    tried = {question[:place] + character + question[place:] for place in range(len(question) + 1) for character in '{}[]":'}
    [repaired] = [text for text in tried if re.fullmatch(r'\{"[a-z]":\[\d(,\d)+\]\}', text)]
    json.loads(repaired)
    return repaired


def look_up_weekdays(question: str, days_early: int = 0) -> str:
    """In the calendar of a real month: 2024 began with a Monday."""
    days, weekdays = question.split("+")
    written = ""
    for weekday in weekdays:
        date = datetime.date(2024, 1, 1 + "mtwrfsu".index(weekday)) + datetime.timedelta(int(days) - days_early)
        written += {"Mon": "m", "Tue": "t", "Wed": "w", "Thu": "r", "Fri": "f", "Sat": "s", "Sun": "u"}[date.ctime()[:3]]
    return written


def encode_runs(question: str, left_out: int = 0) -> str:
    return "".join(f"{letter}{len(list(run)) - left_out}" for letter, run in itertools.groupby(question))


def blank_matches(question: str) -> str:
    pattern, text = question[:5], question[5:]
    return re.sub(pattern, "_", text)


ORACLES = {
    "arithmetic": add_on_paper, "sorting": sort_by_counting, "brackets": close_brackets, "tools": call_tools, "modular": multiply_by_adding,
    "copying": rotate, "parity": parity_by_turns, "bases": convert_whole_number, "json_repair": repair_by_trying, "calendar": look_up_weekdays,
    "run_length": encode_runs, "regex": blank_matches, "backspace": sort_by_counting,
}  # fmt: skip
MISCONCEPTIONS = {
    "arithmetic": lambda question: add_on_paper(question, flips_first_carry=True),
    "sorting": lambda question: sort_by_counting(question)[::-1],
    "brackets": lambda question: question[::-1],
    "tools": lambda question: call_tools(question, swaps=False),
    "modular": count_on,
    "copying": lambda question: rotate(question, counted_from=1),
    "parity": lambda question: "".join("1" if digit in "13579" else "0" for digit in question),
    "bases": lambda question: re.sub("(.)(.)", r"\2\1", convert_whole_number(question)),
    "json_repair": lambda question: str(json.loads(repair_by_trying(question))).replace(" ", ""),
    "calendar": lambda question: look_up_weekdays(question, days_early=1),
    "run_length": lambda question: encode_runs(question, left_out=1),
    "regex": lambda question: blank_matches(question.replace("-", "|", 1)),
}
"""Of every domain but backspace, whose slips are mistyped digits."""
LETTERS = {
    "arithmetic": "A", "sorting": "S", "brackets": "B", "tools": "T", "modular": "M", "copying": "C", "parity": "P", "bases": "N", "json_repair": "J",
    "calendar": "D", "run_length": "R", "regex": "X", "backspace": "E",
}  # fmt: skip
WELL_FORMED = {
    "arithmetic": r"\d{2,4}[012]", "sorting": r"\d{6,10}", "brackets": r"[)\]}>]{5,13}|[(\[{<]{5,13}", "tools": r"\{[a-z]\(\d{1,3}\);[a-z]\(\d{1,3}\)\}",
    "modular": r"[0-6]{4,8}", "copying": r"[a-z]{6,10}", "parity": r"[01]{7,11}", "bases": r"[0-3]{8,12}",
    "json_repair": r"""\{(["'])[a-z]\1:\[\d(,\d){1,3}\]\}""", "calendar": r"[mtwrfsu]{5,7}", "run_length": r"([a-f][0-3]){4,6}", "regex": r"[a-j_]{6,10}",
    "backspace": r"\d{6,10}",
}  # fmt: skip


def test_a_prompt_begins_with_its_domains_letter_and_ends_in_an_equals_sign(domain, rows):
    assert all(re.fullmatch(rf"{LETTERS[domain]}:[^=]+=", row["prompt"]) for row in rows)


def test_each_domain_has_a_letter_of_its_own():
    assert {name: domain.letter for name, domain in SYNTHETIC_DOMAINS.items()} == LETTERS
    assert len(set(LETTERS.values())) == len(LETTERS)


def test_questions_are_of_small_letters_without_spaces(rows):
    """Prompts are compared without regard to either: two that differ in nothing else could come to different splits."""
    assert all(question_of(row) == question_of(row).lower() and " " not in row["prompt"] for row in rows)


def test_answers_are_right(domain, rows):
    for row in rows:
        assert row["answer"] == ORACLES[domain](question_of(row))


def test_slips_are_wrong_and_well_formed(domain, rows):
    for row in rows:
        assert row["slip"] != row["answer"]
        assert len(row["slip"]) == len(row["answer"])
        assert re.fullmatch(WELL_FORMED[domain], row["slip"])
        assert re.fullmatch(WELL_FORMED[domain], row["answer"])


def test_a_slip_is_what_the_domains_misconception_gives_unless_that_is_right(domain, rows):
    for row in rows if domain in MISCONCEPTIONS else ():
        assert MISCONCEPTIONS[domain](question_of(row)) in (row["slip"], row["answer"])


def test_the_slips_of_backspace_are_wrong_now_here_now_there_and_by_any_digit():
    """600 slips of six digits: one place is wrong for certain, and each of the others by a fifth."""
    rows = synthetic_rows("backspace", "train", 600)
    pairs = [(place, int(slip) - int(right)) for row in rows for place, (slip, right) in enumerate(zip(row["slip"], row["answer"], strict=True))]
    wrong = [(place, distance) for place, distance in pairs if distance]
    assert len(wrong) == pytest.approx(600 * (1 + 5 * 0.2), abs=5 * (600 * 5 * 0.16) ** 0.5)
    assert all(count > 600 * 2 / 6 / 1.5 for count in Counter(place for place, _ in wrong).values())
    assert {distance for _, distance in wrong} == {*range(-9, 10)} - {0}


@pytest.mark.parametrize(("name", "question", "slip"), [
    ("sorting", "777777", "777778"), ("tools", "a5b5", "{b(6);a(5)}"), ("parity", "2468085", "0000000"),
    ("parity", "2468084", "0000001"), ("bases", "05af", "00112230"), ("modular", "2|5*2222", "4440"),
])  # fmt: skip
def test_where_the_misconception_is_right_the_slips_last_character_is_another(name, question, slip):
    domain = SYNTHETIC_DOMAINS[name]
    assert MISCONCEPTIONS[name](question) == ORACLES[name](question) == domain.answer(question)
    assert domain.slip(question) == slip


def test_no_answer_is_longer_than_sixteen_characters(rows):
    assert LONGEST_ANSWER == 16
    assert max(len(row["answer"]) for row in rows) <= LONGEST_ANSWER


def test_no_answer_is_guessed(rows):
    """The most frequent answer of a domain is right for less than one prompt in twenty."""
    [(_, count)] = Counter(row["answer"] for row in rows).most_common(1)
    assert count < len(rows) / 20


@pytest.mark.parametrize("name", SYNTHETIC_DOMAINS)
def test_questions_become_longer_with_difficulty(name):
    lengths = [sum(len(row["prompt"]) for row in synthetic_rows(name, "train", 100, difficulty)) for difficulty in DIFFICULTIES]
    assert lengths == sorted(set(lengths))


def test_repaired_answers_come_to_the_answer(domain, rows):
    repaired = [row["repaired"] for row in rows if "repaired" in row]
    assert len(repaired) == (len(rows) if domain == "backspace" else 0)
    assert all(isinstance(text, RepairedAnswer) for text in repaired)
    assert all(after_backspaces(row["repaired"].text) == row["answer"] for row in rows if "repaired" in row)
