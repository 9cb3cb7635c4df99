"""Whole runs under a supervisor and in a pipeline: a rank that dies costs nothing but time, and a signal ends all with a checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from opd.__main__ import load_config
from opd.distill import distill

SETTINGS = [
    "domain=[arithmetic]", "domains.arithmetic.prompts.rows=50", "num_steps=6", "rollout.prompts_per_step=8", "rollout.max_new_tokens=4",
    "rollout.decode_width=8", "checkpoint.every=2", "optim.lr=1e-3", "logger=none", "threads=1", "check.signal=off",
]  # fmt: skip


@pytest.fixture(scope="module")
def settings(saved_v4, teacher_folders) -> list[str]:
    return [*SETTINGS, f"student.model={saved_v4}", f"domains.arithmetic.teacher.model={teacher_folders['v4']}"]


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "opd", "distill", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def records(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []


def wait_for_records(process: subprocess.Popen, run_dir: Path, count: int) -> None:
    while len(records(run_dir)) < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.multi
def test_a_rank_that_is_killed_is_started_again_and_the_run_ends_bit_for_bit_like_one_that_was_not(settings, tmp_path, numbers, device):
    """With one rank, so that the tests' own process can make the run to compare with."""
    distill(load_config("distill", [*settings, f"run_dir={tmp_path / 'whole'}"]))
    run_dir = tmp_path / "run"
    process = start(*settings, f"run_dir={run_dir}", "launch.max_restarts=1", "fresh=true")
    wait_for_records(process, run_dir, 5)
    [rank] = psutil.Process(process.pid).children()
    rank.kill()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "was killed by SIGKILL; start 2 of 2 goes on from the last checkpoint" in errors
    assert numbers(run_dir) == numbers(tmp_path / "whole")
    assert (run_dir / "student" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "student" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.multi
def test_two_ranks_survive_a_killed_and_a_stopped_one_and_a_signal_bit_for_bit(settings, tmp_path, numbers):
    settings = [*settings, "launch.processes=2", "launch.heartbeat_seconds=10"]
    whole = start(*settings, f"run_dir={tmp_path / 'whole'}")
    _, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    run_dir = tmp_path / "run"
    process = start(*settings, f"run_dir={run_dir}", "launch.max_restarts=2")
    for count, number in [(2, signal.SIGKILL), (4, signal.SIGSTOP)]:
        wait_for_records(process, run_dir, count)
        one = next(rank for rank in psutil.Process(process.pid).children() if rank.environ()["RANK"] == "1")
        one.send_signal(number)
        one.wait(120)
    wait_for_records(process, run_dir, 5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert f"rank 1 (pid {one.pid} on " in errors
    last = start(*settings, f"run_dir={run_dir}")
    _, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    assert numbers(run_dir) == numbers(tmp_path / "whole")
    assert (run_dir / "student" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "student" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.multi
def test_ranks_that_are_refused_end_with_exit_code_2_and_are_not_started_again(tmp_path, settings):
    process = start(*settings, "student.model=./no/student", f"run_dir={tmp_path}", "launch.processes=2", "launch.max_restarts=2")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert errors.count("the student is not at ./no/student") == 2
    assert "start 2" not in errors


PIPELINE = """# @package _global_
stages:
  base:
    command: specialize
    processes: {processes}
    overrides: [student=qwen3_moe_tiny, "domain=[arithmetic]", domains.arithmetic.prompts.rows=50, num_steps=60, examples_per_step=8, checkpoint.every=0]
"""


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_pipeline_that_is_asked_to_end_ends_its_stage_with_a_checkpoint_and_goes_on(processes, tmp_path):
    (tmp_path / "conf" / "pipeline").mkdir(parents=True)
    (tmp_path / "conf" / "pipeline" / "one.yaml").write_text(PIPELINE.format(processes=processes))
    command = [sys.executable, "-m", "opd", "pipeline=one", "run_dir=run", "logger=none"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    stage = tmp_path / "run" / "base"
    process = subprocess.Popen(command, cwd=tmp_path, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)
    wait_for_records(process, stage, 3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert errors.splitlines()[-1] == "opd: ended by SIGTERM: the same command goes on with the stages where they were"
    last = records(stage)[-1]["step"]
    assert 2 <= last < 60
    assert json.loads((stage / "checkpoints" / "latest.json").read_text())["step"] == last
    ended = subprocess.run(command, cwd=tmp_path, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300, check=False, **pipes)
    assert ended.returncode == 0, ended.stderr
    assert [record["step"] for record in records(stage)] == list(range(61))
