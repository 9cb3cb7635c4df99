"""Stages: commands one after another, each in processes of its own, side by side where there are cores (or GPUs) for it.

    RUN/STAGE/                what the stage's command writes
    RUN/stages/STAGE.json     {"schema": 1, "hash", "state": "running" | "done", "seconds"}
    RUN/stages/STAGE.log      its output

A stage's hash covers its resolved configuration and the hashes of the stages before it. A stage that is done under the same hash is skipped; one
that was interrupted under the same hash resumes; any other starts anew. Progress is read from the metrics the stages write, so they
need no channel back.

SIGTERM or SIGUSR1 reaches the stages under way, which end early, those that train with a checkpoint; and so does the command that runs them, with exit code
PREEMPTED of opd/errors.py, as it does when a stage has ended early by itself. The same command goes on.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from omegaconf import OmegaConf

from opd.alarm_config import AlarmsConfig
from opd.console import ProgressDisplay, headline
from opd.distributed import num_cores
from opd.errors import PREEMPTED, Preempted
from opd.job_config import LoggerConfig
from opd.pipeline_config import PipelineConfig, StageConfig
from opd.run import begin_folder, require_own_folder
from opd.run_lock import lock
from opd.stopping import SIGNALS
from opd.supervisor import end_with_parent
from rollout.files import read_json, replace_text

SCHEMA = 1
POLL_SECONDS = 0.5
STOP_SECONDS = 30.0
"""What a stage has to end beyond the grace of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What the pipeline knows of a command.

    product: the file that its folder has when it is done.
    trains: it takes optimizer steps, and so has a logger.
    is_parallel: it takes as many processes as there are, unless told otherwise; else one.
    """

    product: str
    trains: bool = True
    is_parallel: bool = True


COMMANDS = {
    "specialize": Command(product="student/config.json"),
    "distill": Command(product="student/config.json"),
    "export": Command(product="export.json", trains=False, is_parallel=False),
    "merge": Command(product="merge.json", trains=False, is_parallel=False),
    "evaluate": Command(product="evaluation.json", trains=False),
}
"""The commands that a stage can run."""


@dataclass(slots=True)
class Stage:
    """One stage with what is known of it: its hash, its state file's content, and its process while it runs."""

    name: str
    cfg: StageConfig
    folder: Path
    arguments: list[str]
    hash: str
    num_steps: int
    record: dict
    grace_seconds: float = 0.0
    process: subprocess.Popen | None = None
    begun: float = 0.0
    slots: tuple[int, ...] = ()

    @property
    def is_done(self) -> bool:
        product = self.folder / self.command.product
        return self.record.get("hash") == self.hash and self.record.get("state") == "done" and product.is_file()

    @property
    def command(self) -> Command:
        return COMMANDS[self.cfg.command]


