"""Ending a run early: signals, the clock, and the time that is left after a signal."""

import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from opd import stopping
from opd.config import RunConfig
from opd.errors import PREEMPTED, Preempted
from opd.job_config import LaunchConfig
from opd.run_state import State, read_state
from opd.stopping import SIGNALS, StopRequest


def config(**launch) -> RunConfig:
    return RunConfig(num_steps=5, launch=LaunchConfig(**launch))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_after_the_step_and_its_checkpoint(number):
    with StopRequest(config()) as stop:
        assert not stop.is_due(1)
        stop.leave(1)
        os.kill(os.getpid(), number)
        assert stop.is_due(2)
        with pytest.raises(Preempted, match=rf"after step 2 \({signal.Signals(number).name}\), with a checkpoint"):
            stop.leave(2)


def test_after_the_last_step_there_is_nothing_to_end():
    with StopRequest(config()) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert not stop.is_due(5)
        stop.leave(5)


def test_outside_of_the_run_signals_mean_what_they_meant():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest(config()):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(("hours", "longest", "is_due"), [(None, 1e9, False), (1.0, 3000.0, False), (1.0, 4000.0, True)])
def test_the_clock_leaves_time_for_one_more_step_as_long_as_the_longest(hours, longest, is_due):
    with StopRequest(config(max_hours=hours)) as stop:
        stop.longest_step = longest
        assert stop.is_due(1) == is_due


HANGING = """
import os, signal, sys, time
from pathlib import Path
from opd.config import LaunchConfig, RunConfig
from opd.run_state import begin_state
from opd.stopping import StopRequest
begin_state(Path(sys.argv[1]), "distill", 100)
with StopRequest(RunConfig(launch=LaunchConfig(grace_seconds=0.2))):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_a_step_that_outlasts_the_grace_is_cut_with_the_same_exit_code(tmp_path):
    ended = subprocess.run([sys.executable, "-c", HANGING, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == PREEMPTED, ended.stderr
    words = "ended 0.2 seconds after SIGTERM (launch.grace_seconds) without a new checkpoint"
    assert words in ended.stderr
    assert (read_state(tmp_path).state, read_state(tmp_path).why) == (State.preempted, words)


def test_a_log_that_hangs_does_not_keep_the_job_beyond_its_grace(monkeypatch):
    codes, never = [], threading.Event()
    monkeypatch.setattr(stopping, "SAYING_SECONDS", 0.1)
    monkeypatch.setattr(stopping, "LOG", SimpleNamespace(warning=lambda *_: never.wait()))
    monkeypatch.setattr(stopping, "end_state", lambda *_: None)
    monkeypatch.setattr(stopping, "os", SimpleNamespace(_exit=codes.append))
    StopRequest(config())._cut()
    never.set()
    assert codes == [PREEMPTED]


TWO_RANKS = """
import os, signal, sys
from pathlib import Path
from opd.config import RunConfig
from opd.distributed import Group, rank, start_processes, stop_processes
from opd.errors import Preempted
from opd.stopping import StopRequest
start_processes()
with StopRequest(RunConfig(num_steps=5)) as stop:
    for step in range(1, 6):
        if step == 3 and rank(Group.data) == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        try:
            if stop.is_due(step):
                stop.leave(step)
        except Preempted as end:
            Path(sys.argv[1], f"rank_{rank(Group.data)}").write_text(str(end))
            break
stop_processes()
"""


@pytest.mark.multi
def test_a_signal_to_one_rank_ends_all_after_the_same_step(tmp_path):
    (tmp_path / "script.py").write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "script.py"), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    words = [(tmp_path / f"rank_{number}").read_text().partition(", with")[0] for number in range(2)]
    assert words == ["ended after step 3 (another rank was asked to end)", "ended after step 3 (SIGUSR1)"]
