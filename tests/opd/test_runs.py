"""The run folder's account of itself, and `opd runs`, which reads it. Runs that are killed, preempted and finished: tests/test_resume.py."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from opd import run_lock
from opd.__main__ import load_config
from opd.run import begin_folder
from opd.run_facts import code_digest, command_line, git_facts, read_starts, rows_digest
from opd.run_lock import last_sign, lock
from opd.run_log import RankLog, Tee, last_words
from opd.run_state import RunState, State, begin_state, end_state, read_state
from opd.runs import describe, find_runs, is_alive, runs
from opd.runs_config import RunsConfig


def write_run(folder: Path, steps: int = 10, seconds: float = 3.0, done: int = 4) -> Path:
    """A folder as a run leaves it after some steps, without its state."""
    (folder / "checkpoints" / "step-000003").mkdir(parents=True)
    (folder / "checkpoints" / "partial").mkdir()
    (folder / "config.yaml").write_text(f"# written by opd distill\nnum_steps: {steps}\n")
    records = [{"schema": 1, "step": step, "step/loss": 0.5, "seconds/step": 100.0 if step == 1 else seconds} for step in range(done + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def state_of(host: str = socket.gethostname(), pid: int = os.getpid(), begun: float | None = None) -> RunState:
    begun = time.time() if begun is None else begun
    return RunState(command="distill", state=State.running, why=None, steps=10, host=host, pid=pid, begun=begun, ended=None)


def test_a_state_is_written_as_its_format_says(tmp_path):
    begin_state(tmp_path, "distill", 10)
    begun = json.loads((tmp_path / "state.json").read_text())
    assert list(begun) == ["schema", "command", "state", "why", "steps", "host", "pid", "begun", "ended"]
    assert (begun["schema"], begun["state"], begun["pid"], begun["ended"]) == (1, "running", os.getpid(), None)
    end_state(75, "ended after step 3")
    assert (read_state(tmp_path).state, read_state(tmp_path).why) == (State.preempted, "ended after step 3")
    end_state(0, None)  # of a run that has ended already
    assert read_state(tmp_path).state is State.preempted


def test_time_left_is_the_median_of_the_newest_steps_times_those_to_go(tmp_path):
    write_run(tmp_path / "run")
    begin_state(tmp_path / "run", "distill", 10)
    row = describe(tmp_path / "run")
    assert (row.state, row.step, row.steps, row.left, row.checkpoint) == ("running", 4, 10, 3.0 * 6, 3)
    end_state(2, "the teacher of law is not there")
    row = describe(tmp_path / "run")
    assert (row.state, row.why, row.left) == ("failed", "the teacher of law is not there", None)


def test_a_process_that_is_gone_was_killed_and_its_last_words_are_shown(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    folder = write_run(tmp_path / "run")
    (folder / "state.json").write_text(json.dumps({"schema": 1, **state_as_json(state_of(pid=gone.pid))}))
    (folder / "logs").mkdir()
    (folder / "logs" / "rank-000.log").write_text("--- 2026\nstep 3 is slow\n\n")
    row = describe(folder)
    assert (row.state, row.why) == ("killed", f"pid {gone.pid} on {socket.gethostname()} is gone without a word; it said last: step 3 is slow")


def state_as_json(state: RunState) -> dict:
    names = ("command", "why", "steps", "host", "pid", "begun", "ended")
    return {name: getattr(state, name) for name in names} | {"state": state.state.value}


def test_a_pid_that_another_process_has_got_since_is_not_taken_for_the_run(tmp_path):
    assert is_alive(tmp_path, state_of())
    assert not is_alive(tmp_path, state_of(begun=1.0)), "this process began later"


@pytest.mark.parametrize(("age", "alive"), [(1.0, True), (3600.0, False)])
def test_a_run_on_another_host_is_judged_by_the_time_of_its_lock(age, alive, tmp_path):
    (tmp_path / ".lock").touch()
    os.utime(tmp_path / ".lock", (time.time() - age, time.time() - age))
    assert is_alive(tmp_path, state_of(host="elsewhere")) == alive


def test_a_lock_is_touched_while_its_process_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "TOUCH_SECONDS", 0.05)
    assert lock(tmp_path) is None
    os.utime(tmp_path / ".lock", (1.0, 1.0))
    deadline = time.monotonic() + 20
    while last_sign(tmp_path) == 1.0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert last_sign(tmp_path) > 1.0


@pytest.mark.parametrize("lives", [True, False])
def test_a_folder_in_use_on_another_host_is_refused_and_a_dead_ones_is_taken_over(lives, tmp_path, monkeypatch, caplog):
    """Where the file system does not share locks, so that flock is granted."""
    monkeypatch.setattr(run_lock, "TOUCH_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "WATCH_SECONDS", 2.0)
    (tmp_path / "state.json").write_text(json.dumps({"schema": 1, **state_as_json(state_of(host="elsewhere", pid=7))}))
    (tmp_path / ".lock").touch()
    script = f"import os, time\nwhile True: os.utime({str(tmp_path / '.lock')!r}); time.sleep(0.05)"
    other = subprocess.Popen([sys.executable, "-c", script if lives else ""])
    try:
        problem = lock(tmp_path)
    finally:
        other.kill()
        other.wait()
    if lives:
        assert "another process is writing to" in problem
        assert "(pid 7 on elsewhere, since" in problem
    else:
        assert problem is None
        assert "taking over" in caplog.text


def test_runs_are_found_in_folders_and_not_inside_of_runs(tmp_path):
    write_run(tmp_path / "pipeline" / "distill")
    (tmp_path / "pipeline" / "config.yaml").write_text("# written by opd pipeline\n")
    write_run(tmp_path / "pipeline" / "distill" / "student" / "inner")
    (tmp_path / "data").mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in find_runs(tmp_path)] == ["pipeline", "pipeline/distill"]


def test_a_folder_without_runs_is_said(tmp_path):
    with pytest.raises(ValueError, match="there is no run in"):
        runs(RunsConfig(folders=[str(tmp_path)]))
    with pytest.raises(ValueError, match="there is no folder"):
        runs(RunsConfig(folders=[str(tmp_path / "nowhere")]))


def test_a_damaged_run_hides_no_other(tmp_path, capsys):
    write_run(tmp_path / "a")
    (tmp_path / "a" / "state.json").write_text("{")
    write_run(tmp_path / "b")
    runs(RunsConfig(folders=[str(tmp_path)]))
    printed = capsys.readouterr().out
    assert "damaged" in printed
    assert "loss 0.5000" in printed


def test_the_command_reads_and_writes_nothing(tmp_path):
    write_run(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    script = "import sys; from opd.__main__ import main; code = main(['runs', sys.argv[1]]); print(code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "0 False", "it is there at once"
    assert "4" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_log_has_what_was_said_before_the_folder_was_known_and_after(tmp_path, capsys):
    log = RankLog()
    stream = Tee(sys.stdout, log)
    print("early", file=stream)
    log.open(tmp_path, 1)
    print("late", file=stream)
    lines = (tmp_path / "logs" / "rank-001.log").read_text().splitlines()
    assert lines[0].startswith("--- 20")
    assert lines[1:] == ["early", "late"]
    assert capsys.readouterr().out == "early\nlate\n"
    assert last_words(tmp_path) is None, "the main rank said nothing"


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    log = RankLog()
    log.open(tmp_path, 0)
    log.file.close()
    print("still here", file=Tee(sys.stdout, log))
    assert capsys.readouterr().out == "still here\n"


def test_the_changes_since_the_commit_are_kept(tmp_path):
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", tmp_path / "code", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True)

    (tmp_path / "code").mkdir()
    (tmp_path / "run").mkdir()
    git("init")
    (tmp_path / "code" / "a.py").write_text("first\n")
    git("add", ".")
    git("commit", "-m", "first")
    assert git_facts(tmp_path / "code", tmp_path / "run")["diff"] is None
    (tmp_path / "code" / "a.py").write_text("url = 'http://me:word@host'\n")
    (tmp_path / "code" / "new.py").write_text("")
    facts = git_facts(tmp_path / "code", tmp_path / "run")
    assert (len(facts["commit"]), facts["untracked"]) == (40, ["new.py"])
    patch = (tmp_path / "run" / facts["diff"]).read_text()
    assert "-first" in patch
    assert "word" not in patch


def test_what_is_no_repository_has_no_commit(tmp_path):
    assert git_facts(tmp_path, tmp_path) is None


def test_the_command_line_can_be_typed_again():
    assert command_line(["/bin/opd", "distill", "domain=[a,b]"]) == "opd distill 'domain=[a,b]'"
    assert command_line(["/x/opd/__main__.py", "distill", "a.server=http://me:word@host:1"]) == "opd distill a.server=http://***@host:1"


def test_the_digest_of_the_code_changes_with_any_file_of_it(tmp_path):
    (tmp_path / "opd").mkdir()
    (tmp_path / "opd" / "a.py").write_text("1")
    before = code_digest(tmp_path)
    (tmp_path / "opd" / "a.py").write_text("2")
    assert code_digest(tmp_path) != before


def test_the_digest_of_rows_is_that_of_their_tokens_and_answers():
    rows = [{"index": 0, "tokens": (1, 2), "answer": "3", "slip": None}, {"index": 4, "tokens": (5,), "answer": None, "slip": "x"}]
    assert rows_digest(rows) == hashlib.sha256(b'[0, [1, 2], "3", null][4, [5], null, "x"]').hexdigest()
    assert rows_digest(rows) != rows_digest([rows[0] | {"answer": "4"}, rows[1]])


def test_a_command_that_does_not_train_says_how_it_was_made_and_how_it_stands(tmp_path):
    settings = ["student.model=nowhere", "domain=[arithmetic]", f"run_dir={tmp_path / 'found'}"]
    folder = tmp_path / "found"
    begin_folder(folder, load_config("evaluate", settings), "evaluate")
    [start] = read_starts(folder)
    assert (start["step"], start["student"], start["data"]) == (0, None, {})
    assert start["code"] == code_digest(Path(__file__).parents[2])
    assert start["versions"]["torch"] == version("torch")
    assert describe(folder).state == "running"
    end_state(1, "the grader died")
    assert (describe(folder).state, describe(folder).why) == ("failed", "the grader died")
