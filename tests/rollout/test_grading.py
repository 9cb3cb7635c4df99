"""Graders: completion and reference answer to a score in [0, 1], without a process."""

import ast
import inspect
import sys

import pytest

import rollout.graders
from rollout.config import PromptsConfig
from rollout.grader_config import GraderKind
from rollout.graders import last_number
from rollout.grading import GRADERS, grade, grade_rollout, grader_identity, require_gradable
from rollout.prompts import DomainPrompts

ROW = "law/prompts:7"


def score(grader, completion: str, answer: str) -> float:
    return grade(grader, completion, answer, ROW)


def prompts_with(answer: str | None) -> dict[str, DomainPrompts]:
    """One row, the second of its source."""
    return {"law": DomainPrompts(name="law", cfg=PromptsConfig(), sources={"prompts": [{"index": 1, "tokens": [1], "answer": answer, "slip": None}]})}


@pytest.mark.parametrize(("completion", "score"), [("42", 1.0), (" 42\n", 1.0), ("4 2", 0.0), ("420", 0.0), ("", 0.0)])
def test_exact_compares_the_strings_without_outer_white_space(completion, score):
    assert grade(GraderKind.exact, completion, "42", "law:0") == score


def test_an_answer_with_outer_white_space_is_stripped_too():
    assert grade("exact", "42", " 42 ", "law:0") == 1.0


def test_a_row_without_answer_is_refused_by_name():
    with pytest.raises(ValueError, match="row law/prompts:7 has no answer"):
        grade("exact", "42", None, "law/prompts:7")


def test_every_grader_that_can_be_configured_exists():
    assert set(GRADERS) == set(GraderKind)


def test_a_failure_names_the_domain_and_the_row_of_the_rollout(make_rollout, tokenizer):
    rollout = make_rollout("law", [1, 2], [5, 6], request=3, answer="none")
    with pytest.raises(ValueError, match=r"the grader \(numeric\) failed on a completion of row law/prompts:3: the answer 'none' holds no number"):
        grade_rollout("numeric", rollout, tokenizer)


