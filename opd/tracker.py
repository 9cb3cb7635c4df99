"""Tracker: the run's metrics into metrics.jsonl and Weights & Biases (opd/wandb_log.py), with seconds and rates per phase.

The file is the record; W&B gets the same numbers under the same names (opd/metrics.py). A resumed run drops the lines of steps that
will be done again and continues the same W&B run, whose id lives in the run folder. Only the main rank writes. Text of prompts leaves
the machine only with `logger.upload_text`: without it, system prompts are taken out of the configuration that W&B gets.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import record_function

from opd.alarm_actions import act, read_told, title_of
from opd.alarms import Alarms, rules_of
from opd.checkpoint_files import TAG, saved_tags, step_of
from opd.config import RunConfig
from opd.console import ProgressDisplay, headline
from opd.distributed import is_main
from opd.errors import PREEMPTED, Preempted
from opd.flops import measured_matmul_rate
from opd.job_config import LoggerKind
from opd.metrics import SCHEMA
from opd.profiling import StepProfiler
from opd.run import config_dict
from opd.samples import forget_after
from opd.scores import forget_scores
from opd.teacher_answers import length_ratios
from opd.throughput import memory_metrics, phase_metrics, present_device
from opd.wandb_log import WandbLog
from rollout.files import read_json, read_lines, replace_text
from rollout.model import torch_dtype


class Tracker:
    """Collects the seconds of each phase and writes one record per step."""

    def __init__(self, run_dir: Path, task: str, cfg: RunConfig):
        """task: what the progress display calls the run."""
        self.file, self.task, self.num_steps = run_dir / "metrics.jsonl", task, cfg.total_steps
        self.seconds: dict[str, float] = {}
        self.step_begun = time.monotonic()
        self.wandb = WandbLog(run_dir, cfg.logger, config_dict(cfg)) if is_main() and cfg.logger.kind is not LoggerKind.none else None
        self.pointer: tuple[str, int] | None = None  # to the newest checkpoint that W&B has been told of, or is not to be: its tag, and when it was written
        self.display = ProgressDisplay(visible=is_main())
        self.dtype, self.profiler = torch_dtype(cfg.student.dtype), StepProfiler(run_dir, cfg.profile)
        self.alarms = Alarms(rules_of(cfg)) if cfg.alarms.enabled else None
        self.command = cfg.alarms.command
        self.first: dict[str, float] = {}  # the record of step 0

    def __enter__(self) -> "Tracker":
        self.display.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.profiler.close()
        self.display.__exit__(*exception)
        if self.wandb is not None:
            self._tell_checkpoint()
            code = exception[1].code if isinstance(exception[1], Preempted) else int(exception[0] is not None)
            self.wandb.finish(code, is_preempted=code == PREEMPTED)

    def resume(self, step: int) -> None:
        """Forget the records, samples and scores of steps that will be done again: those after `step`, and with 0 all."""
        if is_main():
            forget_after(self.file.parent, step)
            forget_scores(self.file.parent, step)
        if is_main():
            records = [record for record in read_lines(self.file) if step and record["step"] <= step]
            if self.file.exists():
                replace_text(self.file, "".join(json.dumps(record) + "\n" for record in records))
            self._take_up(step, records)
        if step:
            self.display.say(f"{self.task}: continues after step {step}")
            self.profiler.step_done(step)
        measured_matmul_rate(self.dtype, present_device())  # once, before the first step's clock runs
        self.step_begun = time.monotonic()

    def record_teachers(self, history: list[dict[str, Any]]) -> None:
        """Put which teachers score which steps (teachers/manifest.py) into W&B's configuration; a path, a revision, hashes, no text."""
        if self.wandb is None:
            return
        self.wandb.configure({"teacher_history": history})
        for name, teacher in history[-1]["teachers"].items() if history else ():
            self.wandb.uses(f"teacher-{name}", "model", teacher.get("model"), teacher)

    def record_start(self, facts: dict[str, Any]) -> None:
        """Tell W&B what a start of the run is made of (opd/run_facts.py): code, versions, hardware, the model it begins with, the data; no diff, no rows."""
        if self.wandb is None:
            return
        self.wandb.configure({"start": {name: facts[name] for name in ("step", "code", "git", "versions", "hardware", "ranks")}})
        if facts["student"] is not None:
            self.wandb.uses("student", "model", facts["student"]["model"], facts["student"])
        rows = {f"data-{domain}-{source}": data for domain, sources in facts["data"].items() for source, data in sources.items()}
        rows |= {f"held-out-{domain}": data for domain, data in facts["held_out"].items()}
        for name, data in rows.items():
            is_synthetic = (data["path"] or "").startswith("synthetic:")
            self.wandb.uses(name, "dataset", None if is_synthetic else data["path"], data)

    @contextmanager
    def timer(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to a phase of the present step; a trace shows it under this name."""
        begun = time.monotonic()
        with record_function(phase):
            yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - begun

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write the record of a step (number of updates done) and show it; every rank calls it."""
        now = time.monotonic()
        metrics = metrics | phase_metrics(metrics, self.seconds, self.dtype) | memory_metrics()
        metrics["seconds/step"] = now - self.step_begun
        if "step/completion_tokens" in metrics:
            metrics["throughput/completion_tokens_per_second"] = metrics["step/completion_tokens"] / metrics["seconds/step"]
        begun = time.monotonic()
        self.profiler.step_done(step)
        self.seconds, self.step_begun = {}, now + time.monotonic() - begun  # a trace is written between two steps
        if not is_main():
            return
        metrics = self._judged(step, metrics)
        with self.file.open("a") as file:
            file.write(json.dumps({"schema": SCHEMA, "step": step, **metrics}) + "\n")
        if self.wandb is not None:
            self.wandb.log(step, metrics)
            self._tell_checkpoint()
        if self.alarms is not None and step:
            act(self.file.parent, step, self.alarms.begun, self.command, self.wandb)
        if step:
            self.display.update(self.task, step, self.num_steps, headline(metrics))

    def _tell_checkpoint(self) -> None:
        """Tell W&B of the checkpoint in force, where it is a new one: by its pointer, which follows when it is whole, whoever writes it."""
        newest = self._read_pointer()
        if newest not in (None, self.pointer):
            self.pointer = newest
            self.wandb.made_checkpoint(self.file.parent / "checkpoints" / newest[0])

    def _read_pointer(self) -> tuple[str, int] | None:
        """The pointer's tag, and when it was written; None where there is none yet, or a resume has to say what is wrong with it."""
        pointer = self.file.parent / "checkpoints" / "latest.json"
        try:
            tag, written = read_json(pointer).get("tag"), pointer.stat().st_mtime_ns
        except (OSError, ValueError):
            return None
        return (tag, written) if isinstance(tag, str) and TAG.fullmatch(tag) else None

    def _take_up(self, step: int, records: list[dict[str, Any]]) -> None:
        """Remember what later steps are held against; records: those of the steps that count."""
        self.first = next((record for record in records if record["step"] == 0), {})
        if self.alarms is not None:
            self.alarms.replay(records)
        if self.wandb is None:
            return
        run_dir, newest = self.file.parent, self._read_pointer()
        tags = [tag for tag in saved_tags(run_dir / "checkpoints") if step_of(tag) <= step]
        self.wandb.take_up(records, self._alerts(step), [run_dir / "checkpoints" / tag for tag in tags])
        if self.wandb.is_offline or (newest is not None and step_of(newest[0]) > step):  # online it may not have been told of the one that it goes on from
            self.pointer = newest

    def _alerts(self, step: int) -> list[tuple[str, str]]:
        """(title, text) of the alerts until a step; not those of steps that have been done again since, in which the alarm saw nothing."""
        rules, begun = ({}, set()) if self.alarms is None else (self.alarms.rules, self.alarms.replayed)
        told = [one for one in read_told(self.file.parent) if one["step"] <= step]
        told = [one for one in told if one["alarm"] not in rules or (one["step"], one["alarm"], one["metric"]) in begun]
        return [(title_of(self.file.parent, one["step"], one["alarm"]), one["line"]) for one in told]

    def _judged(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """A step's metrics with those that need the steps before."""
        if step == 0:
            self.first = metrics
            return metrics
        metrics = metrics | length_ratios(metrics, self.first)
        return metrics | self.alarms.observe(step, metrics) if self.alarms is not None else metrics
