"""The supervisor: which endings are final, who is named, that signals arrive, that nobody is left behind. Ranks are small programs, but for the last tests."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from opd.__main__ import load_config
from opd.distill import distill
from opd.job_config import LaunchConfig
from opd.supervisor import MARK, needs_supervisor

RANK = """
import os, pathlib, signal, sys, time

own, folder = int(os.environ.get("RANK", "0")), pathlib.Path(sys.argv[1])
starts = folder / f"starts{own}"
start = int(starts.read_text()) + 1 if starts.exists() else 1
starts.write_text(str(start))
(folder / f"arguments{own}").write_text(" ".join(sys.argv[2:]))
"""

SUPERVISOR = """
import sys

from opd.config import RunConfig
from opd.job_config import LaunchConfig
from opd.supervisor import Supervisor

folder, processes, max_restarts, fresh = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "fresh"
cfg = RunConfig(run_dir=folder, fresh=fresh, launch=LaunchConfig(processes=processes, max_restarts=max_restarts))
sys.exit(Supervisor([sys.executable, f"{folder}/rank.py", folder], cfg).run())
"""


@pytest.fixture
def supervise(tmp_path) -> Callable[..., subprocess.Popen]:
    """supervise("sys.exit(2)", processes=2): a supervisor of ranks that do this."""
    (tmp_path / "supervisor.py").write_text(SUPERVISOR)

    def start(what: str, processes: int = 2, max_restarts: int = 0, fresh: bool = False) -> subprocess.Popen:
        (tmp_path / "rank.py").write_text(RANK + what)
        command = [sys.executable, str(tmp_path / "supervisor.py"), str(tmp_path), str(processes), str(max_restarts), "fresh" if fresh else ""]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    return start


def starts(folder: Path) -> list[int]:
    """How often each rank was started."""
    return [int(path.read_text()) for path in sorted(folder.glob("starts*"))]


def wait_for(path: Path) -> str:
    while not path.exists() or not path.read_text():
        time.sleep(0.05)
    return path.read_text()


@pytest.mark.parametrize("code", [0, 2, 75, 130])
def test_what_a_rank_decides_is_not_started_again(code, supervise, tmp_path):
    process = supervise(f"sys.exit({code})", max_restarts=3)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, starts(tmp_path), errors) == (code, [1, 1], "")


@pytest.mark.parametrize(("fault", "words"), [("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"), ("sys.exit(1)", "ended with exit code 1")])
def test_a_rank_that_dies_takes_the_others_along_and_all_start_again(fault, words, supervise, tmp_path):
    process = supervise(f"if own == 1 and start == 1:\n    {fault}\nif start == 1:\n    time.sleep(100)", max_restarts=2)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, starts(tmp_path)) == (0, [2, 2])
    [line] = errors.splitlines()
    assert line.startswith("opd: rank 1 (pid ")
    assert f"{words}; start 2 of 3 goes on from the last checkpoint" in line


def test_when_restarts_are_used_up_the_rank_is_named_and_the_exit_code_is_1(supervise, tmp_path):
    process = supervise("sys.exit(7)", processes=1, max_restarts=2)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, starts(tmp_path)) == (1, [3])
    assert "ended with exit code 7, and launch.max_restarts=2 are used up; the same command goes on" in errors.splitlines()[-1]


def test_a_signal_reaches_the_ranks_and_their_ending_is_the_supervisors(supervise, tmp_path):
    heed = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), sys.exit(75)))\n(folder / f'ready{own}').write_text('1')\ntime.sleep(100)"
    process = supervise(heed, max_restarts=3)
    for own in range(2):
        wait_for(tmp_path / f"ready{own}")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert starts(tmp_path) == [1, 1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_that_ranks_do_not_heed_yet_ends_all_and_starts_none_again(number, code, supervise, tmp_path):
    unheeded = "signal.signal(signal.SIGINT, signal.SIG_DFL)\n(folder / f'ready{own}').write_text('1')\ntime.sleep(100)"
    process = supervise(unheeded, max_restarts=3)
    for own in range(2):
        wait_for(tmp_path / f"ready{own}")
    process.send_signal(number)
    assert process.wait(60) == code
    assert starts(tmp_path) == [1, 1]


def test_a_supervisor_that_is_killed_leaves_nobody_behind(supervise, tmp_path):
    process = supervise("(folder / f'pid{own}').write_text(str(os.getpid()))\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(100)")
    ranks = [psutil.Process(int(wait_for(tmp_path / f"pid{own}"))) for own in range(2)]
    process.kill()
    process.wait()
    assert psutil.wait_procs(ranks, timeout=30)[1] == []


@pytest.mark.parametrize(("is_written", "arguments"), [(True, "fresh=false"), (False, "")])
def test_a_run_that_was_begun_anew_goes_on_when_it_starts_again(is_written, arguments, supervise, tmp_path):
    (tmp_path / "config.yaml").write_text("of the run before")
    write = "(folder / 'config.yaml').write_text('anew')" if is_written else "pass"
    process = supervise(f"if start == 1:\n    {write}\n    sys.exit(1)", processes=1, max_restarts=1, fresh=True)
    assert process.wait(60) == 0
    assert (tmp_path / "arguments0").read_text() == arguments


def test_one_process_that_is_never_started_again_needs_no_supervisor():
    assert not needs_supervisor(LaunchConfig())
    assert needs_supervisor(LaunchConfig(processes=2))
    assert needs_supervisor(LaunchConfig(max_restarts=1))


def test_a_rank_of_another_launcher_is_refused_and_one_of_ours_is_not(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert not needs_supervisor(LaunchConfig())
    with pytest.raises(ValueError, match="torchrun's --max-restarts"):
        needs_supervisor(LaunchConfig(max_restarts=1))
    monkeypatch.setenv(MARK, "1")
    assert not needs_supervisor(LaunchConfig(max_restarts=1))


SETTINGS = [
    "domain=[arithmetic]", "domains.arithmetic.prompts.rows=50", "num_steps=6", "rollout.prompts_per_step=8", "rollout.max_new_tokens=4",
    "rollout.decode_width=8", "checkpoint.every=2", "optim.lr=1e-3", "logger=none", "threads=1", "check.signal=off",
]  # fmt: skip


@pytest.fixture(scope="module")
def settings(saved_v4, teacher_folders) -> list[str]:
    return [*SETTINGS, f"student.model={saved_v4}", f"domains.arithmetic.teacher.model={teacher_folders['v4']}"]


def opd(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "opd", "distill", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def records(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []


def wait_for_records(process: subprocess.Popen, run_dir: Path, count: int) -> None:
    while len(records(run_dir)) < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@pytest.mark.multi
def test_a_rank_that_is_killed_is_started_again_and_the_run_ends_bit_for_bit_like_one_that_was_not(settings, tmp_path, numbers, device):
    """With one rank, so that the tests' own process can make the run to compare with."""
    distill(load_config("distill", [*settings, f"run_dir={tmp_path / 'whole'}"]))
    run_dir = tmp_path / "run"
    process = opd(*settings, f"run_dir={run_dir}", "launch.max_restarts=1", "fresh=true")
    wait_for_records(process, run_dir, 5)
    [rank] = psutil.Process(process.pid).children()
    rank.kill()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "was killed by SIGKILL; start 2 of 2 goes on from the last checkpoint" in errors
    assert numbers(run_dir) == numbers(tmp_path / "whole")
    assert (run_dir / "student" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "student" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.multi
def test_two_ranks_survive_a_killed_and_a_stopped_one_and_a_signal_bit_for_bit(settings, tmp_path, numbers):
    settings = [*settings, "launch.processes=2", "launch.heartbeat_seconds=10"]
    whole = opd(*settings, f"run_dir={tmp_path / 'whole'}")
    _, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    run_dir = tmp_path / "run"
    process = opd(*settings, f"run_dir={run_dir}", "launch.max_restarts=2")
    for count, number in [(2, signal.SIGKILL), (4, signal.SIGSTOP)]:
        wait_for_records(process, run_dir, count)
        one = next(rank for rank in psutil.Process(process.pid).children() if rank.environ()["RANK"] == "1")
        one.send_signal(number)
        one.wait(120)
    wait_for_records(process, run_dir, 5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert f"rank 1 (pid {one.pid} on " in errors
    last = opd(*settings, f"run_dir={run_dir}")
    _, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    assert numbers(run_dir) == numbers(tmp_path / "whole")
    assert (run_dir / "student" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "student" / "model.safetensors").read_bytes()


@pytest.mark.multi
def test_ranks_that_are_refused_end_with_exit_code_2_and_are_not_started_again(tmp_path, settings):
    process = opd(*settings, "student.model=./no/student", f"run_dir={tmp_path}", "launch.processes=2", "launch.max_restarts=2")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert errors.count("the student is not at ./no/student") == 2
    assert "start 2" not in errors
