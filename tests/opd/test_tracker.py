"""The run's records: one line per step, redone steps dropped, W&B offline without an account, and nothing of the text."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from opd import wandb_log
from opd.__main__ import load_config
from opd.alarm_config import AlarmAction
from opd.config import DistillConfig
from opd.errors import Preempted
from opd.job_config import LoggerConfig, LoggerKind
from opd.tracker import Tracker
from rollout.synthetic import synthetic_rows


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def config(kind: LoggerKind) -> DistillConfig:
    return DistillConfig(logger=LoggerConfig(kind=kind), num_steps=9, alarms=load_config("distill", []).alarms)


@pytest.fixture
def tracker(tmp_path) -> Tracker:
    return Tracker(tmp_path, "test", config(LoggerKind.none))


def test_each_step_is_one_record_with_its_schema_step_and_figures(tracker, tmp_path):
    tracker.log(0, {"evaluation/law/accuracy": 0.25})
    tracker.log(1, {"step/loss": 0.5})
    first, second = records(tmp_path)
    assert (first["schema"], first["step"], first["evaluation/law/accuracy"]) == (1, 0, 0.25)
    assert (second["schema"], second["step"], second["step/loss"]) == (1, 1, 0.5)


def test_phases_are_timed_per_step_and_add_up_within_one(tracker, tmp_path):
    for _ in range(3):
        with tracker.timer("score"):
            sum(range(20000))
    tracker.log(1, {})
    tracker.log(2, {})
    first, second = records(tmp_path)
    assert 0 < first["seconds/score"] <= first["seconds/step"]
    assert "seconds/score" not in second


def test_throughput_is_completion_tokens_over_the_steps_seconds(tracker, tmp_path):
    tracker.log(1, {"step/completion_tokens": 120})
    [record] = records(tmp_path)
    assert record["throughput/completion_tokens_per_second"] == pytest.approx(120 / record["seconds/step"])


def test_resuming_drops_the_records_of_steps_that_will_be_done_again(tracker, tmp_path):
    for step in range(6):
        tracker.log(step, {"step/loss": float(step)})
    tracker.resume(3)
    assert [record["step"] for record in records(tmp_path)] == [0, 1, 2, 3]
    tracker.log(4, {"step/loss": 40.0})
    assert [record.get("step/loss") for record in records(tmp_path)] == [0.0, 1.0, 2.0, 3.0, 40.0]


def test_a_run_that_begins_anew_has_one_record_of_step_zero(tracker, tmp_path):
    """It was killed before its first checkpoint."""
    for _ in range(2):
        tracker.resume(0)
        tracker.log(0, {"evaluation/law/accuracy": 0.25})
        tracker.log(1, {"step/loss": 0.5})
    assert [record["step"] for record in records(tmp_path)] == [0, 1]


def test_resuming_drops_a_line_that_a_kill_cut_short(tracker, tmp_path):
    for step in range(3):
        tracker.log(step, {"step/loss": float(step)})
    with tracker.file.open("a") as file:
        file.write('{"schema": 1, "step": 3, "step/lo')
    tracker.resume(2)
    assert [record["step"] for record in records(tmp_path)] == [0, 1, 2]


def test_without_w_and_b_only_the_file_is_written(tracker, tmp_path):
    with tracker:
        tracker.log(1, {"step/loss": 0.5})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def length(tokens: float) -> dict[str, float]:
    return {"domain/law/completion_length": tokens, "domain/code/completion_length": 3.0}


def test_lengths_are_held_against_the_teachers_of_step_zero_after_a_resume_too(tracker, tmp_path):
    tracker.log(0, {"check/law/teacher_length": 8.0})
    tracker.log(1, length(12.0))
    resumed = Tracker(tmp_path, "test", config(LoggerKind.none))
    resumed.resume(1)
    resumed.log(2, length(4.0))
    assert [record.get("domain/law/length_ratio") for record in records(tmp_path)] == [None, 1.5, 0.5]
    assert not [name for record in records(tmp_path) for name in record if name == "domain/code/length_ratio"], "its teacher's length is not known"


def test_an_alarm_of_a_run_that_is_taken_up_goes_on_and_is_not_logged_again(tracker, tmp_path, caplog):
    for step in range(7):
        tracker.log(step, {"domain/law/looped": 0.2})
    resumed = Tracker(tmp_path, "test", config(LoggerKind.none))
    resumed.resume(6)
    resumed.log(7, {"domain/law/looped": 0.2})
    assert [record.get("alarms/active") for record in records(tmp_path)] == [None, 0, 0, 0, 0, 1, 1, 1]
    assert [message.split(" is ")[0] for message in caplog.messages if message.startswith("alarm")] == ["alarm at step 5: domain/law/looped"]


def test_an_alarm_in_steps_that_are_done_again_is_forgotten(tracker, tmp_path):
    for step in range(7):
        tracker.log(step, {"domain/law/looped": 0.2})
    tracker.resume(2)
    tracker.log(3, {"domain/law/looped": 0.0})
    assert records(tmp_path)[-1]["alarms/active"] == 0


def test_without_alarms_nothing_is_judged(tmp_path, caplog):
    cfg = config(LoggerKind.none)
    cfg.alarms.enabled = False
    tracker = Tracker(tmp_path, "test", cfg)
    for step in range(7):
        tracker.log(step, {"domain/law/looped": 0.2})
    assert not [name for record in records(tmp_path) for name in record if name.startswith("alarms/")]
    assert not caplog.records


@pytest.fixture
def no_account(monkeypatch, tmp_path) -> None:
    """No key, no netrc, and a proxy on which nobody listens."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def test_an_offline_run_needs_no_account_and_a_resumed_one_has_the_same_id(no_account, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for step in (1, 2):
        with Tracker(run_dir, "test", config(LoggerKind.offline)) as tracker:
            assert tracker.wandb.run.settings.mode == "offline"
            tracker.log(step, {"step/loss": 0.5})
    folders = [path.name for path in (run_dir / "wandb").glob("offline-run-*")]
    identity = (run_dir / "wandb_id").read_text()
    assert len(folders) == 2
    assert all(identity in name for name in folders)