def run_stages(cfg: PipelineConfig, command: str, own: Any, finished: Callable[[Stage], None] | None = None) -> tuple[dict[str, Stage], int]:
    """Run what is not done yet, in the folder of a command with the config `own`; returns (the stages, the most memory that they took, in bytes).

    finished: called with each stage when it is done, with those that were done before at the beginning.

    Raises ValueError where a stage fails, Preempted where one ends early.
    """
    run_dir = Path(cfg.run_dir)
    require_own_folder(run_dir, command)
    stages, free = plan(cfg), _slots(cfg)
    threads = max(1, num_cores() // len(free))
    run_dir.mkdir(parents=True, exist_ok=True)
    problem = lock(run_dir)
    if problem is not None:
        raise ValueError(problem)
    begin_folder(run_dir, own, command)  # first of all, so that what is cut off can be run again
    (run_dir / "stages").mkdir(exist_ok=True)
    if cfg.fresh:
        for stage in stages.values():
            shutil.rmtree(stage.folder, ignore_errors=True)
            stage.record = {}
    peak_memory = _Peak()
    for number in SIGNALS:
        signal.signal(number, _heed)
    with ProgressDisplay() as display:
        for stage in stages.values():
            if stage.is_done:
                display.say(f"{stage.name}: done before, skipped")
        known: set[str] = set()
        try:
            while len(known) < len(stages):
                for stage in stages.values():
                    if stage.process is not None:
                        _follow(stage, free, run_dir, display)
                    if stage.name not in known and stage.is_done:
                        known.add(stage.name)
                        if finished is not None:
                            finished(stage)
                _start_ready(stages, free, run_dir, threads, display)
                if len(known) < len(stages):
                    time.sleep(POLL_SECONDS)
                    peak_memory.measure()
        except Preempted:
            _stop(stages, run_dir, signal.SIGTERM)
            raise
        finally:
            _stop(stages, run_dir, signal.SIGINT)
    return stages, peak_memory.bytes


def plan(cfg: PipelineConfig) -> dict[str, Stage]:
    """The stages with their hashes, in order. Raises ValueError for an unknown command or dependency, or a bad configuration."""
    from opd.composition import load_config

    stages: dict[str, Stage] = {}
    for name, stage in cfg.stages.items():
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"stage {name!r} cannot name a folder of the run: use letters, digits, '_', '-' and '.'")
        unknown = [before for before in stage.after if before not in stages]
        if stage.command not in COMMANDS:
            raise ValueError(f"stage {name} runs {stage.command!r}, which is no command of a pipeline")
        if unknown:
            raise ValueError(f"stage {name} comes after {unknown[0]!r}, which is not a stage before it")
        folder = Path(cfg.run_dir) / name
        overrides = [*stage.overrides, f"run_dir={folder}", f"seed={cfg.seed if stage.seed is None else stage.seed}"]
        config = load_config(stage.command, overrides)
        counted = replace(config, alarms=AlarmsConfig()) if COMMANDS[stage.command].trains else config  # what watches a run does not change it
        identity = OmegaConf.to_yaml(OmegaConf.structured(counted)) + "".join(stages[before].hash for before in stage.after)
        if COMMANDS[stage.command].trains:
            overrides += _logger_overrides(cfg.logger)
        state_file = _state_file(Path(cfg.run_dir), name)
        if folder.exists() and not state_file.is_file():
            raise ValueError(f"{folder} is in the way of stage {name}, which did not make it: move it, or choose another run_dir")
        stages[name] = Stage(
            name=name,
            cfg=stage,
            folder=folder,
            arguments=[stage.command, *overrides],
            hash=hashlib.sha256(identity.encode()).hexdigest(),
            num_steps=max(1, config.total_steps) if COMMANDS[stage.command].trains else 1,
            grace_seconds=config.launch.grace_seconds if COMMANDS[stage.command].trains else 0.0,
            record=read_json(state_file) if state_file.is_file() else {},
        )
    return stages


def _slots(cfg: PipelineConfig) -> list[int]:
    """A slot for each process that may run at a time: one per GPU; without GPUs two, or as many as a stage asks for.

    Raises ValueError where a stage asks for more processes than there are GPUs or cores.
    """
    asked = max((stage.processes or 1 for stage in cfg.stages.values()), default=1)
    most = torch.cuda.device_count() or num_cores()
    if asked > most:
        raise ValueError(f"a stage asks for {asked} processes, and there are {most} {'GPUs' if torch.cuda.is_available() else 'cores'}: lower its processes")
    return list(range(torch.cuda.device_count() or max(asked, min(2, most))))


def _logger_overrides(cfg: LoggerConfig) -> list[str]:
    """The pipeline's logger, for a stage; its runs are one W&B group, each named by its stage unless a name is given."""
    own = {field.name: value for field in fields(cfg) if (value := getattr(cfg, field.name)) is not None and field.name != "kind"}
    return [f"logger={cfg.kind.value}", *(f"logger.{name}={json.dumps(value)}" for name, value in own.items())]


def _start_ready(stages: dict[str, Stage], free: list[int], run_dir: Path, threads: int, display: ProgressDisplay) -> None:
    for stage in stages.values():
        wanted = stage.cfg.processes or (len(free) + _busy(stages) if stage.command.is_parallel else 1)
        ready = not stage.is_done and stage.process is None and all(stages[before].is_done for before in stage.cfg.after)
        if ready and wanted <= len(free):
            stage.slots = tuple(free[:wanted])
            del free[:wanted]
            _start(stage, run_dir, threads)
            display.update(stage.name, 0, stage.num_steps, "starting")


