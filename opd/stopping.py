"""Ending a run before its last step, so that the job that is queued again goes on as if nothing had happened.

SIGTERM or SIGUSR1 to any rank, or launch.max_hours, ends all ranks together after the step under way: with a checkpoint, and with the exit code
PREEMPTED. Where that takes longer than launch.grace_seconds from the signal, the process ends at once, with the same code and without the checkpoint: what
was sampled is in the log, and the steps after the last checkpoint are done again. max_hours leaves time for one more step as long as the longest.

An alarm (opd/alarm_actions.py), or `opd evaluate` of an accepted checkpoint (opd/choice.py), ends it in the same way, but with the exit code
STOPPED: a job that is queued again would only go on.
"""

import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

import torch

from opd.checkpoint_writer import settle, wait
from opd.choice import take_end_request
from opd.config import RunConfig
from opd.distributed import Group, is_main, reduce_max
from opd.errors import PREEMPTED, STOPPED, Preempted, RankLost
from opd.run_state import end_state

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAYING_SECONDS = 5.0
LOG = logging.getLogger(__name__)

_ASKED: list[tuple[str, str]] = []
"""Why this process's run is to stop, and a sentence on what the user may do beside going on."""


def ask_to_stop(reason: str, remedy: str) -> None:
    """Have the run stop after the step under way, with a checkpoint and the exit code STOPPED; one rank is enough."""
    _ASKED.append((reason, remedy))


class StopRequest:
    """Whether a run has been asked to end; a context within which the signals are heeded."""

    def __init__(self, cfg: RunConfig):
        self.cfg, self.num_steps, self.is_stopping, self.run_dir = cfg.launch, cfg.total_steps, False, Path(cfg.run_dir)
        self.reason: str | None = None
        self.code = 0
        _ASKED.clear()
        self.begun = self.step_begun = time.monotonic()
        self.longest_step = 0.0
        self.handlers: dict[int, object] = {}
        self.deadline: threading.Timer | None = None

    def __enter__(self) -> "StopRequest":
        self.handlers = {number: signal.signal(number, self._heed) for number in SIGNALS}
        self.step_begun = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exception) -> None:
        if kind is not None and not issubclass(kind, RankLost):
            wait(self.cfg.grace_seconds)
        if self.deadline is not None:
            self.deadline.cancel()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def is_due(self, step: int) -> bool:
        """Whether the run ends after update number `step`, just done; every rank calls it after every step, and all get the same answer."""
        now = time.monotonic()
        self.longest_step, self.step_begun = max(self.longest_step, now - self.step_begun), now
        if self.reason is None and self.cfg.max_hours is not None and now + self.longest_step - self.begun > 3600 * self.cfg.max_hours:
            self.reason = f"launch.max_hours={self.cfg.max_hours:g} is near"
        accepted = take_end_request(self.run_dir) if is_main() else None
        if accepted is not None:
            ask_to_stop(f"opd evaluate accepts the checkpoint of step {accepted}", f"opd export {self.run_dir}@chosen hands the accepted one on")
        own = 2.0 if _ASKED else 1.0 if self.reason is not None else 0.0
        asked = float(reduce_max(torch.tensor(own), Group.data))
        self.code = STOPPED if asked == 2.0 else PREEMPTED
        self.is_stopping = asked > 0 and step < self.num_steps
        return self.is_stopping

    def leave(self, step: int) -> None:
        """Raises Preempted where the run ends here; every rank calls it when the checkpoint after update number `step` is saved."""
        if self.is_stopping:
            settle()
            if self.code == STOPPED:
                reason, remedy = _ASKED[0] if _ASKED else ("the main rank was asked to end", "its log says why")
                raise Preempted(f"stopped after step {step} ({reason}), with a checkpoint: the same command goes on; {remedy}", STOPPED)
            reason = self.reason or "another rank was asked to end"
            raise Preempted(f"ended after step {step} ({reason}), with a checkpoint: the same command goes on from there")

    def _heed(self, number: int, _frame: FrameType | None) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name
            self.deadline = threading.Timer(self.cfg.grace_seconds, self._cut)
            self.deadline.daemon = True
            self.deadline.start()

    def _cut(self) -> None:
        """In the timer's thread."""
        words = f"ended {self.cfg.grace_seconds:g} seconds after {self.reason} (launch.grace_seconds) without a new checkpoint"

        def say() -> None:  # the disk may be what hangs, under the log too
            LOG.warning("opd: %s: the same command goes on from the last one", words)
            end_state(PREEMPTED, words)

        said = threading.Thread(target=say, daemon=True)
        said.start()
        said.join(SAYING_SECONDS)
        os._exit(PREEMPTED)
