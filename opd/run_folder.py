"""What is read of a run's folder wherever one is looked at: which command wrote it, and its records. No torch; nothing in it is touched."""

import json
from pathlib import Path
from typing import Any

MARK = "# written by opd "
"""Begins RUN/config.yaml, before the command."""


def command_of(folder: Path) -> str | None:
    """The command that wrote a folder; None where it has no config.yaml of ours."""
    file = folder / "config.yaml"
    first = file.read_text(errors="replace").partition("\n")[0] if file.is_file() else ""
    return first.removeprefix(MARK) if first.startswith(MARK) else None


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of RUN/metrics.jsonl (opd/metrics.py), in order of steps. A last line that is not whole is being written, and is left out.

    Raises ValueError for such a line in the midst of the file.
    """
    path = folder / "metrics.jsonl"
    found, lines = [], path.read_text().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"line {number} of {path} is damaged: take the run up again, which drops what is not whole, or restore the file") from error
    return sorted(found, key=lambda record: record["step"])
