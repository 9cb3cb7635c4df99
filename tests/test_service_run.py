"""Whole runs of `opd distill` whose rollouts come from sampler processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opd.__main__ import load_config
from opd.distill import distill
from rollout.model import save_model
from rollout.replay import load_rollouts, replay_file

NUM_STEPS = 6
SETTINGS = [
    "domain=[arithmetic]", "domains.arithmetic.prompts.rows=50", f"num_steps={NUM_STEPS}", "rollout.prompts_per_step=8", "rollout.max_new_tokens=6",
    "rollout.decode_width=8", "rollout.save=true", "checkpoint.every=2", "optim.lr=1e-3", "logger=none", "threads=1", "quant=mxfp4_experts",
    "check.signal=off",
]  # fmt: skip
SERVICE = ["rollout.sampler=service", "rollout.service.threads=1"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory, saved_v4, new_student, tokenizer) -> list[str]:
    teacher = new_student("deepseek_v4_tiny", seed=7)
    folder = tmp_path_factory.mktemp("teacher") / "model"
    save_model(folder, teacher, tokenizer, teacher.state_dict())
    return [*SETTINGS, f"student.model={saved_v4}", f"domains.arithmetic.teacher.model={folder}"]


def run(folder: Path, arguments: list[str]) -> Path:
    distill(load_config("distill", [*arguments, f"run_dir={folder}"]))
    return folder


def losses(run_dir: Path) -> list[float]:
    path = run_dir / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [record["step/loss"] for record in records if record["step"] > 0]


def completions(run_dir: Path) -> list[list[list[int]]]:
    return [[rollout.completion_T.tolist() for rollout in load_rollouts(replay_file(run_dir, step))] for step in range(NUM_STEPS)]


@pytest.fixture(scope="module")
def ahead(settings, device, tmp_path_factory) -> Path:
    """A run whose rollouts are sampled one step ahead, which nobody disturbed."""
    return run(tmp_path_factory.mktemp("runs") / "ahead", [*settings, *SERVICE, "rollout.staleness=1"])


@pytest.mark.slow
@pytest.mark.multi
def test_a_run_with_sampler_processes_is_the_run_without(settings, device, tmp_path):
    alone = run(tmp_path / "alone", settings)
    served = run(tmp_path / "served", [*settings, *SERVICE])
    assert completions(served) == completions(alone)
    assert losses(served) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.slow
@pytest.mark.multi
def test_one_step_ahead_every_rollout_says_which_weights_sampled_it(ahead):
    steps = [{rollout.policy_step for rollout in load_rollouts(replay_file(ahead, step))} for step in range(NUM_STEPS)]
    assert steps == [{max(0, step - 1)} for step in range(NUM_STEPS)]


@pytest.mark.slow
@pytest.mark.multi
def test_a_run_one_step_ahead_that_is_killed_continues_with_the_weights_it_would_have_had(settings, ahead, tmp_path):
    arguments = [*settings, *SERVICE, "rollout.staleness=1", f"run_dir={tmp_path}"]
    process = subprocess.Popen([sys.executable, "-m", "opd", "distill", *arguments], stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 300
    while len(losses(tmp_path)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it has to be killed before its end"
    run(tmp_path, arguments)
    assert completions(tmp_path) == completions(ahead)
    assert losses(tmp_path) == pytest.approx(losses(ahead), rel=1e-5)
