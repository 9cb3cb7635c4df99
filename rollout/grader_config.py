"""The settings of a domain's grader: what `grader` may be in a domain's YAML, and what is refused.

    grader: exact                                                   the kind alone, with the defaults of its settings
    grader: {kind: numeric, tolerance: 1e-6}                        a kind with settings; those of another kind are refused
    grader: {kind: python, function: "my_package.grader:score"}     a function of the user's

A config keeps the form that was written (as it keeps a schedule), so that a run of an earlier version, whose config says `exact`, is taken up; `read_grader`
makes a GraderConfig of it. OmegaConf has no type that is a word or a mapping, so all checks are here. rollout/grading.py says what each kind does.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class GraderKind(Enum):
    """How a completion is compared with the reference answer (rollout/graders.py)."""

    exact = "exact"
    numeric = "numeric"
    regex = "regex"
    json = "json"
    tool_call = "tool_call"
    backspace = "backspace"
    python = "python"


@dataclass(slots=True)
class GraderConfig:
    """How the completions of one domain are graded.

    kind: exact (the same text), numeric (the last number of each), regex (what a pattern finds in the completion against the whole answer), json (the same
        value), tool_call (the same calls: names and arguments), backspace (exact, after each `<` has taken back the character before it) or python (a
        function of the user's).
    tolerance: numeric: largest difference of equal numbers.
    relative_tolerance: numeric: the same as a share of the answer's size; the larger of the two holds.
    pattern: regex: Python's; its one group is compared, or the whole match where it has none.
    ignore_order: json: arrays are equal in any order of their members, at any depth; tool_call: so are the calls, and arrays within arguments are not.
    function: python: `package.module:function`, called with completion and answer; returns a score from 0 to 1, True or False.
    seconds: regex and python: for one completion; what takes longer stops the run, by name.
    memory_mib: regex and python: of the grader's process, what it imports included.
    subprocesses: python: whether the function may start processes; they end with the grader's at the latest.
    """

    kind: GraderKind = GraderKind.exact
    tolerance: float = 0.0
    relative_tolerance: float = 0.0
    pattern: str | None = None
    ignore_order: bool = False
    function: str | None = None
    seconds: float = 5.0
    memory_mib: int = 1024
    subprocesses: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the kind has, as plain values."""
        values = {"tolerance": self.tolerance, "relative_tolerance": self.relative_tolerance, "pattern": self.pattern, "ignore_order": self.ignore_order}
        values |= {"function": self.function, "seconds": self.seconds, "memory_mib": self.memory_mib, "subprocesses": self.subprocesses}
        return {name: values[name] for name in SETTINGS[self.kind]}


SETTINGS: dict[GraderKind, tuple[str, ...]] = {
    GraderKind.exact: (),
    GraderKind.numeric: ("tolerance", "relative_tolerance"),
    GraderKind.regex: ("pattern", "seconds", "memory_mib"),
    GraderKind.json: ("ignore_order",),
    GraderKind.tool_call: ("ignore_order",),
    GraderKind.backspace: (),
    GraderKind.python: ("function", "seconds", "memory_mib", "subprocesses"),
}

LEAST_MEMORY_MIB = 64
"""Python itself needs half of it."""


def read_grader(value: Any, name: str) -> GraderConfig | None:
    """The grader that a config's value means; None for null. Raises ValueError, beginning with `name`, for what is none."""
    if value is None or isinstance(value, GraderConfig):
        return value
    given = dict(value) if isinstance(value, Mapping) else {"kind": value}
    kinds = ", ".join(kind.value for kind in GraderKind)
    if "kind" not in given:
        raise ValueError(f"{name}: a grader needs a kind, as in {{kind: numeric, tolerance: 1e-6}}; the kinds are {kinds}")
    found = given.pop("kind")
    try:
        kind = GraderKind(found)
    except ValueError as error:
        raise ValueError(f"{name}: there is no grader {found!r}; the kinds are {kinds}") from error
    for setting, own in given.items():
        if setting not in SETTINGS[kind]:
            raise ValueError(f"{name}: kind={kind.value} has no setting {setting!r}; it has {', '.join(SETTINGS[kind]) or 'none'}")
        problem = _problem(setting, own)
        if problem is not None:
            raise ValueError(f"{name}.{setting} {problem}")
    for setting in ("pattern", "function"):
        if setting in SETTINGS[kind] and setting not in given:
            raise ValueError(f"{name}: kind={kind.value} needs a {setting}, as in {EXAMPLES[setting]}")
    return GraderConfig(kind=kind, **given)


EXAMPLES = {"pattern": '{kind: regex, pattern: "answer: (.*)$"}', "function": '{kind: python, function: "my_package.my_grader:score"}'}


def _problem(setting: str, value: Any) -> str | None:
    """What is wrong with the value of a setting, in words that follow its name."""
    if setting in ("ignore_order", "subprocesses"):
        return None if isinstance(value, bool) else f"must be true or false, not {value!r}"
    if setting == "pattern":
        return _pattern_problem(value)
    if setting == "function":
        is_path = isinstance(value, str) and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", value)
        return None if is_path else f"must be module:function, as in my_package.my_grader:score, not {value!r}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if setting == "memory_mib":
        is_right = is_number and isinstance(value, int) and value >= LEAST_MEMORY_MIB
        return None if is_right else f"must be a whole number from {LEAST_MEMORY_MIB}, not {value!r}"
    if setting == "seconds":
        return None if is_number and value > 0 else f"must be a number above 0, not {value!r}"
    return None if is_number and value >= 0 else f"must be a number from 0, not {value!r}"


def _pattern_problem(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"must be a regular expression, not {value!r}"
    try:
        groups = re.compile(value).groups
    except (re.error, RecursionError, OverflowError) as error:
        return f"is no regular expression: {error}"
    return None if groups <= 1 else f"has {groups} groups: write (?:...) for all but the one that is to be compared"