def test_a_run_that_is_killed_and_resumed_twice_is_one_w_and_b_run_with_every_step_once(no_account, tmp_path, wandb_rows):
    """Killed: W&B has rows of steps that are done again, or lacks rows of steps that count."""
    for first, last in ((0, 4), (2, 6), (5, 9)):
        tracker = Tracker(tmp_path, "test", config(LoggerKind.offline))
        tracker.resume(first)
        for step in range(first + 1, last + 1):
            tracker.log(step, {"step/loss": step + first / 10})
        if last < 9:
            tracker.wandb.calls.join()
            tracker.wandb.run.finish()  # without the tracker's own end
        else:
            tracker.__exit__(None, None, None)
        assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1, "whoever uploads now uploads no step twice"
    assert [row["opd/step"] for row in wandb_rows(tmp_path)] == [row["_step"] for row in wandb_rows(tmp_path)] == list(range(1, 10))
    assert [row["step/loss"] for row in wandb_rows(tmp_path)] == [1.0, 2.0, 3.2, 4.2, 5.2, 6.5, 7.5, 8.5, 9.5]
    assert [record["step/loss"] for record in records(tmp_path)] == [row["step/loss"] for row in wandb_rows(tmp_path)]


def test_a_folder_that_has_been_uploaded_is_not_removed(no_account, tmp_path):
    tracker = Tracker(tmp_path, "test", config(LoggerKind.offline))
    tracker.log(1, {})
    tracker.__exit__(None, None, None)
    [log] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    log.with_suffix(".wandb.synced").touch()
    resumed = Tracker(tmp_path, "test", config(LoggerKind.offline))
    resumed.resume(1)
    resumed.__exit__(None, None, None)
    assert log.exists()


def test_w_and_b_that_hangs_holds_up_neither_a_step_nor_the_end(no_account, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb_log, "FINISH_SECONDS", 0.5)
    never = threading.Event()
    tracker = Tracker(tmp_path, "test", config(LoggerKind.offline))
    tracker.wandb.calls.put(never.wait)
    begun = time.monotonic()
    with tracker:
        tracker.log(1, {"step/loss": 1.0})
    assert time.monotonic() - begun < 30
    assert "W&B has not taken everything" in caplog.text
    assert records(tmp_path)[0]["step/loss"] == 1.0
    never.set()
    tracker.wandb.thread.join(60)


