"""Launchers other than ours: two ranks that each starts, by the very line of its documentation, give the losses of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opd.__main__ import load_config
from opd.distill import distill

BIN = Path(sys.executable).parent
LINES = {
    "accelerate": ["accelerate", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--no_local_rank"],
    "torchrun": ["torchrun", "--nnodes", "1", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"],
}
SETTINGS = [
    "domain=[arithmetic]", "domains.arithmetic.prompts.rows=50", "num_steps=3", "rollout.prompts_per_step=8", "rollout.max_new_tokens=4",
    "rollout.decode_width=8", "optim.lr=1e-3", "logger=none", "threads=1", "check.signal=off", "deepspeed=zero1",
]  # fmt: skip


@pytest.fixture(scope="module")
def settings(saved_v4, saved_qwen3_moe) -> list[str]:
    return [*SETTINGS, f"student.model={saved_v4}", f"domains.arithmetic.teacher.model={saved_qwen3_moe}"]


@pytest.fixture(scope="module")
def saved_run(settings, tmp_path_factory, device) -> Path:
    """Of one process, whose rollouts are saved."""
    run_dir = tmp_path_factory.mktemp("saved") / "run"
    distill(load_config("distill", [*settings, f"run_dir={run_dir}", "rollout.save=true"]))
    return run_dir


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["step/loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()[1:]]


@pytest.mark.slow
@pytest.mark.multi
@pytest.mark.parametrize("launcher", LINES)
def test_two_ranks_of_a_launcher_give_the_losses_of_one_process(launcher, settings, saved_run, tmp_path):
    program, *options = LINES[launcher]
    command = [BIN / program, *options, "--module", "opd", "distill", *settings, f"run_dir={tmp_path / 'run'}", f"rollout.replay={saved_run}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert losses(tmp_path / "run") == pytest.approx(losses(saved_run), rel=1e-5)
    assert len(losses(saved_run)) == 3
