"""A run that is killed and started again goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from rollout.model import save_model

SETTINGS = [
    "distill", "domain=[arithmetic]", "domains.arithmetic.prompts.rows=50", "num_steps=8", "rollout.prompts_per_step=8", "rollout.max_new_tokens=6",
    "rollout.decode_width=8", "checkpoint.every=2", "optim.lr=1e-3", "logger=none",
]  # fmt: skip


def start(run_dir, models, *more: str) -> subprocess.Popen:
    student, teacher = models
    arguments = [*SETTINGS, f"run_dir={run_dir}", f"student.model={student}", f"domains.arithmetic.teacher.model={teacher}", *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "opd", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


def records(run_dir) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def numbers(record: dict) -> dict:
    return {name: value for name, value in record.items() if not name.startswith(("seconds/", "throughput/"))}


@pytest.fixture(scope="module")
def models(tmp_path_factory, saved_v4, new_student, tokenizer):
    """Folders of a student and of a teacher with other weights."""
    teacher = new_student("deepseek_v4_tiny", seed=7)
    folder = tmp_path_factory.mktemp("teacher") / "model"
    save_model(folder, teacher, tokenizer, teacher.state_dict())
    return saved_v4, folder


def test_a_killed_run_continues_bit_for_bit(models, tmp_path):
    finish(start(tmp_path / "whole", models))
    killed = start(tmp_path / "killed", models)
    while len(records(tmp_path / "killed")) < 6:
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    finish(start(tmp_path / "killed", models))
    whole, again = records(tmp_path / "whole"), records(tmp_path / "killed")
    assert [record["step"] for record in again] == list(range(9)), "no step twice, none missing"
    assert [numbers(record) for record in again] == [numbers(record) for record in whole]
    left = (tmp_path / "whole" / "student" / "model.safetensors").read_bytes()
    assert left == (tmp_path / "killed" / "student" / "model.safetensors").read_bytes()


def test_a_run_folder_refuses_another_configuration(models, tmp_path):
    finish(start(tmp_path / "run", models, "num_steps=2"))
    process = start(tmp_path / "run", models, "num_steps=2", "optim.lr=2e-3")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "optim.lr" in errors
    assert "fresh=true" in errors


def test_ctrl_c_leaves_a_run_that_resumes(models, tmp_path):
    process = start(tmp_path / "run", models)
    while len(records(tmp_path / "run")) < 4:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1].startswith("opd: interrupted")
    finish(start(tmp_path / "run", models))
    assert [record["step"] for record in records(tmp_path / "run")] == list(range(9))
