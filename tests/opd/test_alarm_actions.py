"""What alarms do: the user's command and W&B's alert once an episode, over a resume too, and the end of the run after its checkpoint."""

import shlex
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from opd import wandb_log
from opd.__main__ import load_config
from opd.alarm_actions import act, read_told
from opd.alarm_config import AlarmAction, AlarmRule
from opd.alarms import Alarms, Episode
from opd.config import DistillConfig
from opd.errors import STOPPED, Preempted
from opd.job_config import LoggerConfig, LoggerKind
from opd.stopping import StopRequest
from opd.tracker import Tracker

LOOPED = AlarmRule(metric="domain/D/looped", threshold=0.05, window=1, message="loops")
SCRIPT = "import os, sys; open(sys.argv[1], 'a').write(' '.join(os.environ[name] for name in ('OPD_ALARM', 'OPD_METRIC', 'OPD_STEP', 'OPD_VALUE')) + chr(10))"


def distill_config(*overrides: str) -> DistillConfig:
    return load_config("distill", list(overrides))


def episode(action: AlarmAction) -> Episode:
    return Episode(alarm="looped", metric="domain/law/looped", value=0.25, action=action, line="domain/law/looped is 0.25: loops")


def wait_for_threads() -> None:
    for thread in threading.enumerate():
        if thread.name.endswith("(_run)"):
            thread.join(60)


def test_an_alert_runs_the_users_command_once_per_episode_beside_the_run(tmp_path):
    command = shlex.join([sys.executable, "-c", SCRIPT, str(tmp_path / "told")])
    alarms = Alarms({"looped": replace(LOOPED, action=AlarmAction.alert)})
    for step, value in enumerate([0.0, 0.25, 0.25, 0.25], start=1):
        alarms.observe(step, {"domain/law/looped": value})
        act(tmp_path, step, alarms.begun, command, None)
    wait_for_threads()
    assert (tmp_path / "told").read_text() == "looped domain/law/looped 2 0.25\n"


class FakeRun:
    """A run of W&B's that keeps its alerts."""

    def __init__(self):
        self.settings, self.id, self.step, self.alerts = SimpleNamespace(mode="online", sync_dir="own"), "one", 0, []

    def alert(self, title: str, text: str, wait_duration: float) -> None:
        assert wait_duration, "W&B takes 0 for a minute, and keeps back what has the same title until then"
        self.alerts.append((title, text))

    def log(self, row: dict, step: int) -> None:
        pass


@pytest.fixture
def make_tracker(tmp_path, monkeypatch):
    """make_tracker("alert"): a start of one run whose loop alarm has this action, with a command that writes down what it is told, and a fake W&B."""
    run = FakeRun()
    monkeypatch.setattr(wandb_log, "_start", lambda *_: run)
    command = shlex.join([sys.executable, "-c", SCRIPT, str(tmp_path / "told")])

    def make(action: str, mode: str = "online") -> tuple[Tracker, FakeRun]:
        run.settings.mode = mode
        cfg = distill_config("num_steps=9", f"alarms.rules.looped.action={action}")
        cfg.logger, cfg.alarms.command = LoggerConfig(kind=LoggerKind.wandb), command
        return Tracker(tmp_path, "test", cfg), run

    return make


def log_loops(tracker: Tracker, first: int, last: int) -> None:
    """Steps with loops from the third on, so that the mean of five is too high from the fifth."""
    for step in range(first, last + 1):
        tracker.log(step, {"domain/law/looped": 0.2 * (step > 2)})
    tracker.wandb.calls.join()
    wait_for_threads()


def test_an_alert_calls_w_and_b_once_per_episode(make_tracker, tmp_path):
    tracker, run = make_tracker("alert")
    log_loops(tracker, 0, 8)
    [(title, text)] = run.alerts
    assert title == f"{tmp_path.name}: looped at step 5"
    assert text.startswith("domain/law/looped is 0.12 over 5 steps, above 0.05: ")
    assert (tmp_path / "told").read_text() == "looped domain/law/looped 5 0.12\n"


def test_a_log_calls_no_w_and_b(make_tracker, tmp_path):
    tracker, run = make_tracker("log")
    log_loops(tracker, 0, 8)
    assert (run.alerts, (tmp_path / "told").exists()) == ([], False)


