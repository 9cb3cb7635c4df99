"""GraderProcess: a process of each rank in which patterns and functions of the user's grade, under limits (rollout/grader_worker.py is what runs in it).

Why a process: a pattern may backtrack for ever and holds the interpreter while it does, which only the end of a process ends; a function of the user's may
hang, use up the memory, crash or leave. The other graders are a few lines of ours in time linear in the text, so that a process would only slow them down.
One process stays for all completions of a grader, as starting Python for each would take longer than grading; each is sent alone (some 0.15 ms), so that a
limit is that of one completion and an error names its row.

The process has no environment of the trainer's but ENVIRONMENT: no WANDB_API_KEY, HF_TOKEN or other secret. What it prints goes nowhere. It ends
with the trainer, however that ends (rollout/child.py, which is why it must be started by a thread that stays, as the main one), and has a session of its
own, so that Ctrl-C is not for it and what it may have started ends with it. Whatever goes wrong is a ValueError with the reason; a process that had to be
ended is replaced at the next completion.
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from typing import Any

from rollout.child import child_command
from rollout.grader_config import GraderConfig, GraderKind
from rollout.grader_worker import receive, send

ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LC_CTYPE", "TZ")
"""What the process needs to find Python, the user's packages (some lie under HOME), its libraries, and the right letters."""

START_SECONDS = 120.0
"""For Python to begin and the user's module to be imported, on a busy machine."""

GRACE_SECONDS = 5.0
"""For a process whose socket is closed to be gone."""

CAUSES = {
    signal.SIGXCPU: "it used up the processor time of `seconds`",
    signal.SIGKILL: "killed by SIGKILL, as when a machine's memory is used up",
}
"""Of what may end the process, in words; of other signals the name will do."""

_PROCESSES: dict[str, "GraderProcess"] = {}
"""This rank's, by their settings."""


class GraderProcess:
    """The process of one grader; it starts with the first completion, or by `start`."""

    def __init__(self, cfg: GraderConfig):
        self.cfg = cfg
        self.process: subprocess.Popen | None = None
        self.connection: socket.socket | None = None
        self.source_hash: str | None = None

    def start(self) -> None:
        """Start the process, unless it runs. Raises ValueError, with the reason, where the function cannot be imported or called."""
        if self.process is not None and self.process.poll() is None:
            return
        self.end()
        self.connection, theirs = socket.socketpair()
        with theirs:
            descriptor = theirs.fileno()
            command = child_command("rollout.grader_worker", json.dumps(self.cfg.settings), str(descriptor))
            nothing = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen(command, **nothing, env=environment(), pass_fds=[descriptor], start_new_session=True)
        said = self._asked(None, START_SECONDS, f"its process took longer than {START_SECONDS:g} s to begin")
        if "refused" in said:
            self.end()
            raise ValueError(said["refused"])
        self.source_hash = said["ready"]

    def score(self, completion: str, answer: str) -> float:
        """The score of one completion. Raises ValueError, with the reason, where there is none."""
        self.start()
        seconds = self.cfg.seconds
        said = self._asked({"completion": completion, "answer": answer}, seconds, f"it took longer than seconds={seconds:g}")
        if "error" in said:
            raise ValueError(said["error"])
        return said["score"]

    def end(self) -> None:
        """End the process and all that it has started."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()
        self.process = self.connection = None

    def _asked(self, record: dict[str, str] | None, seconds: float, too_long: str) -> dict[str, Any]:
        """The process's next message, after it was sent one; too_long: what is said where it does not come in time."""
        until = time.monotonic() + seconds
        try:
            self.connection.settimeout(seconds)
            if record is not None:
                send(self.connection, record)
            return receive(self.connection, until)
        except TimeoutError as error:
            self.end()
            raise ValueError(too_long) from error
        except (EOFError, ConnectionError) as error:
            raise ValueError(f"its process ended ({self._last_words()})") from error

    def _last_words(self) -> str:
        """Why a process has ended that nobody told to, and what it left behind."""
        process = self.process
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        self.end()
        if process.returncode >= 0:
            return f"exit status {process.returncode}"
        return CAUSES.get(-process.returncode, f"killed by {signal.Signals(-process.returncode).name}")


def process_of(cfg: GraderConfig) -> GraderProcess:
    """This rank's process of a grader; the same for all domains with the same settings."""
    assert cfg.kind in (GraderKind.regex, GraderKind.python), f"kind={cfg.kind.value} grades in the trainer's own process"
    key = json.dumps(cfg.settings)
    if key not in _PROCESSES:
        _PROCESSES[key] = GraderProcess(cfg)
    return _PROCESSES[key]


def environment() -> dict[str, str]:
    """What the process has of the trainer's environment; one thread, as ranks share the machine."""
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ} | {"OMP_NUM_THREADS": "1"}


@atexit.register
def end_processes() -> None:
    """End all of this rank's processes; whoever asks them again starts new ones."""
    for process in _PROCESSES.values():
        process.end()
