"""torch profiler traces of chosen steps: `profile.steps=[10,12]` writes RUN/profile/rank-0-steps-10-12.json.gz, for chrome://tracing or Perfetto.

Steps are numbered as in metrics.jsonl: step n makes the n-th update, and what follows its record (a checkpoint) belongs to step n + 1. The phases of a
step stand in the trace under their names (opd/tracker.py marks them), each operator and kernel below. A traced step is slower, as are its record's seconds.

A run that is taken up inside the range traces what is left of it, and its file says so; one that is taken up before traces the range (again). A trace has about
half a kilobyte per operator before compression, and is held in memory until it is written: a few steps, not an epoch.
"""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from opd.distributed import Group, barrier, is_main, rank
from opd.job_config import ProfileConfig


class StepProfiler:
    """Begins and ends the trace between two steps, where there are steps to trace."""

    def __init__(self, run_dir: Path, cfg: ProfileConfig):
        self.folder = run_dir / "profile"
        self.first, self.last = cfg.steps or (0, -1)
        self.is_traced = is_main() or cfg.all_ranks
        self.begun: int | None = None
        self.trace: profile | None = None

    def step_done(self, step: int) -> None:
        """`step` has been done: end the trace after the last of its steps, or begin it before the first; every rank calls it.

        All ranks wait for those that are traced: they would in the next step, whose seconds it would change, and writing takes some.
        """
        if self.trace is not None and step == self.last:
            self._write()
        elif self.is_traced and self.trace is None and self.first <= step + 1 <= self.last:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self.begun, self.trace = step + 1, profile(activities=activities)
            self.trace.start()
        if step in (self.first - 1, self.last):
            barrier()

    def close(self) -> None:
        """Let go of a trace whose steps were not all done."""
        if self.trace is not None:
            self.trace.stop()
            self.trace = None

    def _write(self) -> None:
        trace = self.trace
        self.close()
        self.folder.mkdir(exist_ok=True)
        file = self.folder / f"rank-{rank(Group.data)}-steps-{self.begun}-{self.last}.json.gz"
        partial = file.with_name("partial-" + file.name)  # the ending is what has it compressed
        trace.export_chrome_trace(str(partial))
        partial.rename(file)
