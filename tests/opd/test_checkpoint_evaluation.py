"""`opd evaluate RUN`: the checkpoints of a run, each once, and the one that is chosen."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from opd import checkpoint_evaluation
from opd.__main__ import load_config, split_command
from opd.checkpoint_model import model_folder
from opd.errors import STOPPED
from opd.evaluate import evaluate

MORE = ["checkpoints=all", "evaluation.samples=2", "pass_k=[1,2]", "accept.prefer=accuracy"]
"""With random weights no teacher is ever right, so that recovery is undefined."""


def evaluate_run(run, *more: str) -> None:
    command, overrides = split_command(["evaluate", str(run), *more])
    evaluate(load_config(command, overrides))


def found_of(run, step: int) -> dict:
    return json.loads((run / f"evaluations/step-{step:06d}.json").read_text())["evaluation"]


@pytest.fixture
def run(short_run, tmp_path, monkeypatch):
    """A copy of the short run, with an evaluation of its own in the same process: nobody else writes to its folder."""
    shutil.copytree(short_run, tmp_path / "run", ignore=shutil.ignore_patterns("students", "evaluations"))
    monkeypatch.setattr(checkpoint_evaluation, "lock", lambda folder: None)
    return tmp_path / "run"


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """The models that were loaded since."""
    loaded, original = [], checkpoint_evaluation.load_model

    def load(cfg, role, device):
        loaded.append(cfg.model.rpartition("/")[2])
        return original(cfg, role, device)

    monkeypatch.setattr(checkpoint_evaluation, "load_model", load)
    return loaded


def test_each_checkpoint_is_what_opd_evaluate_finds_of_its_model(run, tmp_path, capsys):
    evaluate_run(run, *MORE)
    shown = capsys.readouterr().out
    assert "pass@2" in shown
    assert "@chosen is step" in shown
    cfg = load_config(*split_command(["evaluate", str(run), *MORE]))
    cfg.run, cfg.checkpoints, cfg.run_dir, cfg.cache = None, "newest", str(tmp_path / "alone"), None
    cfg.student.model = str(model_folder(f"{run}@1"))
    evaluate(cfg)
    assert json.loads((tmp_path / "alone/evaluation.json").read_text()) == found_of(run, 1)
    assert found_of(run, 1) != found_of(run, 2)


def test_each_is_scored_once_and_one_that_is_written_again_anew(run, measured):
    evaluate_run(run, *MORE)
    assert sorted(measured) == sorted(["v4", "step-000001", "step-000002"])
    assert not list((run / "students").glob("step-*"))  # what was made for it is gone
    evaluate_run(run, *MORE)
    assert len(measured) == 3
    stored = run / "evaluations/step-000002.json"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"manifest": "of another"}))
    evaluate_run(run, *MORE)
    assert measured[3:] in (["step-000002", "v4"], ["v4", "step-000002"])
    evaluate_run(run, "checkpoints=all", "evaluation.samples=1")
    assert len(measured) == 8


def test_one_that_is_killed_goes_on_with_what_is_missing(run, measured, monkeypatch):
    original = checkpoint_evaluation.CheckpointEvaluation._measure

    def interrupted(self, folder):
        if folder.name == "step-000002":
            raise KeyboardInterrupt
        return original(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_evaluation.CheckpointEvaluation, "_measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate_run(run, *MORE)
    measured.clear()
    evaluate_run(run, *MORE)
    assert "step-000001" not in measured
    assert "step-000002" in measured


def test_a_checkpoint_that_the_run_deletes_meanwhile_is_passed_over(run, monkeypatch, capsys):
    original = checkpoint_evaluation.model_folder

    def deleted(name):
        if name.endswith("@1"):
            shutil.rmtree(run / "checkpoints/step-000001")
        return original(name)

    monkeypatch.setattr(checkpoint_evaluation, "model_folder", deleted)
    evaluate_run(run, *MORE)
    assert "step 1: deleted by the run" in capsys.readouterr().out
    assert not (run / "evaluations/step-000001.json").exists()
    assert json.loads((run / "evaluations/choice.json").read_text())["chosen"]["step"] == 2


def test_what_is_known_of_a_deleted_one_is_shown_but_not_chosen(run, capsys):
    evaluate_run(run, *MORE, "accept.prefer=earliest")
    assert json.loads((run / "evaluations/choice.json").read_text())["chosen"]["step"] == 1
    shutil.rmtree(run / "checkpoints/step-000001")
    capsys.readouterr()
    evaluate_run(run, *MORE, "accept.prefer=earliest")
    assert "deleted" in capsys.readouterr().out
    assert json.loads((run / "evaluations/choice.json").read_text())["chosen"]["step"] == 2


def test_a_look_at_some_leaves_the_choice_as_it_is(run, capsys):
    evaluate_run(run, *MORE)
    before = (run / "evaluations/choice.json").read_text()
    evaluate_run(run, "checkpoints=[2]")
    evaluate_run(run)
    assert (run / "evaluations/choice.json").read_text() == before
    assert "step 2:" in capsys.readouterr().out


def test_a_retained_domain_is_held_against_the_base_without_its_teacher(run):
    evaluate_run(run, "checkpoints=newest", "retention=[arithmetic]")
    arithmetic = found_of(run, 2)["domains"]["arithmetic"]
    assert "teacher" not in arithmetic
    assert arithmetic["recovery"] == "no teacher"
    assert arithmetic["difference"] is not None
    assert "kl" not in arithmetic


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["checkpoints=[7]"], "no checkpoint of step 7; there are 1, 2"),
        (["checkpoints=best"], "must be newest, all or a list of steps"),
        (["checkpoints=newest", "follow=true"], "checkpoints=all belongs to it"),
        (["retention=[law]"], "none of the domains"),
        (["pass_k=[3]"], "from 1 to evaluation.samples=1"),
        (["student.model=x"], "student.model would be ignored"),
        (["run_dir=elsewhere"], "remove run_dir"),
        (["accept.prefer=newest"], "checkpoints=all belongs to it"),
        (["checkpoints=all", "accept.maximum_retention_drop=0.1"], "bounds nothing without retention"),
    ],
)
def test_what_cannot_be_had_is_refused(run, more, words):
    with pytest.raises(ValueError, match=words):
        evaluate_run(run, *more)


def test_what_belongs_to_a_run_is_refused_without_one():
    with pytest.raises(ValueError, match="belongs to the checkpoints of a run"):
        load_config("evaluate", ["checkpoints=all"])


def test_beside_a_running_job_the_accepted_checkpoint_ends_it_and_stays(short_settings, tmp_path):
    """The real commands: a run of more steps than it gets, followed by an evaluation that accepts the first checkpoint it sees."""
    run, environment = tmp_path / "run", os.environ | {"OMP_NUM_THREADS": "1"}
    settings = ["num_steps=5000", "checkpoint.every=60", "checkpoint.keep=3", "evaluation.every=0", "check.signal=off", "logger=none", f"run_dir={run}"]
    settings.append("samples.every=30")

    def heed_interrupts():
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def start(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "opd", *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heed_interrupts)

    job = start("distill", *short_settings, *settings)
    try:
        while not (run / "checkpoints/latest.json").is_file():
            assert job.poll() is None, job.communicate()
            time.sleep(0.2)
        looks = [start("inspect", str(run), "domain=tools"), start("runs", str(run))]
        inspected, listed = (look.communicate(timeout=60)[0] for look in looks)
        assert [look.returncode for look in looks] == [0, 0]
        assert job.poll() is None
        judge = start("evaluate", str(run), "checkpoints=all", "follow=true", "follow_seconds=0.5", "accept.prefer=earliest", "accept.end_run=true")
        said, errors = judge.communicate(timeout=240)
        assert judge.returncode == 0, errors
        _, complaint = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == STOPPED, complaint
    assert "running" in listed
    assert "tools" in inspected
    assert "teacher" in inspected
    chosen = json.loads((run / "evaluations/choice.json").read_text())["chosen"]["step"]
    assert f"step {chosen} is accepted: the run has been asked to end" in said
    assert f"accepts the checkpoint of step {chosen}" in complaint
    kept = sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    assert chosen in kept
    assert len(kept) <= 4
    assert model_folder(f"{run}@chosen").name == f"step-{chosen:06d}"
