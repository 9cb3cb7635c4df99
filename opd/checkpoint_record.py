"""What `opd evaluate RUN` found of one checkpoint: the file, and who else reads it (`opd report`, the model card of `opd export`). No torch.

    RUN/evaluations/step-SSSSSS-HHHHHHHHHHHH.json    schema version 1; H: the first digits of "settings", so that a look with others leaves it as it is
    {"schema": 1, "step", "manifest": sha256 of the checkpoint's manifest.json | null, "settings": sha256 of what it was asked,
     "evaluation": as evaluation.json of opd/comparison.py, "scores": as `domains` of opd/scores.py}
"""

import json
from pathlib import Path
from typing import Any

from opd import checkpoint_files as files
from opd.choice import EVALUATIONS, read_choice
from rollout.files import read_json, replace_text

SCHEMA = 1


def record_file(run: Path, step: int, settings: str) -> Path:
    return run / EVALUATIONS / f"{files.tag_of(step)}-{settings[:12]}.json"


def write_record(run: Path, step: int, manifest: str | None, settings: str, evaluation: dict[str, Any], scores: dict[str, Any]) -> None:
    record = {"schema": SCHEMA, "step": step, "manifest": manifest, "settings": settings, "evaluation": evaluation, "scores": scores}
    replace_text(record_file(run, step, settings), json.dumps(record) + "\n")


def read_record(run: Path, step: int, settings: str) -> dict[str, Any] | None:
    """What the checkpoint that is there, or was the last there, was found to be when asked so; None where it was not asked."""
    path, checkpoint = record_file(run, step, settings), run / "checkpoints" / files.tag_of(step)
    record = read_json(path) if path.is_file() else {}
    if record.get("schema") != SCHEMA or record["settings"] != settings:
        return None
    return record if not checkpoint.is_dir() or record["manifest"] == files.digest_of(checkpoint) else None


def read_all(run: Path, settings: str) -> dict[int, dict[str, Any]]:
    """All that were asked so, by step."""
    steps = sorted(int(path.stem.split("-")[1]) for path in (run / EVALUATIONS).glob(f"step-*-{settings[:12]}.json"))
    return {step: record for step in steps if (record := read_record(run, step, settings)) is not None}


def shown_records(run: Path) -> dict[int, dict[str, Any]]:
    """By which a run is shown: what was asked as it was for the choice, else as it was asked last. By step; none where nothing was asked."""
    choice, written = read_choice(run), sorted((run / EVALUATIONS).glob("step-*-*.json"), key=lambda path: path.stat().st_mtime)
    settings = choice["settings"] if choice is not None else read_json(written[-1]).get("settings") if written else None
    return {} if settings is None else read_all(run, settings)


def shown_record(run: Path) -> dict[str, Any] | None:
    """Of those the chosen checkpoint's, else the newest's."""
    records, choice = shown_records(run), read_choice(run)
    chosen = None if choice is None or choice["chosen"] is None else choice["chosen"]["step"]
    return records.get(chosen, records[max(records)] if records else None)


def chosen_step(run: Path) -> int:
    """The step of RUN@chosen. Raises ValueError where no checkpoint is chosen, or another one was written in its place since."""
    choice = read_choice(run)
    if choice is None:
        raise ValueError(f"{run}@chosen: no checkpoint was chosen yet: opd evaluate {run} checkpoints=all does")
    if choice["chosen"] is None:
        raise ValueError(f"{run}@chosen: no checkpoint met the rule: opd evaluate {run} checkpoints=all says why")
    step, checkpoint = choice["chosen"]["step"], run / "checkpoints" / files.tag_of(choice["chosen"]["step"])
    if checkpoint.is_dir() and files.digest_of(checkpoint) != choice["chosen"]["manifest"]:
        raise ValueError(f"{run}@chosen: step {step} was written again since it was chosen: opd evaluate {run} checkpoints=all chooses anew")
    return step
