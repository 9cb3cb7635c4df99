"""Jobs through hydra-submitit-launcher, by its executor on this machine."""

import json
import os
import subprocess
import sys

import pytest

SETTINGS = [
    "domain=[arithmetic]", "domains.arithmetic.prompts.rows=50", "num_steps=4", "rollout.prompts_per_step=8", "rollout.max_new_tokens=4",
    "rollout.decode_width=8", "optim.lr=1e-3", "logger=none", "threads=1", "check.signal=off", "hydra/launcher=submitit_local",
]  # fmt: skip


def submit(folder, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "opd.submission", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(("bench",), "name the command"), (("distill",), "choose how to submit"), (("distill", "hydra/launcher=x", "+fresh=True"), "begin anew each time")],
)
def test_what_cannot_be_submitted_is_refused(arguments, sentence, tmp_path):
    ended = submit(tmp_path, *arguments)
    assert ended.returncode == 2
    assert sentence in ended.stderr


@pytest.mark.slow
def test_a_job_that_ends_early_each_time_is_queued_again_until_its_run_is_done(tmp_path, saved_v4, saved_qwen3_moe):
    """By launch.max_hours, of which a second job finds as little as the first: each does one step."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    models = [f"student.model={saved_v4}", f"domains.arithmetic.teacher.model={saved_qwen3_moe}"]
    ended = submit(tmp_path, "distill", *SETTINGS, *models, "num_steps=3", "run_dir=run", "launch.max_hours=0.0001")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]
    logs = "".join(path.read_text() for path in (tmp_path / "multirun").rglob("*_log.*"))
    assert logs.count("with a checkpoint: the same command goes on from there") == 2
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
