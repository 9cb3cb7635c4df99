"""The ranks of one command on this machine, watched, and started again where one dies: launch.processes and launch.max_restarts.

torchrun does the same and knows no exit codes: it starts a run again that was refused, or that ended early on purpose, kills ranks 30 s after a signal though
they still save, and says 1 whatever they said. So here each rank is a process of the same command, with the environment that torchrun would give it:

    0, 2, 75, 130       all ranks are done, refused, ended early with a checkpoint, interrupted: so ends the supervisor
    anything else       a rank has died: the others are ended, and all begin again from the last checkpoint, launch.max_restarts times at most; then 1;
                        after a signal not at all, and it is 75 (130): a rank whose grace ran out is killed

Signals to the supervisor go on to the ranks, which decide; it ends after them. Each is a process group of its own, so that a terminal's Ctrl-C reaches it
once, and Linux kills it when the supervisor is gone, however it went: a checkpoint is whole or not there. The store at which the ranks meet is the
supervisor's, so that rank 0 is a rank like any other (opd/heartbeat.py).
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import torch

from opd.config import EvaluateConfig, RunConfig
from opd.distributed import is_launched, open_store, rank_environment
from opd.errors import INTERRUPTED, PREEMPTED, STOPPED, USER_ERROR
from opd.heartbeat import AGAIN, Failure, read_failure
from opd.job_config import RanksConfig

MARK = "OPD_SUPERVISED"
"""In the environment of the ranks that a supervisor started."""

ENDINGS = (0, USER_ERROR, STOPPED, PREEMPTED, INTERRUPTED)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
POLL_SECONDS = 0.1
LEAVE_SECONDS = 10.0
"""What the other ranks have to end by themselves, with a sentence, when one has died; and a third of launch.heartbeat_seconds, in which they find out which."""
PAUSE_SECONDS = 1.0
LIBC = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How the ranks of one start ended: an exit code, and of a failure which rank it was."""

    code: int
    sentence: str = ""


