"""`opd evaluate RUN`: the checkpoints of a run, each once, and the one that is chosen."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from opd import checkpoint_evaluation, checkpoint_model
from opd import checkpoint_files as files
from opd.__main__ import load_config, split_command
from opd.checkpoint_model import model_folder
from opd.checkpoint_record import chosen_step, shown_records
from opd.choice import ask_to_end, claim, take_end_request
from opd.errors import PREEMPTED, STOPPED
from opd.evaluate import evaluate
from opd.run_state import State, begin_state, end_state

MORE = ["checkpoints=all", "evaluation.samples=2", "pass_k=[1,2]", "accept.prefer=accuracy"]
"""With random weights no teacher is ever right, so that recovery is undefined."""


def evaluate_run(run, *more: str) -> None:
    command, overrides = split_command(["evaluate", str(run), *more])
    evaluate(load_config(command, overrides))


def found_of(run, step: int) -> dict:
    return json.loads(newest_record(run, step).read_text())["evaluation"]


def newest_record(run, step: int) -> Path:
    return max((run / "evaluations").glob(f"step-{step:06d}-*.json"), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture
def run(short_run, tmp_path, monkeypatch):
    """A copy of the short run, with an evaluation of its own in the same process: nobody else writes to its folder."""
    shutil.copytree(short_run, tmp_path / "run", ignore=shutil.ignore_patterns("students", "evaluations"))
    monkeypatch.setattr(checkpoint_evaluation, "lock", lambda folder: None)

    def run_here(module: str, *arguments: str) -> None:
        """What a process of its own does, without the seconds of its imports; tests/opd/test_checkpoint_model.py has that process."""
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [module, *arguments])
            patch.delitem(sys.modules, module, raising=False)
            runpy.run_module(module, run_name="__main__")

    monkeypatch.setattr(checkpoint_model, "run_child", run_here)
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


def test_the_files_have_the_format_on_file(run, golden_dir, shape):
    evaluate_run(run, "checkpoints=[1]", "evaluation.samples=2", "pass_k=[2]")
    evaluate_run(run, "checkpoints=all", "evaluation.samples=2", "pass_k=[2]", "accept.prefer=accuracy")
    ask_to_end(run, 1, 0.0)
    claim(run, 1, "sha256 of its manifest")
    parts = {"step": newest_record(run, 1)} | {name: run / f"evaluations/{name}.json" for name in ("choice", "end", "reading")}
    found = {name: shape(json.loads(path.read_text())) for name, path in parts.items()}
    for scores in found["step"]["scores"].values():
        scores["scores"] = scores["scores"][:1]
    assert found == json.loads((golden_dir / "evaluations.json").read_text())


def test_each_is_scored_once_and_one_that_is_written_again_anew(run, measured):
    evaluate_run(run, *MORE)
    assert sorted(measured) == sorted(["v4", "step-000001", "step-000002"])
    assert not list(run.glob("*/models/step-*")), "what was made for it is gone"
    assert not (run / "students").exists(), "where other commands make theirs"
    evaluate_run(run, *MORE)
    assert len(measured) == 3
    stored = newest_record(run, 2)
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"manifest": "of another"}))
    evaluate_run(run, *MORE)
    assert measured[3:] in (["step-000002", "v4"], ["v4", "step-000002"])
    evaluate_run(run, "checkpoints=all", "evaluation.samples=1")
    assert len(measured) == 8


def other_base(run, tmp_path) -> list[str]:
    base = Path(load_config(*split_command(["evaluate", str(run)])).base.model)
    shutil.copytree(base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, tmp_path / "base/model.safetensors", {"format": "pt"})
    return [f"base.model={tmp_path / 'base'}"]


def rows_in_a_folder(run, tmp_path) -> list[str]:
    (tmp_path / "held-out").mkdir(exist_ok=True)
    with (tmp_path / "held-out/a.jsonl").open("a") as file:
        file.write('{"prompt": "1+1=", "answer": "2"}\n')
    return [f"domains.arithmetic.held_out.path={tmp_path / 'held-out'}"]


@pytest.mark.parametrize(
    "change",
    [
        lambda run, tmp_path: ["student.dtype=bfloat16"],
        lambda run, tmp_path: ["evaluation.max_new_tokens=3"],
        lambda run, tmp_path: ["domains.arithmetic.grader=numeric"],
        other_base,
        rows_in_a_folder,
    ],
)
def test_what_is_asked_otherwise_is_asked_anew(change, run, tmp_path):
    def asked(overrides: list[str]) -> str:
        return checkpoint_evaluation._settings_hash(load_config(*split_command(["evaluate", str(run), *overrides])))

    before = asked(change(run, tmp_path)) if change is rows_in_a_folder else asked([])
    assert asked(change(run, tmp_path)) != before
    assert asked([]) == asked([])


def say_stopped(run) -> None:
    """What the run's own process would write: here `opd evaluate` has the one state that a process has."""
    file = run / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"state": State.stopped.value}))


