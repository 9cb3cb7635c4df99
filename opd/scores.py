"""The scores of each held-out prompt at the newest evaluation of a run that trains: RUN/scores.json, schema version 1, from which runs are compared.

    {"schema": 1, "step": updates done, "domains": {D: {"prompts": sha256 of the prompts' tokens and answers, "scores": [number of each prompt, in order]}}}

Two runs have answered the same prompts, with the same random numbers, where the hashes and the seed are equal. Of a domain without a grader there is nothing.
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


def scores_by_domain(prompts: dict[str, list[Prompt]], results: dict[str, DomainResult]) -> dict[str, dict[str, Any]]:
    """`domains` of the record: the graded ones."""
    graded = {name: result.scores for name, result in results.items() if result.scores is not None}
    return {name: {"prompts": _digest(prompts[name]), "scores": list(scores)} for name, scores in graded.items()}


def write_scores(run_dir: Path, step: int, prompts: dict[str, list[Prompt]], results: dict[str, DomainResult]) -> None:
    """Write RUN/scores.json, where the run has a folder; the main rank calls it."""
    domains = scores_by_domain(prompts, results)
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
