"""What each rank says, kept beside what it does: RUN/logs/rank-000.log, one file per rank, to which every start of the run is added.

Python's standard error goes there as it is printed, and standard output where it is no terminal (a progress bar is nothing to read later), with what was
said before the folder was known. What a library prints past Python is in the launcher's own output alone: a pipe would catch it, but a process that dies
would take its last words with it.
"""

import io
import os
import socket
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

FOLDER = "logs"
MOST_BEFORE = 1 << 20
"""Characters that are kept until the folder is known."""


class RankLog:
    """The log of this process, once it has one."""

    def __init__(self):
        self.file: TextIO | None = None
        self.before = io.StringIO()

    def write(self, text: str) -> None:
        """Never fails: a full disk has other ways to be noticed."""
        if self.file is None and self.before.tell() < MOST_BEFORE:
            self.before.write(text)
        elif self.file is not None:
            with suppress(OSError, ValueError):
                self.file.write(text)

    def open(self, run_dir: Path, rank: int) -> None:
        """Write to RUN/logs from now on, and what was said before."""
        with suppress(OSError):
            (run_dir / FOLDER).mkdir(exist_ok=True)
            self.file = (run_dir / FOLDER / f"rank-{rank:03d}.log").open("a", buffering=1)
            self.file.write(f"--- {datetime.now().astimezone().isoformat(timespec='seconds')}, pid {os.getpid()} on {socket.gethostname()}\n")
            self.file.write(self.before.getvalue())
            self.before = io.StringIO()


class Tee(io.TextIOBase):
    """A stream of which a log gets a copy."""

    def __init__(self, stream: TextIO, log: RankLog):
        self.stream, self.log = stream, log

    @property
    def encoding(self) -> str:
        return self.stream.encoding

    @property
    def errors(self) -> str | None:
        return self.stream.errors

    def write(self, text: str) -> int:
        self.log.write(text)
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    def writable(self) -> bool:
        return True


_LOG: list[RankLog] = []


def begin_log() -> None:
    """Copy what this process prints from now on; once."""
    if _LOG:
        return
    log = RankLog()
    _LOG.append(log)
    sys.stderr = Tee(sys.stderr, log)
    if not sys.stdout.isatty():
        sys.stdout = Tee(sys.stdout, log)


def open_log(run_dir: Path, rank: int) -> None:
    """Have the copy in a run's folder; nothing where none was begun, as in a test."""
    for log in _LOG:
        log.open(run_dir, rank)


def last_words(run_dir: Path) -> str | None:
    """The last line that the main rank said, where it said anything."""
    file = run_dir / FOLDER / "rank-000.log"
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith("--- ")), None)