def test_checkpoints_models_and_data_are_artifacts_by_reference(no_account, short_run, wandb_records):
    [log] = (short_run / "wandb").glob("offline-run-*/run-*.wandb")
    requests = [record.request.log_artifact.artifact for record in wandb_records(log) if record.WhichOneof("record_type") == "request"]
    found = {artifact.name: artifact for artifact in [*requests, *(record.artifact for record in wandb_records(log))] if artifact.name}
    identity = (short_run / "wandb_id").read_text()
    assert set(found) >= {"teacher-arithmetic", "teacher-tools", "student", "data-arithmetic-prompts", "held-out-tools", f"checkpoint-{identity}"}
    [span] = json.loads((short_run / "teachers.json").read_text())["spans"]
    described = json.loads(found["teacher-tools"].metadata)
    assert (described["hash"], described["role"]) == (span["domains"]["tools"]["teacher"]["hash"], "input")
    checkpoint = json.loads(found[f"checkpoint-{identity}"].metadata)
    manifest = short_run / "checkpoints" / f"step-{checkpoint['step']:06d}" / "manifest.json"
    assert checkpoint["manifest"] == hashlib.sha256(manifest.read_bytes()).hexdigest()
    entries = found["student"].manifest.contents
    assert {entry.path for entry in entries if not entry.ref} <= {"facts.json"}, "no weights leave the machine"
    assert all(entry.ref.startswith("file://") for entry in entries if entry.ref)


def save(run_dir: Path, step: int, content: str = "") -> None:
    """What a checkpoint leaves for the tracker to see."""
    folder = run_dir / f"checkpoints/step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(content)
    (run_dir / "checkpoints/latest.json").write_text(json.dumps({"step": step, "tag": f"step-{step:06d}"}))


def told_offline(run_dir: Path, wandb_records: Callable) -> tuple[list[tuple[int, str]], list[str]]:
    """(step, sha256 of the manifest) of the checkpoints and the titles of the alerts that stand in the one offline folder."""
    [log] = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    found = list(wandb_records(log))
    artifacts = [record.artifact if record.WhichOneof("record_type") == "artifact" else record.request.log_artifact.artifact for record in found]
    checkpoints = [json.loads(artifact.metadata) for artifact in artifacts if artifact.name.startswith("checkpoint-")]
    alerts = [record.alert.title for record in found if record.WhichOneof("record_type") == "alert"]
    return [(checkpoint["step"], checkpoint["manifest"]) for checkpoint in checkpoints], alerts


def loops(first: int, last: int) -> Callable[[int], float]:
    return lambda step: 0.2 * (first <= step <= last)


ALWAYS = loops(0, 9)


def go_on(run_dir: Path, first: int, last: int, content: str = "", looped: Callable[[int], float] = ALWAYS) -> None:
    """A start of an offline run that goes on from a step and saves at steps 3, 6 and 9; its alarm for loops alerts."""
    cfg = config(LoggerKind.offline)
    cfg.alarms.rules["looped"].action = AlarmAction.alert
    with Tracker(run_dir, "test", cfg) as tracker:
        tracker.resume(first)
        for step in range(first + 1, last + 1):
            tracker.log(step, {"domain/law/looped": looped(step)})
            if step % 3 == 0:
                save(run_dir, step, content)


def test_an_offline_run_that_is_taken_up_has_the_alerts_and_the_checkpoints_from_before(no_account, tmp_path, wandb_records):
    for first, last in ((0, 6), (6, 7)):
        go_on(tmp_path, first, last)
    checkpoints, alerts = told_offline(tmp_path, wandb_records)
    assert [step for step, _ in checkpoints] == [3, 6]
    assert alerts == [f"{tmp_path.name}: looped at step 5"]


def test_a_checkpoint_that_a_run_does_not_go_on_from_is_told_of_when_it_has_been_made_again(no_account, tmp_path, wandb_records):
    """The newest is damaged, so the run goes on from the one before."""
    for first, last, content in ((0, 6, ""), (3, 4, "again"), (3, 6, "again")):
        go_on(tmp_path, first, last, content)
    checkpoints, _ = told_offline(tmp_path, wandb_records)
    assert checkpoints == [(3, hashlib.sha256(b"").hexdigest()), (6, hashlib.sha256(b"again").hexdigest())]


