"""Ending a run early: signals, the clock, and the time that is left after a signal."""

import os
import signal
import subprocess
import sys
import time

import pytest

from opd.config import RunConfig
from opd.errors import PREEMPTED, Preempted
from opd.job_config import LaunchConfig
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
import os, signal, time
from opd.config import LaunchConfig, RunConfig
from opd.stopping import StopRequest
with StopRequest(RunConfig(launch=LaunchConfig(grace_seconds=0.2))):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_a_step_that_outlasts_the_grace_is_cut_with_the_same_exit_code():
    begun = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == PREEMPTED, ended.stderr
    assert "ended 0.2 seconds after SIGTERM (launch.grace_seconds) without a new checkpoint" in ended.stderr
    assert time.monotonic() - begun < 60
