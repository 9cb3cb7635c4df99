"""`opd COMMAND -m seed=1,2,3 optim.lr=1e-3,1e-4`: every combination as a run of its own, in processes of its own.

    SWEEP/NAME/          run folder of a job; NAME says what differs, as seed_1-lr_0.001
    SWEEP/jobs/NAME.log  what it printed
    SWEEP/sweep.json     schema version 1: {"schema": 1, "command", "jobs": {NAME: {"overrides": [of the command], "code": exit code | null, "seconds"}}}

SWEEP is run_dir, else runs/sweep_COMMAND. Values are chosen in Hydra's grammar: a,b; range(1,4); 'domain=[a,b],[a]'. All jobs are composed and checked before
the first is started. A job that fails stops no other. Jobs of a sweep have one W&B group, SWEEP's name. The same command goes on: jobs that are done are
skipped, the others are given again, which resumes those that have checkpoints; fresh=true begins anew. A signal ends the jobs under way as it would end
each alone, and no other is begun. Exit code: 0 where all are done, that of the signal where there was one, PREEMPTED where the jobs that are not done ended
early with a checkpoint (launch.max_hours), else FAILED_JOBS.

hydra's own sweeper runs jobs in one process, one after another, where the first that fails ends all: hence this.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from opd.composition import STORED, choices, load_config
from opd.config import SCHEMAS
from opd.console import ProgressDisplay, print_table
from opd.errors import FAILED_JOBS, INTERRUPTED, PREEMPTED
from opd.run_lock import lock
from opd.runs import describe
from opd.stopping import SIGNALS
from opd.supervisor import end_with_parent
from rollout.files import read_json, replace_text

SCHEMA = 1
FILE = "sweep.json"
POLL_SECONDS = 0.2
COMMANDS = ("distill", "specialize", "evaluate", "export", "merge", "pipeline", "compare")
"""The commands that leave a folder."""
STATES = {0: "done", 2: "refused", 3: "stopped", PREEMPTED: "preempted", INTERRUPTED: "interrupted", None: "not begun"}


@dataclass(slots=True)
class SweepConfig:
    """What a sweep itself is told, as sweep.NAME=VALUE among the overrides.

    parallel: jobs that run at a time.
    """

    parallel: int = 1


@dataclass(slots=True)
class Job:
    """One combination: its name, what differs in it, the command's overrides, and how it ended (None: it has not)."""

    name: str
    chosen: dict[str, str]
    overrides: list[str]
    code: int | None = None
    seconds: float = 0.0
    process: subprocess.Popen | None = None
    begun: float = 0.0


