"""`opd runs [FOLDER]`: every run in a folder with its state, step, time left, last checkpoint and newest figures; a read of small files that touches nothing.

A run that says that it is running is believed where its process is there: on this host by its pid and when that began, from another by the time of its lock
(opd/run_lock.py). Else it was killed, and what the main rank said last is shown. Time left is the median seconds of the newest steps times the steps to go.
"""

import json
import socket
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from opd.console import headline, print_table
from opd.run_folder import command_of
from opd.run_lock import gives_signs
from opd.run_log import last_words
from opd.run_state import RunState, State, read_state
from opd.runs_config import RunsConfig

DEEPEST = 4
"""Folders below the one that is named in which runs are looked for."""
PRODUCTS = {"evaluate": "evaluation.json", "export": "export.json", "merge": "merge.json", "pipeline": "summary.json"}
"""Of commands that keep no state: the file that they write last."""
RECENT = 20
"""Steps from which the time left is estimated."""
TAIL = 1 << 18
"""Bytes of metrics.jsonl that are read, from its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """How one run stands. state: of opd/run_state.py, or killed; unknown where it says nothing, damaged where it cannot be read. step: of `steps`; left:
    seconds. why: where it has ended early.
    """

    folder: Path
    command: str
    state: str
    step: int | None = None
    steps: int | None = None
    left: float | None = None
    checkpoint: int | None = None
    figures: str = ""
    why: str = ""


def runs(cfg: RunsConfig) -> None:
    """Print the table. Raises ValueError where a folder is not there, or holds no run."""
    found = []
    for name in cfg.folders:
        if not Path(name).is_dir():
            raise ValueError(f"there is no folder {name}: write opd runs FOLDER, with one in which runs are")
        found += [describe(folder) for folder in find_runs(Path(name))]
    if not found:
        raise ValueError(f"there is no run in {', '.join(cfg.folders)}, nor {DEEPEST} folders deep in it")
    rows = []
    for run in found:
        step = "" if run.step is None else f"{run.step}" + (f"/{run.steps}" if run.steps else "")
        checkpoint = "" if run.checkpoint is None else str(run.checkpoint)
        rows.append([str(run.folder), run.command, run.state, step, _duration(run.left), checkpoint, run.figures or run.why])
    print_table("", ["run", "command", "state", "step", "left", "checkpoint", "figures, or why it ended"], rows)
    for run in found:
        if run.why and run.figures:
            print(f"{run.folder}: {run.why}")


def find_runs(folder: Path, depth: int = DEEPEST) -> Iterator[Path]:
    """The folders of runs at and below a folder, by name; what a run wrote is not looked into, but the runs of a pipeline are."""
    if (folder / "config.yaml").is_file():
        yield folder
    if depth and not (folder / "metrics.jsonl").is_file():
        for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")):
            yield from find_runs(inner, depth - 1)


def describe(folder: Path) -> RunRow:
    """How the run in a folder stands; a damaged file of it is named, and hides no other run."""
    command = command_of(folder) or "?"
    try:
        state, records = read_state(folder), newest_records(folder)
    except ValueError as error:
        return RunRow(folder=folder, command=command, state="damaged", why=str(error))
    if state is None:
        product = PRODUCTS.get(command, "student/config.json")
        return RunRow(folder=folder, command=command, state="done" if (folder / product).is_file() else "unknown", **_progress(folder, records, None))
    is_there = state.state is not State.running or is_alive(folder, state)
    name, why = (state.state.value, state.why or "") if is_there else ("killed", _killed(folder, state))
    progress = _progress(folder, records, state.steps)
    return RunRow(folder=folder, command=state.command, state=name, why=why, **progress | ({} if name == "running" else {"left": None}))


def is_alive(folder: Path, state: RunState) -> bool:
    """Whether the process of a state is still there."""
    if state.host == socket.gethostname():
        try:
            return psutil.Process(state.pid).create_time() <= state.begun + 1.0
        except psutil.NoSuchProcess:
            return False
    return gives_signs(folder)


def newest_records(folder: Path) -> list[dict[str, Any]]:
    """The last lines of RUN/metrics.jsonl; of a line that is being written nothing."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return []
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - TAIL))
        lines = stream.read().decode(errors="replace").splitlines(keepends=True)
    whole = lines[1:] if size > TAIL else lines
    return [json.loads(line) for line in whole if line.startswith("{") and line.endswith("}\n")]


def _progress(folder: Path, records: list[dict[str, Any]], steps: int | None) -> dict[str, Any]:
    tags = [path.name.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*")]
    saved = max((int(tag) for tag in tags if tag.isdigit()), default=None)
    if not records:
        return {"steps": steps, "checkpoint": saved}
    step = records[-1]["step"]
    seconds = [record["seconds/step"] for record in records[-RECENT:] if record["step"] and "seconds/step" in record]
    left = statistics.median(seconds) * (steps - step) if seconds and steps else None
    return {"step": step, "steps": steps, "left": left, "checkpoint": saved, "figures": headline(records[-1])}


def _killed(folder: Path, state: RunState) -> str:
    said = last_words(folder)
    return f"pid {state.pid} on {state.host} is gone without a word" + (f"; it said last: {said}" if said else "")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"
