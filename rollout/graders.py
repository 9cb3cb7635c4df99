"""The shipped graders: completion and reference answer to 1 (right) or 0 (wrong). Pure functions of two texts, which import little but the standard
library, since the grader's process (rollout/grader_worker.py) imports them too. None executes, imports or evaluates anything of what a model wrote.

    exact       the same text, white space at both ends aside
    backspace   the same text after each `<` of the completion has taken back the character before it, or nothing at the beginning
    numeric     the last number of the completion and the last one of the answer are equal. A number is
                    sign (+, - or U+2212, directly before it, and not directly after a letter, digit or closing bracket: the last number of 10-3 is 3),
                    digits, in groups of three where commas divide them (1,234; but 1,23 is 1 and 23), a decimal part, an exponent (1.5e-3),
                    and perhaps a slash and an unsigned number: 3/4 is 0.75, and by zero is no number. Currency, units and % are no part of it.
                    Digits that follow an ASCII letter (x2) are no number; nan and inf are none, nor is what no Decimal can hold.
                Arithmetic is decimal with 50 digits, so that long whole numbers are not rounded together. Equal: |a - b| <= max(tolerance,
                relative_tolerance |b|), b the answer
    json        the same JSON value: numbers by value (1, 1.0 and 10e-1 are one), true is not 1, the order of an object's keys does not count, that of an
                array does unless ignore_order. A completion that is not JSON, holds a key twice, NaN or Infinity, or is nested too deeply, is wrong
    tool_call   the same calls in the same order (unless ignore_order). A call is {"name": N, "arguments": A}, or that under "function" of an object
                with other keys (id, type), which do not count; A is an object or the JSON text of one, {} where it is left out. One call is an array of one
    regex       what the last match of the pattern finds in the completion (its group, or all of it) is the same text as the answer
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from typing import Any

from rollout.self_repair import after_backspaces

_PART = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|(?<![0-9.])\.[0-9]+(?:[eE][+-]?[0-9]+)?"
_NUMBER = re.compile(rf"(?:(?<![A-Za-z0-9_)\]}}])(?P<sign>[+-]))?(?<![A-Za-z0-9_])(?P<above>{_PART})(?:/(?P<below>{_PART}))?")
_ARITHMETIC = Context(prec=50, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])
"""Without traps: what cannot be computed is NaN or infinite, and equals nothing."""


def exact(completion: str, answer: str) -> float:
    """1 where the two are the same text."""
    return float(completion.strip() == answer.strip())


def backspace(completion: str, answer: str) -> float:
    """1 where the two are the same text once the completion's backspaces have worked."""
    return exact(after_backspaces(completion), answer)


def numeric(completion: str, answer: str, tolerance: float = 0.0, relative_tolerance: float = 0.0) -> float:
    """1 where the last numbers of the two are equal. Raises ValueError for an answer without a number."""
    found, wanted = last_number(completion), require_number(answer)
    if found is None:
        return 0.0
    allowed = max(Decimal(str(tolerance)), _ARITHMETIC.multiply(Decimal(str(relative_tolerance)), wanted.copy_abs()))
    return float(found == wanted or _ARITHMETIC.subtract(found, wanted).copy_abs() <= allowed)


def last_number(text: str) -> Decimal | None:
    """The last number of a text; None where there is none, or where it is not finite."""
    last = None
    for match in _NUMBER.finditer(text.replace("\u2212", "-")):
        last = match
    if last is None:
        return None
    value = _decimal(last["above"])
    if last["below"] is not None:
        value = _ARITHMETIC.divide(value, _decimal(last["below"]))
    if not value.is_finite():
        return None
    return value.copy_negate() if last["sign"] == "-" else value


def require_number(answer: str) -> Decimal:
    """The last number of a reference answer. Raises ValueError where there is none."""
    value = last_number(answer)
    if value is None:
        raise ValueError(f"the answer {_short(answer)} holds no number")
    return value


def same_json(completion: str, answer: str, ignore_order: bool = False) -> float:
    """1 where the two are the same JSON value. Raises ValueError for an answer that is none."""
    return _same(completion, require_json(answer, ignore_order), lambda text: _canonical(_parse(text), ignore_order))


def require_json(answer: str, ignore_order: bool = False) -> Any:
    """A reference answer as a value that compares and hashes as JSON values do. Raises ValueError where it is no JSON."""
    return _required(answer, lambda text: _canonical(_parse(text), ignore_order), "JSON")


def same_calls(completion: str, answer: str, ignore_order: bool = False) -> float:
    """1 where the two are the same tool calls. Raises ValueError for an answer that is none."""
    return _same(completion, require_calls(answer, ignore_order), lambda text: _calls(text, ignore_order))


def require_calls(answer: str, ignore_order: bool = False) -> Any:
    """The calls of a reference answer, in the same form. Raises ValueError where it holds none."""
    return _required(answer, lambda text: _calls(text, ignore_order), 'a tool call such as {"name": "add", "arguments": {"a": 1}}')


def regex(completion: str, answer: str, pattern: str) -> float:
    """1 where what the pattern finds is the answer. A pattern may take for ever: only the grader's process calls this."""
    last = None
    for match in re.finditer(pattern, completion):
        last = match
    found = None if last is None else last[last.re.groups]  # group 0 is the whole match
    return 0.0 if found is None else exact(found, answer)


def _decimal(digits: str) -> Decimal:
    try:
        return Decimal(digits.replace(",", ""))
    except ArithmeticError:  # an exponent beyond what a Decimal holds
        return Decimal("NaN")


def _same(completion: str, wanted: Any, read: Callable[[str], Any]) -> float:
    try:
        return float(read(completion) == wanted)
    except (ValueError, RecursionError):  # the completion is not of the form: a wrong answer, and no error of ours
        return 0.0


def _required(answer: str, read: Callable[[str], Any], form: str) -> Any:
    try:
        return read(answer)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the answer {_short(answer)} is not {form}") from error


def _parse(text: str) -> Any:
    """The JSON value of a text, its numbers as Decimals. Raises ValueError where it is none, or has a key twice; RecursionError where it is too deep."""
    try:
        return json.loads(text.strip(), parse_int=Decimal, parse_float=Decimal, parse_constant=_refuse, object_pairs_hook=_object)
    except ArithmeticError as error:
        raise ValueError("a number is beyond all measure") from error


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return found


def _canonical(value: Any, ignore_order: bool) -> Any:
    """A JSON value as one that hashes, equal where the JSON values are: comparing unordered arrays pair by pair would take the square of their length."""
    if isinstance(value, dict):
        return ("object", frozenset((key, _canonical(member, ignore_order)) for key, member in value.items()))
    if isinstance(value, list):
        return _array([_canonical(member, ignore_order) for member in value], ignore_order)
    return ("literal", value) if isinstance(value, bool) else value


def _array(members: list[Any], ignore_order: bool) -> tuple[str, Any]:
    return ("array", frozenset(Counter(members).items()) if ignore_order else tuple(members))


def _calls(text: str, ignore_order: bool) -> Any:
    value = _parse(text)
    return _array([_call(member) for member in (value if isinstance(value, list) else [value])], ignore_order)


def _call(value: Any) -> tuple[str, Any]:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("a call has no name")
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parse(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("a call's arguments are no object")
    return value["name"], _canonical(arguments, False)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
