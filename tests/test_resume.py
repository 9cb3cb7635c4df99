"""A run that is killed and started again goes on as if nothing had happened."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from opd.__main__ import load_config
from opd.distill import distill
from opd.run_facts import read_starts
from opd.runs import describe
from rollout.model import save_model

SETTINGS = [
    "domain=[arithmetic]", "domains.arithmetic.prompts.rows=50", "num_steps=30", "rollout.prompts_per_step=8", "rollout.max_new_tokens=6",
    "rollout.decode_width=8", "checkpoint.every=2", "optim.lr=1e-3", "logger=none", "threads=1", "quant=mxfp4_experts",
    "check.signal=off", "samples.every=2",
]  # fmt: skip


def settings(run_dir, models) -> list[str]:
    student, teacher = models
    return [*SETTINGS, f"run_dir={run_dir}", f"student.model={student}", f"domains.arithmetic.teacher.model={teacher}"]


def start(run_dir, models) -> subprocess.Popen:
    command = [sys.executable, "-m", "opd", "distill", *settings(run_dir, models), "logger=offline"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    heeded = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it, and so would all that it starts
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    finally:
        signal.signal(signal.SIGINT, heeded)


def look(*words: str) -> str:
    """What a command that only looks prints."""
    done = subprocess.run([sys.executable, "-m", "opd", *words], capture_output=True, text=True, timeout=60, env=os.environ | {"COLUMNS": "180"}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def finish(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


def records(run_dir) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.fixture(scope="module")
def models(tmp_path_factory, saved_v4, new_student, tokenizer):
    """Folders of a student and of a teacher with other weights."""
    teacher = new_student("deepseek_v4_tiny", seed=7)
    folder = tmp_path_factory.mktemp("teacher") / "model"
    save_model(folder, teacher, tokenizer, teacher.state_dict())
    return saved_v4, folder


@pytest.fixture(scope="module")
def whole_run(models, device, tmp_path_factory):
    """A run that nobody disturbed, in the tests' own process."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    distill(load_config("distill", settings(run_dir, models)))
    return run_dir


def wait_for(process: subprocess.Popen, run_dir, num_records: int) -> None:
    while len(records(run_dir)) < num_records:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def test_a_run_that_is_interrupted_killed_and_ended_early_continues_bit_for_bit(models, whole_run, numbers, wandb_rows, tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, models)
    wait_for(process, run_dir, 4)
    assert "arithmetic at step 2 of" in look("inspect", f"{run_dir}@2", "domain=arithmetic")
    assert process.poll() is None, "it was looked at while it ran"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert (describe(run_dir).state, describe(run_dir).why.split(";")[0]) == ("failed", "interrupted")
    assert errors.strip().splitlines()[-1].startswith("opd: interrupted")

    process = start(run_dir, models)
    wait_for(process, run_dir, 9)
    seen = describe(run_dir)
    assert (seen.state, seen.steps, seen.left > 0, seen.step >= 8, seen.checkpoint % 2) == ("running", 30, True, True, 0)
    assert re.search(r"\brun\b.*\brunning\b.*\b30\b", look("runs", str(tmp_path)))
    assert process.poll() is None, "it was looked at while it ran"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert describe(run_dir).state == "killed"
    assert f"pid {process.pid} on" in describe(run_dir).why

    process = start(run_dir, models)
    wait_for(process, run_dir, 14)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    last = records(run_dir)[-1]["step"]
    assert (describe(run_dir).state, describe(run_dir).why.split(" (")[0]) == ("preempted", f"ended after step {last}")
    assert f"ended after step {last} (SIGTERM), with a checkpoint" in errors
    assert json.loads((run_dir / "checkpoints" / "latest.json").read_text())["step"] == last

    finish(start(run_dir, models))
    assert (describe(run_dir).state, describe(run_dir).step, describe(run_dir).checkpoint, describe(run_dir).left) == ("done", 30, 30, None)
    starts = read_starts(run_dir)
    assert [begun["step"] for begun in starts][-1] == last
    names = ["schema", "time", "step", "command", "host", "pid", "ranks", "code", "git", "versions", "hardware", "student", "data", "held_out"]
    assert [list(begun) for begun in starts] == [names] * 4
    assert starts[0]["data"]["arithmetic"]["prompts"]["rows"] == 50
    assert len({begun["student"]["hash"] for begun in starts}) == 1
    assert len(starts) == (run_dir / "logs" / "rank-000.log").read_text().count("--- 20") == 4
    assert [record["step"] for record in records(run_dir)] == list(range(31)), "no step twice, none missing"
    assert numbers(run_dir) == numbers(whole_run)
    assert len(list((run_dir / "wandb").glob("offline-run-*"))) == 1
    assert [row["opd/step"] for row in wandb_rows(run_dir)] == [row["_step"] for row in wandb_rows(run_dir)] == list(range(31))
    losses = [record["step/loss"] for record in records(whole_run) if record["step"]]
    assert [row["step/loss"] for row in wandb_rows(run_dir)[1:]] == losses, "the curve is the undisturbed run's"
    assert (run_dir / "student" / "model.safetensors").read_bytes() == (whole_run / "student" / "model.safetensors").read_bytes()


def test_an_alarm_that_stops_saves_first_and_the_same_command_goes_on(models, whole_run, numbers, tmp_path):
    run_dir, told = tmp_path / "run", tmp_path / "told"
    script = tmp_path / "tell.py"
    script.write_text("import os, sys\nopen(sys.argv[1], 'a').write(os.environ['OPD_STEP'] + ' ' + os.environ['OPD_RUN'] + chr(10))\n")
    rule = "+alarms.rules.mine={metric: step/loss, condition: above, threshold: -1.0, window: 3, action: stop}"
    own = [rule, f"alarms.command='{sys.executable} {script} {told}'"]

    def begin() -> subprocess.Popen:
        command = [sys.executable, "-m", "opd", "distill", *settings(run_dir, models), *own]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    process = begin()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 3, errors
    assert "opd: stopped after step 3 (alarm mine: step/loss is " in errors
    assert json.loads((run_dir / "checkpoints" / "latest.json").read_text())["step"] == 3
    assert (describe(run_dir).state, describe(run_dir).why.partition(" (")[0]) == ("stopped", "stopped after step 3")
    finish(begin())
    assert told.read_text() == f"3 {run_dir}\n", "once an episode, over both starts"
    assert (run_dir / "student" / "model.safetensors").read_bytes() == (whole_run / "student" / "model.safetensors").read_bytes()


def test_a_run_folder_refuses_another_configuration(models, whole_run):
    """With exit code 2 (tests/opd/test_cli.py)."""
    with pytest.raises(ValueError, match=r"optim\.lr.*fresh=true"):
        distill(load_config("distill", [*settings(whole_run, models), "optim.lr=2e-3"]))
