"""The run's records: one line per step, redone steps dropped, W&B offline without an account, and nothing of the text."""

import json
import os
import time
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from opd.config import DistillConfig
from opd.errors import Preempted
from opd.job_config import LoggerConfig, LoggerKind
from opd.tracker import Tracker
from rollout.synthetic import synthetic_rows


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def config(kind: LoggerKind) -> DistillConfig:
    return DistillConfig(logger=LoggerConfig(kind=kind), num_steps=9)


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
            assert tracker.wandb_run.settings.mode == "offline"
            tracker.log(step, {"step/loss": 0.5})
    folders = [path.name for path in (run_dir / "wandb").glob("offline-run-*")]
    identity = (run_dir / "wandb_id").read_text()
    assert len(folders) == 2
    assert all(identity in name for name in folders)


def test_a_history_of_teachers_that_grows_at_a_resume_replaces_the_one_in_w_and_bs_configuration(no_account, tmp_path):
    first = {"from_step": 1, "teachers": {"law": {"model": "org/law", "hash": "1f"}}}
    second = {"from_step": 6, "teachers": {"law": {"model": "org/other", "hash": "2e"}}}
    for history in ([first], [first, second]):
        with Tracker(tmp_path, "test", config(LoggerKind.offline)) as tracker:
            tracker.record_teachers(history)
            tracker.record_teachers([*history])
            assert tracker.wandb_run.config["teacher_history"] == history


def test_a_run_that_fails_ends_its_w_and_b_run(no_account, tmp_path):
    tracker = Tracker(tmp_path, "test", config(LoggerKind.offline))
    with pytest.raises(KeyError), tracker:
        raise KeyError("something")
    assert tracker.wandb_run._is_finished


def written_kinds(run_dir: Path) -> list[str]:
    """The kinds of records in W&B's log of a short run: after a header of 7 bytes, each record behind its checksum, length and type."""
    [log] = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    content, position, kinds = log.read_bytes(), 7, []
    while position + 7 < len(content):
        end = position + 7 + int.from_bytes(content[position + 4 : position + 6], "little")
        kinds.append(Record.FromString(content[position + 7 : end]).WhichOneof("record_type"))
        position = end
    return kinds


@pytest.mark.parametrize(("end", "is_marked"), [(Preempted, True), (KeyError, False)])
def test_a_run_that_ended_early_and_is_to_go_on_is_marked_so_in_w_and_b(end, is_marked, no_account, tmp_path):
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
