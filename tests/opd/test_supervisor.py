"""The supervisor: which endings are final, who is named, that signals arrive, that nobody is left behind. Its ranks are small programs."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

import opd.supervisor
from opd.config import RunConfig
from opd.job_config import LaunchConfig
from opd.supervisor import MARK, Supervisor, needs_supervisor, require_no_fresh_requeue

RANK = """
import os, pathlib, signal, sys, time

own, folder = int(os.environ.get("RANK", "0")), pathlib.Path(sys.argv[1])
starts = folder / f"starts{own}"
start = int(starts.read_text()) + 1 if starts.exists() else 1
starts.write_text(str(start))
(folder / f"arguments{own}").write_text(" ".join(sys.argv[2:]))
"""

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])  # supervisors are forked from a process that has imported torch, and nothing else


def run_supervisor(command: list[str], cfg: RunConfig) -> None:
    os.dup2(os.open(f"{cfg.run_dir}/errors", os.O_CREAT | os.O_WRONLY), 2)
    opd.supervisor.LEAVE_SECONDS, cfg.launch.heartbeat_seconds = 1.0, 0.3
    sys.exit(Supervisor(command, cfg).run())


@pytest.fixture
def supervise(tmp_path) -> Iterator[Callable[..., BaseProcess]]:
    """supervise("sys.exit(2)", processes=2): a supervisor of ranks that do this."""
    started = []

    def start(what: str, processes: int = 2, max_restarts: int = 0, fresh: bool = False) -> BaseProcess:
        (tmp_path / "rank.py").write_text(RANK + what)
        cfg = RunConfig(run_dir=str(tmp_path), fresh=fresh, launch=LaunchConfig(processes=processes, max_restarts=max_restarts))
        process = SERVER.Process(target=run_supervisor, args=([sys.executable, str(tmp_path / "rank.py"), str(tmp_path)], cfg))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def ending(process: BaseProcess) -> int | None:
    process.join(60)
    return process.exitcode


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
    assert (ending(process), starts(tmp_path), (tmp_path / "errors").read_text()) == (code, [1, 1], "")


@pytest.mark.parametrize(("fault", "words"), [("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"), ("sys.exit(1)", "ended with exit code 1")])
def test_a_rank_that_dies_takes_the_others_along_and_all_start_again(fault, words, supervise, tmp_path):
    process = supervise(f"if own == 1 and start == 1:\n    {fault}\nif start == 1:\n    time.sleep(100)", max_restarts=2)
    assert (ending(process), starts(tmp_path)) == (0, [2, 2])
    [line] = (tmp_path / "errors").read_text().splitlines()
    assert line.startswith("opd: rank 1 (pid ")
    assert f"{words}; start 2 of 3 goes on from the last checkpoint" in line


def test_when_restarts_are_used_up_the_rank_is_named_and_the_exit_code_is_1(supervise, tmp_path):
    process = supervise("sys.exit(7)", processes=1, max_restarts=2)
    assert (ending(process), starts(tmp_path)) == (1, [3])
    assert "ended with exit code 7, and launch.max_restarts=2 are used up; the same command goes on" in (tmp_path / "errors").read_text().splitlines()[-1]


def test_a_signal_reaches_the_ranks_and_their_ending_is_the_supervisors(supervise, tmp_path):
    heed = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), sys.exit(75)))\n(folder / f'ready{own}').write_text('1')\ntime.sleep(100)"
    process = supervise(heed, max_restarts=3)
    for own in range(2):
        wait_for(tmp_path / f"ready{own}")
    os.kill(process.pid, signal.SIGTERM)
    assert ending(process) == 75
    assert starts(tmp_path) == [1, 1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_that_ranks_do_not_heed_yet_ends_all_and_starts_none_again(number, code, supervise, tmp_path):
    unheeded = "signal.signal(signal.SIGINT, signal.SIG_DFL)\n(folder / f'ready{own}').write_text('1')\ntime.sleep(100)"
    process = supervise(unheeded, max_restarts=3)
    for own in range(2):
        wait_for(tmp_path / f"ready{own}")
    os.kill(process.pid, number)
    assert ending(process) == code
    assert starts(tmp_path) == [1, 1]


def test_a_supervisor_that_is_killed_leaves_nobody_behind(supervise, tmp_path):
    process = supervise("(folder / f'pid{own}').write_text(str(os.getpid()))\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(100)")
    ranks = [psutil.Process(int(wait_for(tmp_path / f"pid{own}"))) for own in range(2)]
    process.kill()
    assert psutil.wait_procs(ranks, timeout=30)[1] == []


@pytest.mark.parametrize(("is_written", "arguments"), [(True, "fresh=false"), (False, "")])
def test_a_run_that_was_begun_anew_goes_on_when_it_starts_again(is_written, arguments, supervise, tmp_path):
    (tmp_path / "config.yaml").write_text("of the run before")
    write = "(folder / 'config.yaml').write_text('anew')" if is_written else "pass"
    process = supervise(f"if start == 1:\n    {write}\n    sys.exit(1)", processes=1, max_restarts=1, fresh=True)
    assert ending(process) == 0
    assert (tmp_path / "arguments0").read_text() == arguments


def test_one_process_that_is_never_started_again_needs_no_supervisor():
    assert not needs_supervisor(LaunchConfig())
    assert needs_supervisor(LaunchConfig(processes=2))
    assert needs_supervisor(LaunchConfig(max_restarts=1))


def test_a_job_that_is_queued_again_is_not_begun_anew(monkeypatch):
    require_no_fresh_requeue(RunConfig(fresh=True))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    require_no_fresh_requeue(RunConfig(fresh=False))
    with pytest.raises(ValueError, match="fresh=true would delete what it did before"):
        require_no_fresh_requeue(RunConfig(fresh=True))


def test_a_rank_of_another_launcher_is_refused_and_one_of_ours_is_not(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert not needs_supervisor(LaunchConfig())
    with pytest.raises(ValueError, match="torchrun's --max-restarts"):
        needs_supervisor(LaunchConfig(max_restarts=1))
    monkeypatch.setenv(MARK, "1")
    assert not needs_supervisor(LaunchConfig(max_restarts=1))
