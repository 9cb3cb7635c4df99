"""Grading: a domain's grader, a completion and its reference answer -> score in [0, 1].

exact, numeric, json, tool_call and backspace run here (rollout/graders.py); regex and python in a process of their own (rollout/grader_process.py). A
completion that is no number, no JSON or no match is a wrong answer, 0. What is no answer at all, since the grader itself failed (an exception, a time or
memory limit, a score that is none, a reference answer that it cannot read), is a ValueError with domain, row and reason, and ends the run:
a zero in its place would teach, or report, something that nobody measured. Partial scores come from functions of the user's alone.
"""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from rollout.chat import decode_completion
from rollout.grader_config import GraderConfig, GraderKind, read_grader
from rollout.grader_process import process_of
from rollout.graders import backspace, exact, numeric, require_calls, require_json, require_number, same_calls, same_json
from rollout.prompts import DomainPrompts, require_answers
from rollout.types import Rollout

Grader = Callable[[GraderConfig, str, str], float]
"""(settings, completion, answer) -> score."""


def _in_process(cfg: GraderConfig, completion: str, answer: str) -> float:
    return process_of(cfg).score(completion, answer)


GRADERS: dict[GraderKind, Grader] = {
    GraderKind.exact: lambda cfg, completion, answer: exact(completion, answer),
    GraderKind.backspace: lambda cfg, completion, answer: backspace(completion, answer),
    GraderKind.numeric: lambda cfg, completion, answer: numeric(completion, answer, cfg.tolerance, cfg.relative_tolerance),
    GraderKind.json: lambda cfg, completion, answer: same_json(completion, answer, cfg.ignore_order),
    GraderKind.tool_call: lambda cfg, completion, answer: same_calls(completion, answer, cfg.ignore_order),
    GraderKind.regex: _in_process,
    GraderKind.python: _in_process,
}

REQUIREMENTS: dict[GraderKind, Callable[[str], Any]] = {
    GraderKind.numeric: require_number,
    GraderKind.json: require_json,
    GraderKind.tool_call: require_calls,
}
"""What raises ValueError for a reference answer that the grader cannot read."""


def grade(grader: Any, completion: str, answer: str | None, row: str) -> float:
    """Score of one completion. grader: as in a config (rollout/grader_config.py). Raises ValueError, naming the row, where there is no reference answer to
    compare with, and where the grader fails.
    """
    if answer is None:
        raise ValueError(f"row {row} has no answer to grade against: map the column with columns.answer, or set grader=null")
    cfg = read_grader(grader, "grader")
    try:
        return GRADERS[cfg.kind](cfg, completion, answer)
    except ValueError as error:
        raise ValueError(f"the grader ({_title(cfg)}) failed on a completion of row {row}: {error}") from error


def grade_rollout(grader: Any, rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> float:
    """Score of a rollout's completion against its prompt's reference answer. Raises ValueError as `grade` does, naming domain and row."""
    prompt = rollout.prompt
    return grade(grader, decode_completion(rollout.completion_T.tolist(), tokenizer), prompt.answer, f"{prompt.domain}/{prompt.row}")


def require_gradable(prompts: dict[str, DomainPrompts], graders: dict[str, Any]) -> None:
    """Raises ValueError for a row without an answer, or with one that its domain's grader cannot read, and for a function that cannot be imported or called.

    graders: of each domain, as in its config; domains without one are not looked at. The processes of those that have one are started.
    """
    graded = {name: read_grader(graders[name], f"domains.{name}.grader") for name in prompts if graders[name] is not None}
    require_answers(prompts, graded, "grade against")
    for name, cfg in graded.items():
        if cfg.kind in (GraderKind.regex, GraderKind.python):
            _start(cfg, name)
        for source, rows in prompts[name].sources.items() if cfg.kind in REQUIREMENTS else ():
            for row in rows:
                _require_readable(cfg, row["answer"], f"{name}/{source}:{row['index']}")


def grader_identity(grader: Any) -> Any:
    """What a grader is, as JSON values: null; its kind, where that has no settings; else the kind with all its settings, defaults included, and of a
    function of the user's the sha256 of the file that defines it.
    """
    cfg = read_grader(grader, "grader")
    if cfg is None:
        return None
    if not cfg.settings:
        return cfg.kind.value
    identity = {"kind": cfg.kind.value} | cfg.settings
    if cfg.kind is GraderKind.python:
        process = process_of(cfg)
        process.start()
        identity["source_hash"] = process.source_hash
    return identity


def _start(cfg: GraderConfig, domain: str) -> None:
    try:
        process_of(cfg).start()
    except ValueError as error:
        raise ValueError(f"domains.{domain}.grader: {_title(cfg)} cannot grade: {error}") from error


def _require_readable(cfg: GraderConfig, answer: str, row: str) -> None:
    try:
        REQUIREMENTS[cfg.kind](answer)
    except ValueError as error:
        raise ValueError(f"{error}, which kind={cfg.kind.value} needs: correct row {row}, or use another grader") from error


def _title(cfg: GraderConfig) -> str:
    """A grader in a message."""
    return cfg.function or cfg.kind.value
