"""What `opd evaluate RUN` found of one checkpoint: the file, and who else reads it (`opd report`, the model card of `opd export`). No torch.

    RUN/evaluations/step-SSSSSS.json    schema version 1
    {"schema": 1, "step", "manifest": sha256 of the checkpoint's manifest.json | null, "settings": sha256 of what it was asked,
     "evaluation": as evaluation.json of opd/comparison.py}
"""

import json
from pathlib import Path
from typing import Any

from opd import checkpoint_files as files
from opd.choice import FOLDER
from rollout.files import read_json, replace_text

SCHEMA = 1


def record_file(run: Path, step: int) -> Path:
    return run / FOLDER / f"{files.tag_of(step)}.json"


def write_record(run: Path, step: int, manifest: str | None, settings: str, evaluation: dict[str, Any]) -> None:
    record = {"schema": SCHEMA, "step": step, "manifest": manifest, "settings": settings, "evaluation": evaluation}
    replace_text(record_file(run, step), json.dumps(record, indent=2) + "\n")


def read_record(run: Path, step: int) -> dict[str, Any] | None:
    """The file's content, where it is of the checkpoint that is there, or was the last there; None where there is none, or it is of another one."""
    path, checkpoint = record_file(run, step), run / "checkpoints" / files.tag_of(step)
    record = read_json(path) if path.is_file() else {}
    if record.get("schema") != SCHEMA:
        return None
    return record if not checkpoint.is_dir() or record["manifest"] == files.digest_of(checkpoint) else None


def recorded_steps(run: Path) -> list[int]:
    """The steps of which there is a file, earliest first."""
    return sorted(files.step_of(path.stem) for path in (run / FOLDER).glob("step-*.json"))