def test_no_shipped_grader_can_execute_or_import_anything():
    """By its source: what it imports is four modules that compute on text, and what it calls is none of the ways to execute one."""
    tree = ast.parse(inspect.getsource(rollout.graders))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"json", "re", "collections", "collections.abc", "decimal", "typing", "rollout.self_repair"}
    assert not {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & {"eval", "exec", "compile", "__import__", "open"}


# backspace


def test_backspace_compares_what_is_left():
    assert [score("backspace", text, "123") for text in ("123", "13<23 ", "132", "123<")] == [1, 1, 0, 0]


# numeric


@pytest.mark.parametrize(("text", "number"), [
    ("42", "42"), ("the answer is 42.", "42"), ("3, then 4", "4"), ("1,234,567", "1234567"), ("1,234,567.5 EUR", "1234567.5"), ("1,23", "23"),
    ("1,2345", "2345"), ("-3", "-3"), ("+3", "3"), ("\u22123", "-3"), ("10-3", "3"), ("10 -3", "-3"), ("x=-3", "-3"), ("x-3", "3"), ("(1)-3", "3"),
    ("$12", "12"), ("50%", "50"), ("42km", "42"), ("1.5e-3", "0.0015"), ("2E3", "2000"), ("2e", "2"), (".5", "0.5"), ("-.5", "-0.5"), ("so...5", "5"),
    ("3/4", "0.75"), ("-3/4", "-0.75"), ("1,000/4", "250"), ("7 = \\boxed{8}", "8"), ("\u7b54\u6848\u662f42", "42"), ("9 x2", "9"), ("-0", "0"),
])  # fmt: skip
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == last_number(number)
    assert float(last_number(text)) == float(number)


@pytest.mark.parametrize("text", ["", "none", "nan", "inf", "-Infinity", "x2", "1/0", "0/0", "1e9999999999999999999", "\u0661\u0662"])
def test_what_is_no_finite_number_is_none(text):
    assert last_number(text) is None


@pytest.mark.parametrize("completion", ["nan", "inf", "1e9999999999999999999", "1/0", "no idea"])
def test_what_is_no_finite_number_equals_nothing(completion):
    assert score({"kind": "numeric", "tolerance": 1e300}, completion, "1") == 0


def test_numbers_are_equal_by_value_and_not_by_their_text():
    assert [score("numeric", text, "1000") for text in ("1,000.0", "1e3", "2000/2", "+1000", "999.999", "1,000.0001")] == [1, 1, 1, 1, 0, 0]


def test_long_whole_numbers_are_not_rounded_together():
    assert float("12345678901234567890") == float("12345678901234567891"), "as floats they are one"
    assert score("numeric", "12345678901234567890", "12345678901234567891") == 0
    assert score("numeric", "9" * 100, "9" * 99 + "8") == 0


@pytest.mark.parametrize(("settings", "equal", "unequal"), [
    ({"tolerance": 0.01}, ["100", "100.01", "99.99"], ["100.0101", "99.98"]),
    ({"relative_tolerance": 0.01}, ["100", "101", "99"], ["101.001", "98.9"]),
    ({"tolerance": 2, "relative_tolerance": 0.01}, ["102", "98"], ["102.1"]),
    ({"tolerance": 1e-6}, ["100.000001"], ["100.0000011"]),
])  # fmt: skip
def test_the_larger_tolerance_holds_to_the_last_digit(settings, equal, unequal):
    grader = {"kind": "numeric"} | settings
    assert [score(grader, text, "100") for text in equal + unequal] == [1] * len(equal) + [0] * len(unequal)


def test_a_relative_tolerance_is_of_the_size_of_a_negative_answer():
    assert [score({"kind": "numeric", "relative_tolerance": 0.01}, text, "-100") for text in ("-101", "-102", "101")] == [1, 0, 0]


def test_an_answer_that_reasons_first_is_its_last_number():
    assert score("numeric", "so 18", "9 * 2 = 18\n#### 18") == 1


def test_a_huge_exponent_takes_no_time_or_memory():
    assert score("numeric", "1e999999999999", "1") == 0
    assert score({"kind": "numeric", "relative_tolerance": 0.5}, "1e-999999999999", "1e999999999999") == 0


# json


@pytest.mark.parametrize(("completion", "answer", "same"), [
    ('{"a": 1, "b": [1, 2]}', '{"b":[1,2],"a":1}', 1), ("1", "1.0", 1), ("10e-1", "1", 1), ("-0", "0", 1), ("true", "1", 0), ("[true]", "[1]", 0),
    ("null", "0", 0), ('"1"', "1", 0), ("[1, 2]", "[2, 1]", 0), ("[1]", "1", 0), ("{}", "[]", 0), ('{"a": null}', "{}", 0), ('{"a": 1, "a": 1}', '{"a": 1}', 0),
    ("", "1", 0), ("NaN", "1", 0), ("1e400", "1e401", 0), ("0.1", "0.10", 1), ("12345678901234567890", "12345678901234567891", 0),
    (' {"a": 1}\n', '{"a": 1}', 1),
    ('{"a": 1} {"a": 1}', '{"a": 1}', 0), ('```json\n{"a": 1}\n```', '{"a": 1}', 0), ("{'a': 1}", '{"a": 1}', 0), ("1e9999999999999999999", "1", 0),
    ('"\\u00e9"', '"\u00e9"', 1), ('{"a": [{"b": true}]}', '{"a": [{"b": true}]}', 1),
])  # fmt: skip
def test_json_is_compared_by_value(completion, answer, same):
    assert score("json", completion, answer) == same


@pytest.mark.parametrize(("completion", "answer", "same"), [
    ("[1, 2, 2]", "[2, 1, 2]", 1), ("[1, 2, 2]", "[1, 1, 2]", 0), ('[{"a": [1, 2]}, 3]', '[3, {"a": [2, 1]}]', 1), ("[[1], [2]]", "[[2], [1]]", 1),
    ("[1]", "[1, 1]", 0),
])  # fmt: skip
def test_arrays_in_any_order_hold_the_same_members_as_often(completion, answer, same):
    assert score({"kind": "json", "ignore_order": True}, completion, answer) == same


@pytest.mark.parametrize("kind", ["json", "tool_call"])
def test_a_completion_nested_beyond_measure_is_a_wrong_answer(kind):
    deep = sys.getrecursionlimit() * 10
    assert score(kind, "[" * deep + "]" * deep, '{"name": "f"}') == 0
    assert score(kind, "[" * 600 + "]" * 600, '{"name": "f"}') == 0


# tool_call

CALL = '{"name": "add", "arguments": {"a": 1, "b": [1, 2]}}'


@pytest.mark.parametrize(("completion", "same"), [
    (CALL, 1), ('{"arguments": {"b": [1, 2], "a": 1.0}, "name": "add"}', 1), (f"[{CALL}]", 1), (f"[{CALL}, {CALL}]", 0),
    ('{"id": "call_7", "type": "function", "function": {"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": [1, 2]}"}}', 1),
    ('{"name": "sub", "arguments": {"a": 1, "b": [1, 2]}}', 0), ('{"name": "add", "arguments": {"a": 1}}', 0),
    ('{"name": "add", "arguments": {"a": 1, "b": [2, 1]}}', 0),
    ('{"name": "add"}', 0), ('{"name": "add", "arguments": "add(1)"}', 0), ('{"name": "add", "arguments": [1]}', 0), ("add(1, [1, 2])", 0), ("[]", 0), ("7", 0),
    ('{"name": 7, "arguments": {}}', 0),
])  # fmt: skip
def test_calls_are_compared_by_name_and_arguments(completion, same):
    assert score("tool_call", completion, CALL) == same


def test_a_call_without_arguments_is_one_with_none():
    assert score("tool_call", '{"name": "now"}', '{"name": "now", "arguments": {}}') == 1


def test_the_order_of_calls_counts_unless_it_is_ignored_and_that_of_arguments_always():
    calls = ['{"name": "f", "arguments": {"a": [1, 2]}}', '{"name": "g"}']
    turned, changed = f"[{calls[1]}, {calls[0]}]", f"[{calls[0].replace('1, 2', '2, 1')}, {calls[1]}]"
    assert [score("tool_call", text, f"[{', '.join(calls)}]") for text in (turned, changed)] == [0, 0]
    assert [score({"kind": "tool_call", "ignore_order": True}, text, f"[{', '.join(calls)}]") for text in (turned, changed)] == [1, 0]


# What a run refuses at its start


@pytest.mark.parametrize(("kind", "answer", "sentence"), [
    ("numeric", "many", "the answer 'many' holds no number, which kind=numeric needs: correct row law/prompts:1"),
    ("json", "{", "the answer '{' is not JSON"), ("json", '{"a": 1, "a": 2}', "is not JSON"), ("tool_call", "add(1)", "is not a tool call such as"),
    ("exact", None, "row law/prompts:1 has no answer to grade against"),
])  # fmt: skip
def test_an_answer_that_the_grader_cannot_read_is_refused_by_its_row(kind, answer, sentence):
    with pytest.raises(ValueError, match=r"law/prompts:1") as refusal:
        require_gradable(prompts_with(answer), {"law": kind})
    assert sentence in str(refusal.value)


def test_readable_answers_and_domains_that_are_not_graded_pass():
    require_gradable(prompts_with("2"), {"law": "numeric"})
    require_gradable(prompts_with(None), {"law": None})


@pytest.mark.parametrize(("grader", "identity"), [
    (None, None), ("exact", "exact"), (GraderKind.exact, "exact"), ({"kind": "exact"}, "exact"), ("backspace", "backspace"),
    ("numeric", {"kind": "numeric", "tolerance": 0.0, "relative_tolerance": 0.0}),
    ({"kind": "regex", "pattern": "a"}, {"kind": "regex", "pattern": "a", "seconds": 5.0, "memory_mib": 1024}),
])  # fmt: skip
def test_the_identity_of_a_grader_is_its_kind_and_all_settings_that_it_has(grader, identity):
    assert grader_identity(grader) == identity