@dataclass(slots=True)
class Signals:
    """Those that this process was sent."""

    received: list[int] = field(default_factory=list)

    def heed(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(number)


def sweep(command: str, overrides: list[str]) -> int:
    """Run every combination; returns the exit code. Raises ValueError where one could not be run, before any is."""
    from opd.distributed import is_launched

    if is_launched():
        raise ValueError("-m starts its jobs itself, and this is a rank of a launcher: start it alone with launch.processes=N, or see python -m opd.submission")
    cfg, folder, jobs = plan(command, overrides)
    folder.mkdir(parents=True, exist_ok=True)
    problem = lock(folder)
    if problem is not None:
        raise ValueError(problem)
    (folder / "jobs").mkdir(exist_ok=True)
    _take_up(folder, command, jobs, is_fresh=any(re.fullmatch(r"\+*fresh=(true|1|yes|on)", override, re.IGNORECASE) for override in overrides))
    signals = Signals()
    before = {number: signal.signal(number, signals.heed) for number in (*SIGNALS, signal.SIGINT)}
    try:
        with ProgressDisplay() as display:
            _run(command, folder, jobs, cfg, signals, display)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    _print(folder, jobs)
    if signals.received:
        return INTERRUPTED if signal.SIGINT in signals.received else PREEMPTED
    codes = {job.code for job in jobs} - {0}
    if codes == {PREEMPTED}:
        print("jobs ended early with a checkpoint (exit code 75): the same command goes on with them")
        return PREEMPTED
    return FAILED_JOBS if codes else 0


def plan(command: str, overrides: list[str]) -> tuple[SweepConfig, Path, list[Job]]:
    """The sweep's own settings, its folder and its jobs, each of which composes. Raises ValueError for what cannot be run."""
    if command not in COMMANDS:
        raise ValueError(f"-m is for commands that leave a folder: {', '.join(COMMANDS)}")
    if any(override.startswith(STORED) for override in overrides):
        raise ValueError("-m begins new runs: leave the run out, and give its settings, or its weights as student.model=RUN/student")
    cfg, rest = _own_settings(overrides)
    folders = [override.removeprefix("run_dir=") for override in rest if override.startswith("run_dir=")]
    folder = Path(folders[-1].strip("'\"")) if folders else Path("runs") / f"sweep_{command}"
    combinations = choices([override for override in rest if not override.startswith("run_dir=")])
    varied = [key for key in combinations[0] if len({combination[key] for combination in combinations}) > 1]
    short = Counter(key.split(".")[-1] for key in varied)
    jobs = []
    for combination in combinations:
        chosen = {key: combination[key] for key in varied}
        words = [f"{key.split('.')[-1] if short[key.split('.')[-1]] == 1 else key}_{value}" for key, value in chosen.items()]
        name = re.sub(r"[^A-Za-z0-9.+-]+", "_", "-".join(words)).strip("_.") or "job"
        given = [f"{key}={value}" if value is not None else key for key, value in combination.items()]
        given += [f"run_dir='{folder / name}'", *_group(command, folder, given), *_threads(command, cfg.parallel, given)]
        load_config(command, given)
        jobs.append(Job(name=name, chosen=chosen, overrides=given))
    twice = [name for name, count in Counter(job.name for job in jobs).items() if count > 1]
    if twice or any(job.name in ("jobs", FILE) for job in jobs):
        raise ValueError(f"two jobs would have the folder {folder / (twice or ['jobs'])[0]}: choose values whose names differ")
    return cfg, folder, jobs


def _own_settings(overrides: list[str]) -> tuple[SweepConfig, list[str]]:
    """sweep.parallel=N, and the overrides without it."""
    cfg, rest = SweepConfig(), []
    for override in overrides:
        if not override.startswith("sweep."):
            rest.append(override)
            continue
        name, _, value = override.removeprefix("sweep.").partition("=")
        if name != "parallel" or not value.isdigit() or int(value) < 1:
            raise ValueError(f"a sweep has no setting {override!r}: write sweep.parallel=N, with N at least 1")
        cfg.parallel = int(value)
    return cfg, rest


def _group(command: str, folder: Path, given: list[str]) -> list[str]:
    """The W&B group, for commands that have a logger and unless it is given."""
    has_logger = command in ("distill", "specialize", "pipeline", "compare")
    return [f"logger.group='{folder.name}'"] if has_logger and not any(override.lstrip("+").startswith("logger.group=") for override in given) else []


def _threads(command: str, parallel: int, given: list[str]) -> list[str]:
    """The cores shared among jobs that run side by side, unless threads are given: each would else take all of them."""
    has_threads = any(setting.name == "threads" for setting in fields(SCHEMAS[command]))
    is_given = any(override.lstrip("+").startswith("threads=") for override in given)
    return [f"threads={max(1, len(os.sched_getaffinity(0)) // parallel)}"] if parallel > 1 and has_threads and not is_given else []


def _take_up(folder: Path, command: str, jobs: list[Job], is_fresh: bool) -> None:
    """What an earlier start of the same sweep has done counts; of jobs with other settings it does not."""
    before = read_json(folder / FILE) if (folder / FILE).is_file() else {}
    for job in jobs:
        done: dict[str, Any] = before.get("jobs", {}).get(job.name, {}) if before.get("command") == command and not is_fresh else {}
        if done.get("overrides") == job.overrides and done["code"] == 0 and (folder / job.name).is_dir():
            job.code, job.seconds = 0, done["seconds"]


def _run(command: str, folder: Path, jobs: list[Job], cfg: SweepConfig, signals: Signals, display: ProgressDisplay) -> None:
    waiting, running, told = [job for job in jobs if job.code is None], [], 0
    for job in jobs:
        if job.code == 0:
            display.say(f"{job.name}: done before, skipped")
    _write(folder, command, jobs)
    while running or (waiting and not signals.received):
        while waiting and len(running) < cfg.parallel and not signals.received:
            running.append(_begin(command, folder, waiting.pop(0)))
        for number in signals.received[told:]:
            for job in running:
                job.process.send_signal(number)
        told = len(signals.received)
        time.sleep(POLL_SECONDS)
        for job in [job for job in running if job.process.poll() is not None]:
            running.remove(job)
            job.code, job.seconds = job.process.returncode, time.monotonic() - job.begun
            _write(folder, command, jobs)
            why = "" if job.code == 0 else f"; {folder / 'jobs' / job.name}.log ends: {_last_line(folder, job)}"
            display.say(f"{job.name}: {_state(job)} after {job.seconds:.0f} s{why}")
        for job in running:
            row = describe(folder / job.name) if (folder / job.name / "config.yaml").is_file() else None
            if row is not None and row.step is not None and row.steps:
                display.update(job.name, min(row.step, row.steps - 1), row.steps, row.figures)


def _begin(command: str, folder: Path, job: Job) -> Job:
    with (folder / "jobs" / f"{job.name}.log").open("a") as log:
        job.process = subprocess.Popen(
            [sys.executable, "-m", "opd", command, *job.overrides], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=os.environ,
            process_group=0, preexec_fn=partial(end_with_parent, signal.SIGTERM),
        )  # fmt: skip
    job.begun = time.monotonic()
    return job


def _write(folder: Path, command: str, jobs: list[Job]) -> None:
    record = {job.name: {"overrides": job.overrides, "code": job.code, "seconds": round(job.seconds, 1)} for job in jobs}
    replace_text(folder / FILE, json.dumps({"schema": SCHEMA, "command": command, "jobs": record}, indent=1) + "\n")


def _state(job: Job) -> str:
    return STATES.get(job.code, f"failed with exit code {job.code}")


def _last_line(folder: Path, job: Job) -> str:
    lines = (folder / "jobs" / f"{job.name}.log").read_text(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def _print(folder: Path, jobs: list[Job]) -> None:
    rows = []
    for job in jobs:
        row = describe(folder / job.name) if (folder / job.name / "config.yaml").is_file() else None
        step, figures = ("", "") if row is None else ("" if row.step is None else str(row.step), row.figures)
        rows.append([job.name, *job.chosen.values(), _state(job), step, figures, f"{job.seconds:.0f}"])
    print_table(f"{len(jobs)} jobs in {folder}", ["folder", *jobs[0].chosen, "state", "step", "figures", "seconds"], rows)
