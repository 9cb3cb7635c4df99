"""The sampler processes of one driver: starting them, giving them leases, seeing whether they live, ending them (rollout/service.py says what for).

A process is known by its folder, whose name is never used again: what an earlier one may still write lands where nobody reads.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rollout.cohort import Completion, DecodingFigures
from rollout.files import read_json, replace_text
from rollout.wal import Key, LoggedCompletion, SegmentReader

START_SECONDS = 300.0
"""For a process to begin, on top of what it may be silent later."""

GRACE_SECONDS = 10.0
"""For a process that is told to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What a process builds its sampler from, beside the student's config: as in ModelConfig, QuantConfig and Policy, enums by their values."""

    dtype: str
    attention: str | None
    experts: str | None
    packed_experts: bool
    quantized_indexer: bool
    end_tokens: tuple[int, ...]
    vocab_size: int | None
    seed: int
    device: str
    threads: int


@dataclass(slots=True)
class Lease:
    """A cohort at one process. known: what its segment holds of each completion."""

    cohort: list[Completion]
    reader: SegmentReader
    number: int
    begun: float
    known: dict[Key, LoggedCompletion] = field(default_factory=dict)


class SamplerProcess:
    """One process and its folder."""

    def __init__(self, folder: Path, spec: WorkerSpec, model: Path):
        """model: folder of the student's config."""
        folder.mkdir(parents=True)
        self.folder, self.lease, self.num_leases = folder, None, 0
        self.seen, self.alive_at, self.told = None, time.monotonic(), DecodingFigures()
        (folder / "spec.json").write_text(json.dumps(asdict(spec) | {"model": str(model), "driver": os.getpid()}))
        environment = os.environ | {"OMP_NUM_THREADS": str(spec.threads)}
        with (folder / "output.txt").open("w") as output:
            command = [sys.executable, "-m", "rollout.service_worker", str(folder)]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        replace_text(folder / "pid.json", json.dumps({"pid": self.process.pid, "started": start_time(self.process.pid)}))

    @property
    def name(self) -> str:
        return self.folder.name

    def give(self, record: dict[str, Any], lease: Lease | None) -> None:
        """Put a lease in front of the process, in place of the one before."""
        self.num_leases, self.lease = self.num_leases + 1, lease
        replace_text(self.folder / "lease.json", json.dumps(record | {"number": self.num_leases}))

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def seconds_silent(self) -> float:
        """Since the last sign of life, on this process's own clock; what time the file system thinks it is does not matter.

        A process that has given none yet may still be importing what it needs, which a busy machine makes long.
        """
        with suppress(FileNotFoundError):
            stamp = (self.folder / "alive").stat().st_mtime_ns
            if stamp != self.seen:
                self.seen, self.alive_at = stamp, time.monotonic()
        return time.monotonic() - self.alive_at - (START_SECONDS if self.seen is None else 0.0)

    def figures_number(self) -> int:
        """Of the last lease that the process has given figures for."""
        return read_json(self.folder / "figures.json")["number"] if (self.folder / "figures.json").is_file() else 0

    def new_figures(self) -> DecodingFigures:
        """What the process did since the last call."""
        if not (self.folder / "figures.json").is_file():
            return DecodingFigures()
        total = DecodingFigures(**read_json(self.folder / "figures.json")["figures"])
        new, self.told = total.minus(self.told), total
        return new

    def end(self, seconds: float) -> None:
        """Wait for a process that was told to end; kill it when the time is up."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.kill()

    def kill(self) -> None:
        """Whatever state it is in, SIGSTOP included; it is gone on return."""
        self.process.kill()
        self.process.wait()

    def last_words(self) -> str:
        """Why it ended: its own message, else the last line it printed, else its exit status."""
        if (self.folder / "error.txt").is_file():
            return (self.folder / "error.txt").read_text()
        lines = (self.folder / "output.txt").read_text(errors="replace").strip().splitlines()
        return f"status {self.process.returncode}" + (f", {lines[-1].strip()}" if lines else "")


def end_processes(processes: list[SamplerProcess]) -> None:
    """Tell processes to end, kill those that do not, and empty the list."""
    for process in processes:
        process.process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        process.end(max(0.0, deadline - time.monotonic()))
    processes.clear()


def kill_left_over(folder: Path) -> None:
    """End the sampler processes that another driver left behind in a folder."""
    for path in folder.glob("sampler-*/pid.json"):
        with suppress(ValueError, ProcessLookupError):
            record = read_json(path)
            if start_time(record["pid"]) == record["started"]:
                os.kill(record["pid"], signal.SIGKILL)


def start_time(pid: int) -> str | None:
    """When a process began, in the kernel's own count, so that a number used again is not taken for it; None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return None