def test_alerts_of_steps_that_were_done_again_without_are_not_told_again(no_account, tmp_path, wandb_records):
    for first, last, looped in ((0, 7, loops(3, 5)), (3, 7, loops(9, 9)), (6, 9, loops(7, 9))):
        go_on(tmp_path, first, last, looped=looped)
    assert told_offline(tmp_path, wandb_records)[1] == [f"{tmp_path.name}: looped at step 7"]


def test_rows_of_a_run_that_was_killed_before_its_first_record_are_not_kept_offline(no_account, tmp_path, wandb_rows):
    for _ in range(2):
        tracker = Tracker(tmp_path, "test", config(LoggerKind.offline))
        tracker.resume(0)
        tracker.wandb.log(0, {"x": 1.0})  # and is killed before metrics.jsonl has it
        tracker.wandb.calls.join()
        tracker.wandb.run.finish()
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.parametrize("place", ["org/law", "here"])
def test_other_weights_in_the_same_place_are_another_version_of_the_artifact(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    first, same, other = (wandb_log._artifact("teacher-law", "model", place, {"hash": digest}) for digest in ("1", "1", "2"))
    assert first.digest == same.digest
    assert first.digest != other.digest


@pytest.mark.parametrize(("kind", "expected"), [("model", "https://huggingface.co/org/law"), ("dataset", "https://huggingface.co/datasets/org/law")])
def test_what_is_on_the_hub_is_linked_there(kind, expected):
    found = wandb_log._artifact("law", kind, "org/law", {}).manifest.entries.values()
    assert [entry.ref for entry in found if entry.ref] == [expected]


def test_online_a_run_uses_its_models_and_data_and_has_made_its_checkpoints(tmp_path):
    said = []
    (tmp_path / "step-000005").mkdir()
    (tmp_path / "step-000005/manifest.json").touch()
    run = SimpleNamespace(id="one", use_artifact=lambda artifact: said.append(("uses", artifact.name)))
    run.log_artifact = lambda artifact, aliases: said.append(("made", artifact.name, aliases))
    log = wandb_log.WandbLog.__new__(wandb_log.WandbLog)
    log.run, log.is_offline = run, False
    log._call = lambda call: call()
    log.uses("teacher-law", "model", "org/law", {"hash": "1"})
    log.made_checkpoint(tmp_path / "step-000005")
    log.made_checkpoint(tmp_path / "step-000003")  # which has gone by now
    assert said == [("uses", "teacher-law"), ("made", "checkpoint-one", ["step-5"])]


@pytest.mark.parametrize(("resumed_from", "is_there"), [(60, True), (50, False)])
def test_the_scores_of_a_step_that_is_done_again_are_forgotten(resumed_from, is_there, tracker, tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps({"schema": 1, "step": 60, "domains": {}}))
    tracker.resume(resumed_from)
    assert (tmp_path / "scores.json").is_file() == is_there


@pytest.mark.parametrize("pointer", ["{", "{}", '{"tag": 3}', '{"tag": "newest"}'])
def test_a_damaged_pointer_to_the_checkpoint_does_not_end_the_run(pointer, no_account, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest.json").write_text(pointer)
    with Tracker(tmp_path, "test", config(LoggerKind.offline)) as tracker:
        tracker.resume(0)
        tracker.log(1, {"step/loss": 1.0})
    assert len(records(tmp_path)) == 1


def test_w_and_b_that_fails_is_said_once_and_ends_nothing(no_account, tmp_path, caplog):
    def fail() -> None:
        raise BrokenPipeError("gone")

    with Tracker(tmp_path, "test", config(LoggerKind.offline)) as tracker:
        for step in (1, 2):
            tracker.wandb.calls.put(fail)
            tracker.log(step, {"step/loss": 1.0})
    assert [message for message in caplog.messages if "W&B gets no more" in message] == [
        "W&B gets no more of this run (BrokenPipeError: gone); metrics.jsonl has all of it"
    ]
    assert len(records(tmp_path)) == 2


ONLINE = """
import logging, sys
from pathlib import Path
from opd import wandb_log
from opd.job_config import LoggerConfig, LoggerKind
logging.basicConfig(level=logging.WARNING)
wandb_log.INIT_SECONDS = 3
log = wandb_log.WandbLog(Path(sys.argv[1]), LoggerConfig(kind=LoggerKind.wandb), {"domains": {}})
log.log(1, {"step/loss": 1.0})
log.finish(0, False)
"""


def go_online(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """A start with logger=wandb, in a process of its own: W&B reads keys and addresses once in each."""
    command = [sys.executable, "-c", ONLINE, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment, check=False)


def test_a_server_that_cannot_be_reached_makes_the_run_an_offline_one(no_account, tmp_path, wandb_rows):
    done = go_online(tmp_path, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="a" * 40)
    assert done.returncode == 0, done.stderr
    assert "so this run is logged offline" in done.stderr
    assert [row["step/loss"] for row in wandb_rows(tmp_path)] == [1.0]


def test_without_a_login_a_run_that_is_to_be_uploaded_is_refused(no_account, tmp_path):
    assert "run `wandb login`, or set logger=offline" in go_online(tmp_path).stderr


@pytest.mark.parametrize(("sweep", "expected"), [("s1", "agents"), (None, None)])
def test_a_run_of_a_sweep_has_the_id_that_the_agent_gives_it(sweep, expected, no_account, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "agents")
    if sweep is not None:
        monkeypatch.setenv("WANDB_SWEEP_ID", sweep)
    with Tracker(tmp_path, "test", config(LoggerKind.offline)):
        pass
    assert ((tmp_path / "wandb_id").read_text() == "agents") == (expected is not None)


def test_a_history_of_teachers_that_grows_at_a_resume_replaces_the_one_in_w_and_bs_configuration(no_account, tmp_path):
    first = {"from_step": 1, "teachers": {"law": {"model": "org/law", "hash": "1f"}}}
    second = {"from_step": 6, "teachers": {"law": {"model": "org/other", "hash": "2e"}}}
    for history in ([first], [first, second]):
        with Tracker(tmp_path, "test", config(LoggerKind.offline)) as tracker:
            tracker.record_teachers(history)
            tracker.record_teachers([*history])
            tracker.wandb.calls.join()
            assert tracker.wandb.run.config["teacher_history"] == history


def test_a_run_that_fails_ends_its_w_and_b_run(no_account, tmp_path):
    tracker = Tracker(tmp_path, "test", config(LoggerKind.offline))
    with pytest.raises(KeyError), tracker:
        raise KeyError("something")
    assert tracker.wandb.run._is_finished


@pytest.fixture
def written_kinds(wandb_records) -> Callable[[Path], list[str]]:
    """written_kinds(run_dir): the kinds of records in W&B's log of a short run."""

    def read(run_dir: Path) -> list[str]:
        [log] = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
        return [record.WhichOneof("record_type") for record in wandb_records(log)]

    return read


@pytest.mark.parametrize(("end", "is_marked"), [(Preempted, True), (KeyError, False)])
def test_a_run_that_ended_early_and_is_to_go_on_is_marked_so_in_w_and_b(end, is_marked, no_account, tmp_path, written_kinds):
    with pytest.raises(end), Tracker(tmp_path, "test", config(LoggerKind.offline)):
        raise end("ended")
    deadline = time.monotonic() + 60
    while "exit" not in written_kinds(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)  # W&B's own process writes
    assert ("preempting" in written_kinds(tmp_path)) == is_marked


def test_nothing_of_prompts_and_answers_is_in_the_records_or_in_w_and_bs_files(short_run):
    files = [short_run / "metrics.jsonl", *(path for path in (short_run / "wandb").rglob("*") if path.is_file() and not path.is_symlink())]
    assert any(path.suffix == ".wandb" for path in files)
    content = b"".join(path.read_bytes() for path in files)
    for row in synthetic_rows("arithmetic", "train", 16) + synthetic_rows("tools", "train", 16):
        assert row["prompt"].encode() not in content
    for row in synthetic_rows("tools", "train", 16):
        assert row["answer"].encode() not in content


def test_w_and_b_gets_the_names_of_the_file(short_run):
    [log] = (short_run / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    for name in records(short_run)[1]:
        if name not in ("schema", "step"):
            assert name.encode() in content


def test_w_and_b_gets_which_teachers_scored_which_steps(short_run):
    [span] = json.loads((short_run / "teachers.json").read_text())["spans"]
    [log] = (short_run / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert b"teacher_history" in content
    for domain in span["domains"].values():
        assert domain["teacher"]["hash"].encode() in content
