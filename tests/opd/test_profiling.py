"""Traces of torch's profiler: the steps that are asked for, of the ranks that are, also after a resume."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opd.__main__ import load_config
from opd.config import DistillConfig
from opd.job_config import LoggerConfig, LoggerKind, ProfileConfig
from opd.tracker import Tracker


@pytest.fixture
def make_tracker(tmp_path) -> Callable[..., Tracker]:
    def make(steps: list[int]) -> Tracker:
        return Tracker(tmp_path, "test", DistillConfig(logger=LoggerConfig(kind=LoggerKind.none), num_steps=9, profile=ProfileConfig(steps=steps)))

    return make


def do_steps(tracker: Tracker, first: int, last: int) -> None:
    """Step n multiplies matrices of n x n, so that a trace tells which steps it holds."""
    for step in range(first, last + 1):
        with tracker.timer("update"):
            torch.ones(step, step) @ torch.ones(step, step)
        tracker.log(step, {})


def traces(run_dir: Path) -> dict[str, list[str]]:
    """Names of the events of each trace, by its file's name."""
    found = {}
    for path in (run_dir / "profile").glob("*"):
        with gzip.open(path, "rt") as file:
            found[path.name] = [event["name"] for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    return found


def test_the_steps_asked_for_and_no_others_are_in_the_trace_under_their_phases(make_tracker, tmp_path):
    tracker = make_tracker([2, 4])
    tracker.resume(0)
    tracker.log(0, {})
    do_steps(tracker, 1, 6)
    [(name, events)] = traces(tmp_path).items()
    assert name == "rank-0-steps-2-4.json.gz"
    assert events.count("update") == events.count("aten::mm") == 3


def test_a_trace_from_the_first_step_on_is_without_what_comes_before_it(make_tracker, tmp_path):
    tracker = make_tracker([1, 1])
    tracker.resume(0)
    torch.ones(3, 3) @ torch.ones(3, 3)  # as the evaluation of step 0
    tracker.log(0, {})
    do_steps(tracker, 1, 2)
    assert traces(tmp_path)["rank-0-steps-1-1.json.gz"].count("aten::mm") == 1


def test_a_run_taken_up_inside_the_range_traces_the_rest_of_it(make_tracker, tmp_path):
    tracker = make_tracker([2, 4])
    tracker.resume(2)
    do_steps(tracker, 3, 5)
    [(name, events)] = traces(tmp_path).items()
    assert name == "rank-0-steps-3-4.json.gz"
    assert events.count("update") == 2


def test_a_run_taken_up_after_the_range_traces_nothing(make_tracker, tmp_path):
    tracker = make_tracker([2, 4])
    tracker.resume(4)
    do_steps(tracker, 5, 6)
    assert not (tmp_path / "profile").exists()


def test_a_run_that_fails_inside_the_range_leaves_no_trace_and_the_next_one_can(make_tracker, tmp_path):
    def fail() -> None:
        with make_tracker([1, 3]) as tracker:
            do_steps(tracker, 0, 2)
            raise KeyError("something")

    with pytest.raises(KeyError):
        fail()
    assert not (tmp_path / "profile").exists()
    tracker = make_tracker([1, 3])
    tracker.resume(1)
    do_steps(tracker, 2, 3)
    assert list(traces(tmp_path)) == ["rank-0-steps-2-3.json.gz"]


def test_without_steps_nothing_is_traced(make_tracker, tmp_path):
    tracker = make_tracker([])
    tracker.resume(0)
    do_steps(tracker, 0, 3)
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("command", ["distill", "specialize"])
@pytest.mark.parametrize("steps", ["[3]", "[0,3]", "[3,2]", "[5,10]", "[1,2,3]"])
def test_steps_that_are_no_range_of_the_run_are_refused(command, steps):
    with pytest.raises(ValueError, match=r"^profile\.steps must be the first and the last step to trace, from 1 to num_steps=9"):
        load_config(command, ["num_steps=9", f"profile.steps={steps}"])


def test_ranks_of_a_trace_that_nobody_asked_for_are_refused():
    with pytest.raises(ValueError, match=r"profile\.all_ranks would be ignored without profile\.steps"):
        load_config("distill", ["profile.all_ranks=true"])
