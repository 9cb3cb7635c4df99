"""The scores of each held-out prompt at the newest evaluation of a run that trains: RUN/scores.json, schema version 1, from which runs are compared.

    {"schema": 1, "step": updates done, "domains": {D: {"prompts": sha256 of the prompts' tokens and answers, "scores": [number of each prompt, in order],
                                                        "asked": {SETTING: value}}}}

asked: what decides the scores beside the student and the prompts (Evaluator.asked); an addition to schema 1, which earlier records lack. Two runs have
answered the same prompts where the hashes are equal, and in the same way, with the same random numbers, where `asked` is. How a student is quantised
is no part of it: its checkpoints are quantised as it is while it trains. Of a domain without a grader there is nothing.
`opd evaluate RUN` keeps the same of each checkpoint (opd/checkpoint_record.py).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from opd.comparison import DomainResult
from rollout.files import read_json, replace_text
from rollout.types import Prompt

SCHEMA = 1
FILE = "scores.json"


def scores_by_domain(
    prompts: dict[str, list[Prompt]], results: dict[str, DomainResult], asked: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """`domains` of the record: the graded ones."""
    graded = {name: result.scores for name, result in results.items() if result.scores is not None}
    return {name: {"prompts": _digest(prompts[name]), "scores": list(scores), "asked": asked[name]} for name, scores in graded.items()}


def asked_otherwise(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """In what two records of a domain were asked otherwise, as `samples_per_prompt 1 and 4`; empty where in nothing, or where one does not say. The seed is
    left out: other random numbers are no other question.
    """
    one, other = ours.get("asked"), theirs.get("asked")
    names = [] if one is None or other is None else [name for name in one if name in other and name != "seed" and one[name] != other[name]]
    return ", ".join("another grader" if name == "grader" else f"{name} {one[name]} and {other[name]}" for name in names)


def write_scores(run_dir: Path, step: int, domains: dict[str, dict[str, Any]]) -> None:
    """Write RUN/scores.json, where the run has a folder; the main rank calls it. domains: as `scores_by_domain` gives them."""
    if run_dir.is_dir() and domains:
        replace_text(run_dir / FILE, json.dumps({"schema": SCHEMA, "step": step, "domains": domains}) + "\n")


def read_scores(run_dir: Path) -> dict[str, Any] | None:
    """The record; None where the run has none, or of another version."""
    record = read_json(run_dir / FILE) if (run_dir / FILE).is_file() else {}
    return record if record.get("schema") == SCHEMA else None


def forget_scores(run_dir: Path, step: int) -> None:
    """Delete the record of a run that goes on from an earlier step than it is of."""
    found = read_scores(run_dir)
    if found is not None and found["step"] > step:
        (run_dir / FILE).unlink()


def _digest(prompts: list[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([list(prompt.tokens), prompt.answer]).encode())
    return digest.hexdigest()