def require_no_fresh_requeue(cfg: RunConfig | EvaluateConfig) -> None:
    """Raises ValueError where a job that SLURM has queued again, or torchrun has started again, would begin anew."""
    restarts = max(int(os.environ.get(name, "0")) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    if isinstance(cfg, RunConfig) and cfg.fresh and restarts > 0:
        raise ValueError("this job has been started again, and fresh=true would delete what it did before: leave fresh out")


def needs_supervisor(cfg: RanksConfig) -> bool:
    """Whether this process starts ranks rather than be one. Raises ValueError where another launcher has started it, or there are too few GPUs."""
    if MARK in os.environ or (cfg.processes == 1 and cfg.max_restarts == 0):
        return False
    if is_launched():
        raise ValueError("launch.processes and launch.max_restarts are for a command alone, and this one is a launcher's rank: use torchrun's --max-restarts")
    num_devices = torch.cuda.device_count()
    if num_devices and cfg.processes > num_devices:
        raise ValueError(f"launch.processes={cfg.processes} is more than the {num_devices} GPUs there are: lower it")
    return True


def end_with_parent(number: int) -> None:
    """In a new process: have Linux send it a signal when its parent is gone, and heed interrupts, which what a shell starts in the background ignores."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    LIBC.prctl(1, number)  # PR_SET_PDEATHSIG


class Supervisor:
    """Starts, watches and ends the ranks of a command, a program and its arguments; its config says how many, and how often."""

    def __init__(self, command: list[str], cfg: RunConfig | EvaluateConfig):
        self.command, self.cfg = command, cfg.launch
        self.config_file = Path(cfg.run_dir) / "config.yaml"
        self.is_fresh, self.written_before = isinstance(cfg, RunConfig) and cfg.fresh, self._written()
        self.signals: list[int] = []
        self.num_sent = 0
        self.host = socket.gethostname()

    def run(self) -> int:
        """Run the command in ranks until it ends or restarts are used up; returns the exit code."""
        handlers = {number: signal.signal(number, self._heed) for number in SIGNALS}
        try:
            return self._run()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        for restart in range(self.cfg.max_restarts + 1):
            ending = self._start_once()
            if ending.code in ENDINGS:
                return ending.code
            if self.signals or restart == self.cfg.max_restarts:
                break
            _say(f"{ending.sentence}; start {restart + 2} of {self.cfg.max_restarts + 1} goes on from the last checkpoint")
            time.sleep(PAUSE_SECONDS)
        if self.signals:  # a grace that ran out, perhaps
            _say(f"{ending.sentence}; {AGAIN}")
            return INTERRUPTED if signal.SIGINT in self.signals else PREEMPTED
        used = f", and launch.max_restarts={self.cfg.max_restarts} are used up" if self.cfg.max_restarts else ""
        _say(f"{ending.sentence}{used}; {AGAIN}")
        return 1

    def _start_once(self) -> Ending:
        """Start all ranks, and wait for all of them."""
        store, self.num_sent = open_store(), 0
        ranks = [self._start(number, store) for number in range(self.cfg.processes)]
        ended: dict[int, int] = {}
        deadline = None
        while len(ended) < len(ranks):
            self._pass_on([ranks[number] for number in range(len(ranks)) if number not in ended])
            time.sleep(POLL_SECONDS)
            new = {number: code for number, rank in enumerate(ranks) if number not in ended and (code := rank.poll()) is not None}
            ended |= dict(sorted(new.items(), key=lambda item: (item[1] >= 0, item[1] == 1)))  # what nobody else can cause comes first
            if deadline is None and any(code not in (0, STOPPED, PREEMPTED, INTERRUPTED) for code in new.values()):
                deadline = time.monotonic() + LEAVE_SECONDS + self.cfg.heartbeat_seconds / 3
            if deadline is not None and time.monotonic() > deadline:
                break
        for number, rank in enumerate(ranks):
            if number not in ended:
                os.killpg(rank.pid, signal.SIGKILL)
                rank.wait()
        return self._judge(ended, {number: rank.pid for number, rank in enumerate(ranks)}, read_failure(store))

    def _judge(self, ended: dict[int, int], pids: dict[int, int], failure: Failure | None) -> Ending:
        """ended: exit codes of the ranks that ended by themselves, in this order. failure: what a rank left in the store."""
        failed = {number: code for number, code in ended.items() if code != 0}
        if not failed:
            return Ending(code=0)
        if self.signals and PREEMPTED in failed.values():
            return Ending(code=PREEMPTED)
        if {-code for code in failed.values()} <= set(self.signals):  # before the first step, a signal ends a rank at once
            return Ending(code=INTERRUPTED if signal.SIGINT in self.signals else PREEMPTED)
        number, code = next(iter(failed.items()))
        if code in ENDINGS:
            return Ending(code=code)
        where = f"rank {number} (pid {pids[number]} on {self.host})"
        if code < 0:
            return Ending(code=1, sentence=f"{where} was killed by {signal.Signals(-code).name}")
        return Ending(code=1, sentence=f"{where} ended with exit code {code}" if failure is None else failure.sentence.removesuffix(f"; {AGAIN}"))

    def _start(self, number: int, store) -> subprocess.Popen:
        begun_anew = self.is_fresh and self._written() not in (None, self.written_before)
        command = [*self.command, "fresh=false"] if begun_anew else self.command
        environment = os.environ | rank_environment(number, self.cfg.processes, store) | {MARK: "1"}
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, process_group=0, preexec_fn=partial(end_with_parent, signal.SIGKILL))

    def _written(self) -> int | None:
        """When the run folder's configuration was written."""
        return self.config_file.stat().st_mtime_ns if self.config_file.is_file() else None

    def _pass_on(self, ranks: list[subprocess.Popen]) -> None:
        for number in self.signals[self.num_sent :]:
            for rank in ranks:
                rank.send_signal(number)
            self.num_sent += 1

    def _heed(self, number: int, _frame: FrameType | None) -> None:
        self.signals.append(number)


def _say(sentence: str) -> None:
    print(f"opd: {sentence}", file=sys.stderr, flush=True)