def test_following_chooses_among_what_is_known_and_asks_each_start_to_end(run, monkeypatch):
    evaluate_run(run, *MORE, "accept.minimum_recovery=0.5")
    assert json.loads((run / "evaluations/choice.json").read_text())["chosen"] is None, "recovery is undefined"
    asked = []

    def sleep(_seconds):
        asked.append(take_end_request(run))
        say_stopped(run)

    monkeypatch.setattr(checkpoint_evaluation, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    for _ in range(2):
        begin_state(run, "distill", 4)
        evaluate_run(run, *MORE, "follow=true", "accept.end_run=true")
    chosen = json.loads((run / "evaluations/choice.json").read_text())["chosen"]["step"]
    assert asked == [chosen, chosen]


def test_a_run_is_followed_over_a_gap_until_it_has_ended(run, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(checkpoint_evaluation, "time", SimpleNamespace(monotonic=lambda: now[0]))
    following = checkpoint_evaluation.Following(load_config(*split_command(["evaluate", str(run), "checkpoints=all", "follow=true"])), run)
    begin_state(run, "distill", 4)
    end_state(PREEMPTED, "asked to")
    assert not following.is_last()
    now[0] = 29 * 60
    assert not following.is_last(), "queued again"
    begin_state(run, "distill", 4)
    assert not following.is_last()
    end_state(1, "a rank died")
    now[0] = 58 * 60
    assert not following.is_last()
    now[0] = 60 * 60
    assert following.is_last()
    assert "is failed, and was not at work for 30 minutes" in capsys.readouterr().out
    begin_state(run, "distill", 4)
    end_state(0, None)
    now[0] = 0.0
    assert following.is_last()


def test_the_chosen_one_stays_until_it_was_asked_otherwise(run, monkeypatch):
    evaluate_run(run, *MORE, "accept.prefer=newest")
    assert chosen_step(run) == 2
    seen, original = [], checkpoint_evaluation.CheckpointEvaluation._measure

    def measure(self, folder):
        seen.append((folder.name, chosen_step(run)))
        return original(self, folder)

    monkeypatch.setattr(checkpoint_evaluation.CheckpointEvaluation, "_measure", measure)
    evaluate_run(run, "checkpoints=all", "evaluation.samples=1", "accept.prefer=newest")
    assert seen == [("step-000002", 2), ("step-000001", 2)]


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

    def deleted(name, parent):
        if name.endswith("@1"):
            shutil.rmtree(run / "checkpoints/step-000001")
        return original(name, parent)

    monkeypatch.setattr(checkpoint_evaluation, "model_folder", deleted)
    evaluate_run(run, *MORE)
    assert "step 1: deleted by the run" in capsys.readouterr().out
    assert not list((run / "evaluations").glob("step-000001*"))
    assert json.loads((run / "evaluations/choice.json").read_text())["chosen"]["step"] == 2


def test_one_that_is_being_evaluated_is_kept_until_it_is_known_whether_it_is_chosen(run, monkeypatch):
    original = checkpoint_evaluation.CheckpointEvaluation._measure

    def measure(self, folder):
        (run / "evaluations/.lock").touch()  # the sign of life, which the lock gives
        files.forget_older(run / "checkpoints", 2, keep=1)  # the run has written step 2 meanwhile
        return original(self, folder)

    monkeypatch.setattr(checkpoint_evaluation.CheckpointEvaluation, "_measure", measure)
    evaluate_run(run, *MORE, "accept.prefer=earliest")
    assert chosen_step(run) == 1
    assert (run / "checkpoints/step-000001").is_dir()
    assert not (run / "evaluations/reading.json").exists()


def test_what_is_known_of_a_deleted_one_is_shown_but_not_chosen(run, capsys):
    evaluate_run(run, *MORE, "accept.prefer=earliest")
    assert json.loads((run / "evaluations/choice.json").read_text())["chosen"]["step"] == 1
    shutil.rmtree(run / "checkpoints/step-000001")
    capsys.readouterr()
    evaluate_run(run, *MORE, "accept.prefer=earliest")
    assert "deleted" in capsys.readouterr().out
    assert json.loads((run / "evaluations/choice.json").read_text())["chosen"]["step"] == 2


def test_a_look_at_some_leaves_the_choice_and_what_it_was_made_from_as_they_are(run, capsys):
    evaluate_run(run, *MORE)
    before, shown = (run / "evaluations/choice.json").read_text(), shown_records(run)
    evaluate_run(run, "checkpoints=[2]")
    evaluate_run(run)
    assert (run / "evaluations/choice.json").read_text() == before
    assert shown_records(run) == shown
    said = capsys.readouterr().out
    assert "step 2:" in said
    assert "chosen: from what was found under other settings" in said


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
        (["evaluation.every=5"], "evaluation.every belongs to runs that train"),
        (["domains.tools.teacher.model=./nowhere"], "the teacher of tools is not at ./nowhere"),
        (["checkpoints=[true]"], "must be newest, all or a list of steps"),
        (["evaluation.prompts=0"], "evaluation.prompts must be at least 1, or null"),
        (["checkpoints=all", "accept.minimum_recovery=nan"], "accept.minimum_recovery must be at least 0"),
        (["checkpoints=all", "accept.maximum_retention_drop=nan"], "accept.maximum_retention_drop must be from -1 to 1"),
        (["retention=[arithmetic]", "domains.arithmetic.held_out.path=null"], "arithmetic has no held-out prompts"),
        (["checkpoints=all", "accept.minimum_recovery=0.5", "domains.tools.held_out.path=null"], "tools has no held-out prompts"),
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
    settings = ["num_steps=5000", "checkpoint.every=30", "checkpoint.keep=3", "evaluation.every=0", "check.signal=off", "logger=none", f"run_dir={run}"]
    settings.append("samples.every=30")

    def start(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "opd", *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

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