@pytest.mark.parametrize("taken_up", [0, 2, 4, 5])
@pytest.mark.parametrize("killed_at_once", [0, 1, 2])
def test_a_step_that_is_done_again_tells_nobody_a_second_time(killed_at_once, taken_up, make_tracker, tmp_path):
    """killed_at_once: starts that are killed before they have done a step."""
    log_loops(make_tracker("alert")[0], 0, 6)
    for _ in range(killed_at_once):
        make_tracker("alert")[0].resume(taken_up)
    resumed, run = make_tracker("alert")
    resumed.resume(taken_up)
    log_loops(resumed, taken_up + (taken_up > 0), 8)
    assert len(run.alerts) == 1
    assert len((tmp_path / "told").read_text().splitlines()) == 1


def test_offline_w_and_b_is_told_again_of_a_step_that_is_done_again(make_tracker, tmp_path):
    """Its earlier folder, in which the alert stood, is replaced."""
    log_loops(make_tracker("alert")[0], 0, 6)
    resumed, run = make_tracker("alert", "offline")
    resumed.resume(2)
    log_loops(resumed, 3, 8)
    assert [title for title, _ in run.alerts] == [f"{tmp_path.name}: looped at step 5"] * 2
    assert len((tmp_path / "told").read_text().splitlines()) == 1


def test_what_has_been_told_is_on_record(make_tracker, tmp_path):
    log_loops(make_tracker("alert")[0], 0, 8)
    [told] = read_told(tmp_path)
    assert {name: told[name] for name in ("schema", "step", "alarm", "metric", "action")} == {
        "schema": 1, "step": 5, "alarm": "looped", "metric": "domain/law/looped", "action": "alert",
    }  # fmt: skip
    assert told["value"] == pytest.approx(0.12)


def test_what_nobody_has_been_told_of_is_not_on_record(tmp_path):
    act(tmp_path, 2, [episode(AlarmAction.alert)], None, None)
    assert read_told(tmp_path) == []


def test_a_record_that_a_kill_has_cut_costs_no_other(make_tracker, tmp_path):
    (tmp_path / "alarms.jsonl").write_text('{"schema": 1, "step": 1, "ala')
    log_loops(make_tracker("alert")[0], 0, 8)
    assert [told["step"] for told in read_told(tmp_path)] == [5]


def test_an_episode_that_was_told_stops_the_run_all_the_same(tmp_path, device):
    act(tmp_path, 2, [episode(AlarmAction.stop)], None, None)
    with StopRequest(distill_config("num_steps=9")) as stop:
        act(tmp_path, 2, [episode(AlarmAction.stop)], None, None)
        assert stop.is_due(2)
        with pytest.raises(Preempted):
            stop.leave(2)


def test_a_command_that_fails_is_a_line_and_no_more(tmp_path, caplog):
    for step, command in enumerate((shlex.join([sys.executable, "-c", "import sys; sys.exit('no network')"]), "./nowhere"), start=1):
        act(tmp_path, step, [episode(AlarmAction.alert)], command, None)
    wait_for_threads()
    assert sorted(message.partition(":")[0] for message in caplog.messages) == ["alarms.command has ended with exit code 1", "alarms.command has failed"]


def test_a_log_action_does_nothing_but_log(tmp_path):
    act(tmp_path, 1, [episode(AlarmAction.log)], shlex.join([sys.executable, "-c", SCRIPT, str(tmp_path / "told")]), None)
    wait_for_threads()
    assert not (tmp_path / "told").exists()


def test_a_stop_ends_the_run_after_its_checkpoint_with_a_code_of_its_own(tmp_path, device):
    with StopRequest(distill_config("num_steps=9")) as stop:
        assert not stop.is_due(1)
        act(tmp_path, 2, [episode(AlarmAction.stop)], None, None)
        assert stop.is_due(2)
        words = r"stopped after step 2 \(alarm looped: domain/law/looped is 0.25\), with a checkpoint: .*; with alarms.rules.looped.action=log the "
        with pytest.raises(Preempted, match=words) as end:
            stop.leave(2)
    assert end.value.code == STOPPED
    with StopRequest(distill_config("num_steps=9")) as stop:
        assert not stop.is_due(3), "the next start is not asked to stop"
