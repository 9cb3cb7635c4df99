"""How a run stands, for people and for `opd runs`: RUN/state.json, schema version 1.

    {"schema": 1, "command", "state": "running" | "done" | "preempted" | "stopped" | "failed", "why": one sentence | null,
     "steps": optimizer steps of the whole run | null, "host", "pid", "begun": seconds since 1970 of this start, "ended": seconds since 1970 | null}

The main rank writes it when the run begins or goes on, after every check (a start that is refused leaves it as it was), and when it leaves, with the sentence
that the user reads. One that is killed leaves "running" behind: who reads it has to ask whether the process is still there.
"""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path

from opd.errors import PREEMPTED, STOPPED
from rollout.files import read_json, replace_text

SCHEMA = 1
FILE = "state.json"


class State(Enum):
    """running: a process writes to the folder, or was killed while it did. preempted: ended early with a checkpoint, to be started again. stopped: ended with
    a checkpoint by an alarm, or since a checkpoint was accepted (exit code 3).
    """

    running = "running"
    done = "done"
    preempted = "preempted"
    stopped = "stopped"
    failed = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What state.json says (module docstring)."""

    command: str
    state: State
    why: str | None
    steps: int | None
    host: str
    pid: int
    begun: float
    ended: float | None


_OPEN: dict[str, Path] = {}
"""The folder that this process has begun a run in, if any."""


def begin_state(folder: Path, command: str, steps: int | None) -> None:
    """Say that this process is now at work in a folder, whose lock it holds."""
    state = RunState(
        command=command, state=State.running, why=None, steps=steps, host=socket.gethostname(), pid=os.getpid(), begun=time.time(), ended=None
    )
    _write(folder, state)
    _OPEN["run"] = folder


def end_state(code: int, why: str | None) -> None:
    """Say how the run of this process has ended, if it has one: with its exit code and the sentence for the user."""
    folder = _OPEN.pop("run", None)
    if folder is None or not (folder / FILE).is_file():
        return
    state = {0: State.done, PREEMPTED: State.preempted, STOPPED: State.stopped}.get(code, State.failed)
    _write(folder, replace(read_state(folder), state=state, why=why, ended=time.time()))


def read_state(folder: Path) -> RunState | None:
    """How the run in a folder stands by its own account; None where it gives none. Raises ValueError where the file is damaged."""
    if not (folder / FILE).is_file():
        return None
    record = read_json(folder / FILE)
    if record.pop("schema", None) != SCHEMA:
        raise ValueError(f"{folder / FILE} is of another version of opd: this one reads schema {SCHEMA}")
    return RunState(**record | {"state": State(record["state"])})


def _write(folder: Path, state: RunState) -> None:
    replace_text(folder / FILE, json.dumps({"schema": SCHEMA, **asdict(state), "state": state.state.value}) + "\n")