def _start(stage: Stage, run_dir: Path, threads: int) -> None:
    arguments = [*stage.arguments, f"threads={threads}"]
    is_same = stage.record.get("hash") == stage.hash
    if not is_same:
        shutil.rmtree(stage.folder, ignore_errors=True)
    stage.record = {"schema": SCHEMA, "hash": stage.hash, "state": "running", "seconds": stage.record.get("seconds", 0.0) if is_same else 0.0}
    _write_state(run_dir, stage)
    if len(stage.slots) > 1:
        arguments.append(f"launch.processes={len(stage.slots)}")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, stage.slots))
    log = (run_dir / "stages" / f"{stage.name}.log").open("w")
    stage.begun = time.monotonic()
    command, end_too = [sys.executable, "-m", "opd", *arguments], partial(end_with_parent, signal.SIGINT)
    stage.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, preexec_fn=end_too)


def _heed(number: int, _frame: FrameType | None) -> None:
    for other in SIGNALS:  # once is enough: what follows ends the stages
        signal.signal(other, signal.SIG_IGN)
    raise Preempted(f"ended by {signal.Signals(number).name}: the same command goes on with the stages where they were")


def _follow(stage: Stage, free: list[int], run_dir: Path, display: ProgressDisplay) -> None:
    """Show a running stage's progress; when it ends, take note, or raise with the end of its log."""
    step, text = _progress(stage)
    code = stage.process.poll()
    if code is None:
        display.update(stage.name, min(step, stage.num_steps - 1), stage.num_steps, text)
        return
    stage.record["seconds"] += time.monotonic() - stage.begun
    stage.process = None
    free += stage.slots
    if code != 0:
        _write_state(run_dir, stage)
        if code == PREEMPTED:
            raise Preempted(f"stage {stage.name} has ended early: the same command goes on with it where it was")
        log = run_dir / "stages" / f"{stage.name}.log"
        raise ValueError(f"stage {stage.name} failed with exit code {code}; {log} ends: {_last_error(log)}")
    stage.record["state"] = "done"
    _write_state(run_dir, stage)
    display.update(stage.name, stage.num_steps, stage.num_steps, f"{stage.record['seconds']:.0f} s  {text}")


def _progress(stage: Stage) -> tuple[int, str]:
    """The last step in the stage's metrics, and a few of its figures."""
    metrics = stage.folder / "metrics.jsonl"
    if not metrics.is_file():
        return 0, ""
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 65536))
        lines = file.read().decode(errors="ignore").splitlines()
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # a line that is being written, or the cut one at the beginning
            continue
        return record["step"], headline(record)
    return 0, ""


def _stop(stages: dict[str, Stage], run_dir: Path, number: int) -> None:
    """End what still runs (after a signal, or a failure of another stage) by a signal, so that it can resume."""
    running = [stage for stage in stages.values() if stage.process is not None]
    for stage in running:
        stage.process.send_signal(number)
    for stage in running:
        try:
            stage.process.wait(timeout=STOP_SECONDS + (stage.grace_seconds if number == signal.SIGTERM else 0.0))
        except subprocess.TimeoutExpired:
            stage.process.kill()
        stage.process = None
        stage.record["seconds"] += time.monotonic() - stage.begun
        _write_state(run_dir, stage)


class _Peak:
    """The largest resident memory of this process and all its descendants together, seen at any poll."""

    def __init__(self):
        self.bytes, self.own = 0, psutil.Process()

    def measure(self) -> None:
        total = 0
        for process in [self.own, *self.own.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:  # it ended between the listing and the reading
                continue
        self.bytes = max(self.bytes, total)


def _busy(stages: dict[str, Stage]) -> int:
    return sum(len(stage.slots) for stage in stages.values() if stage.process is not None)


def _state_file(run_dir: Path, name: str) -> Path:
    return run_dir / "stages" / f"{name}.json"


def _write_state(run_dir: Path, stage: Stage) -> None:
    replace_text(_state_file(run_dir, stage.name), json.dumps(stage.record) + "\n")


def _last_error(log: Path) -> str:
    """Why a stage failed: the last line that opd itself wrote as an error, else the last exception in the log, else the log's last line."""
    lines = [re.sub(r"^\[rank ?\d+\]:? ", "", line).strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    own = [line.removeprefix("opd: ") for line in lines if line.startswith("opd: ")]
    exceptions = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (own[-1:] or exceptions[-1:] or lines[-1:] or ["nothing"])[0]
