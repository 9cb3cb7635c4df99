"""`opd COMMAND -m`: what is run, under which names, what happens when a job fails or a signal comes; and the file for sweeps of W&B's."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from opd import sweep as opd_sweep
from opd.__main__ import load_config
from opd.composition import CONF
from opd.config import DistillConfig
from opd.errors import FAILED_JOBS
from opd.settings import settings_of
from opd.sweep import plan, sweep

SETTINGS = [
    "domain=[arithmetic]", "domains.arithmetic.prompts.rows=16", "rollout.prompts_per_step=4", "rollout.max_new_tokens=4", "rollout.decode_width=4",
    "num_steps=1", "logger=none", "threads=1", "check.signal=off", "samples.every=0",
]  # fmt: skip


def test_every_combination_is_a_job_with_a_folder_that_says_what_differs(tmp_path):
    run_dir = f"run_dir={tmp_path}"
    _, folder, jobs = plan("distill", [run_dir, "seed=1,2", "optim.lr=1e-3,1e-4", "num_steps=7", "logger.project=mine"])
    assert folder == tmp_path
    assert [job.name for job in jobs] == ["seed_1-lr_0.001", "seed_1-lr_0.0001", "seed_2-lr_0.001", "seed_2-lr_0.0001"]
    for job, (seed, lr) in zip(jobs, [(1, 1e-3), (1, 1e-4), (2, 1e-3), (2, 1e-4)], strict=True):
        cfg = load_config("distill", job.overrides)
        assert (cfg.seed, cfg.optim.lr, cfg.num_steps, cfg.run_dir) == (seed, lr, 7, str(tmp_path / job.name))
        assert (cfg.logger.group, cfg.logger.project) == (tmp_path.name, "mine")


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("seed=range(1,4)", ["seed_1", "seed_2", "seed_3"]),
        ("domain=[arithmetic,tools],[arithmetic]", ["domain_arithmetic_tools", "domain_arithmetic"]),
        ("student.model=org/a,org/b", ["model_org_a", "model_org_b"]),
        ("seed=1", ["job"]),
    ],
)
def test_values_are_chosen_in_hydras_grammar(override, names, tmp_path):
    assert [job.name for job in plan("distill", [f"run_dir={tmp_path}", override])[2]] == names


def test_jobs_side_by_side_share_the_cores(tmp_path):
    for given, expected in (([], None), (["sweep.parallel=64"], 1), (["sweep.parallel=64", "threads=3"], 3)):
        assert load_config("distill", plan("distill", [f"run_dir={tmp_path}", "seed=1,2", *given])[2][0].overrides).threads == expected


def test_settings_of_one_name_are_told_apart(tmp_path):
    [job] = plan("distill", [f"run_dir={tmp_path}", "evaluation.every=1,2", "checkpoint.every=3,4"])[2][:1]
    assert job.name == "evaluation.every_1-checkpoint.every_3"


@pytest.mark.parametrize(
    ("command", "overrides", "sentence"),
    [
        ("distill", ["seed=1,many"], "seed: "),
        ("distill", ["optim.lr=interval(0,1)"], "has no end of values"),
        ("distill", ["student.model=a/b,a_b"], "two jobs would have the folder"),
        ("distill", ["config_of=runs/a", "seed=1,2"], "-m begins new runs"),
        ("check", ["seed=1,2"], "-m is for commands that leave a folder"),
        ("distill", ["sweep.paralel=2"], "a sweep has no setting 'sweep.paralel=2': write sweep.parallel=N"),
        ("distill", ["num_stepz=1,2"], "did you mean 'num_steps'"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(command, overrides, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        sweep(command, [f"run_dir={tmp_path / 'sweep'}", *overrides])
    assert not (tmp_path / "sweep").exists()


def test_under_a_launcher_it_is_refused_with_what_does_it(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"start it alone with launch.processes=N, or see python -m opd.submission"):
        sweep("distill", [f"run_dir={tmp_path}", "seed=1,2"])


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((0, 75), 75), ((75, 75), 75), ((75, 1), FAILED_JOBS), ((0, 3), FAILED_JOBS)])
def test_a_sweep_whose_jobs_only_ended_early_is_to_be_given_again(codes, expected, monkeypatch, tmp_path):
    def run(command, folder, jobs, *others):
        for job, code in zip(jobs, codes, strict=True):
            job.code = code

    monkeypatch.setattr(opd_sweep, "_run", run)
    assert sweep("distill", [f"run_dir={tmp_path / 'sweep'}", "seed=1,2", "student.model=x"]) == expected


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "opd", "distill", "-m", f"run_dir={folder}", *SETTINGS, *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_one_job_that_fails_stops_no_other_and_what_is_done_is_skipped(saved_v4, tmp_path, wandb_records):
    choice = f"student.model=./nowhere,{saved_v4}"
    teacher = f"domains.arithmetic.teacher.model={saved_v4}"
    process = start(tmp_path / "sweep", choice, teacher, "logger=offline")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == FAILED_JOBS, printed
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert (record["schema"], record["command"]) == (1, "distill")
    assert [job["code"] for job in record["jobs"].values()] == [2, 0]
    assert all(set(job) == {"overrides", "code", "seconds"} for job in record["jobs"].values())
    [bad, good] = list(record["jobs"])
    assert (tmp_path / "sweep" / good / "student" / "config.json").is_file()
    assert f"{bad}: refused after" in printed
    assert "the student is not at ./nowhere" in printed
    finished = (tmp_path / "sweep" / good / "state.json").read_text()
    [log] = (tmp_path / "sweep" / good / "wandb").glob("offline-run-*/run-*.wandb")
    [own] = [record.run for record in wandb_records(log) if record.WhichOneof("record_type") == "run"]
    assert (own.run_group, own.run_id) == ("sweep", (tmp_path / "sweep" / good / "wandb_id").read_text())

    again = start(tmp_path / "sweep", choice, teacher, "logger=offline")
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == FAILED_JOBS
    assert f"{good}: done before, skipped" in printed
    assert (tmp_path / "sweep" / good / "state.json").read_text() == finished


def test_a_signal_ends_the_job_under_way_with_a_checkpoint_and_begins_no_other(saved_v4, tmp_path):
    process = start(tmp_path / "sweep", f"student.model={saved_v4}", f"domains.arithmetic.teacher.model={saved_v4}", "seed=1,2", "num_steps=100000")
    metrics = tmp_path / "sweep" / "seed_1" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.is_file() and metrics.read_text().count("\n") > 1):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 75, printed
    jobs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]
    assert [job["code"] for job in jobs.values()] == [75, None]
    assert (tmp_path / "sweep" / "seed_1" / "checkpoints" / "latest.json").is_file()
    assert not (tmp_path / "sweep" / "seed_2").exists()


@pytest.fixture
def wandb_sweep() -> dict:
    return yaml.safe_load((CONF / "sweep" / "wandb.yaml").read_text())


def test_what_w_and_b_varies_are_settings_of_a_distillation(wandb_sweep):
    assert set(wandb_sweep["parameters"]) <= {setting.path for setting in settings_of(DistillConfig)}


def test_an_agents_command_composes_into_a_run_with_its_values_and_a_folder_of_its_own(wandb_sweep, monkeypatch):
    """The command as W&B's agent makes it."""
    arguments = create_sweep_command_args({"args": {"optim.lr": {"value": 0.0002}, "seed": {"value": 2}}})
    words = []
    for word in create_sweep_command(wandb_sweep["command"]):
        words += arguments[word[2:-1]] if word.startswith("${") and word.endswith("}") else [word]
    assert words[:2] == ["opd", "distill"]
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    cfg = load_config("distill", words[2:])
    assert (cfg.optim.lr, cfg.seed, cfg.run_dir, cfg.logger.kind.value) == (0.0002, 2, "runs/wandb/abc123", "wandb")
