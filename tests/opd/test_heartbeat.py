"""Ranks that watch each other: a dead, stopped or failed one ends the others within a bounded time, with its name."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from opd.distributed import Group, open_store, rank_environment, reduce_sum, start_processes
from opd.errors import RankLost
from opd.heartbeat import Heartbeat, Peer

SECONDS = 3.0
TIMEOUT = 120

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])  # ranks are forked from a process that has imported torch, and nothing else


def fault(name: str, own: int) -> bool:
    """What a rank does after it has met the other; returns whether it goes on."""
    if own == 1 and name == "refuse":
        raise ValueError("the disk is full")
    if own == 1 and name == "break":
        raise KeyError("x")
    if own == 0 and name == "wait":
        time.sleep(100)
    return not (own == 1 and name == "leave")


def work(name: str, environment: dict[str, str], folder: Path) -> None:
    """One rank, in a process of its own: meets the other, waits for a file, and goes on as the fault has it."""
    os.environ.update(environment)
    own = int(os.environ["RANK"])
    errors = os.open(folder / f"errors{own}", os.O_CREAT | os.O_WRONLY)
    os.dup2(errors, 2)
    try:
        with Heartbeat(SECONDS) as heartbeat:
            start_processes(1.0)
            while not all(peer.where for peer in heartbeat.peers.values()):
                time.sleep(0.01)
            (folder / f"ready{own}").touch()
            while not (folder / f"go{own}").exists():
                time.sleep(0.01)
            for _ in range(10 if name == "finish" else 10**6):
                if not fault(name, own):
                    break
                reduce_sum(torch.zeros(1), Group.data)
                time.sleep(0.01)
    except RankLost as loss:
        os.write(2, f"lost: {loss}\n".encode())
        sys.exit(loss.code)
    except ValueError:
        sys.exit(2)


@dataclass
class Rank:
    """A rank's process, and where it writes."""

    process: BaseProcess
    folder: Path
    number: int

    def go_on(self) -> None:
        (self.folder / f"go{self.number}").touch()

    def wait(self) -> tuple[int | None, str]:
        """(exit code, what it wrote to stderr)."""
        self.process.join(TIMEOUT)
        return self.process.exitcode, (self.folder / f"errors{self.number}").read_text()

    @property
    def where(self) -> str:
        return f"rank {self.number} (pid {self.process.pid} on {socket.gethostname()})"


@pytest.fixture
def start_ranks(tmp_path) -> Iterator[Callable[..., list[Rank]]]:
    """start_ranks(fault): two ranks that have met, and wait before they go on."""
    store, ranks = open_store(), []

    def start(name: str, **changes: str) -> list[Rank]:
        for number in range(2):
            process = SERVER.Process(target=work, args=(name, rank_environment(number, 2, store) | changes, tmp_path))
            process.start()
            ranks.append(Rank(process, tmp_path, number))
        while not all((tmp_path / f"ready{rank.number}").exists() for rank in ranks):
            assert all(rank.process.is_alive() for rank in ranks), [rank.wait() for rank in ranks]
            time.sleep(0.01)
        return ranks

    yield start
    for rank in ranks:
        rank.process.kill()
        rank.process.join()


@pytest.mark.multi
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_killed_or_stopped_ends_the_other_by_name(number, start_ranks):
    one, other = start_ranks("none")
    os.kill(other.process.pid, number)
    one.go_on()
    code, errors = one.wait()
    assert code == 1
    assert other.where in errors
    assert "has not been heard of for" in errors
    assert "Traceback" not in errors


@pytest.mark.multi
@pytest.mark.parametrize(("name", "code", "words"), [("refuse", 2, "the disk is full"), ("break", 1, "KeyError: 'x'")])
def test_an_error_on_one_rank_is_what_the_other_reports_with_the_same_exit_code(name, code, words, start_ranks):
    one, other = start_ranks(name)
    one.go_on()
    other.go_on()
    found, errors = one.wait()
    assert found == code
    assert f"{other.where} ended: {words}" in errors


@pytest.mark.slow
@pytest.mark.multi
def test_an_error_on_one_rank_ends_one_that_waits_for_something_else(start_ranks, tmp_path):
    one, other = start_ranks("wait")
    one.go_on()
    os.kill(other.process.pid, signal.SIGINT)
    code, errors = one.wait()
    assert code == 130
    assert f"opd: {other.where} ended: interrupted" in errors


@pytest.mark.multi
def test_a_rank_that_ends_while_another_waits_for_it_is_named(start_ranks):
    one, other = start_ranks("leave")
    one.go_on()
    other.go_on()
    code, errors = one.wait()
    assert (code, other.wait()[0]) == (1, 0)
    assert f"lost: {other.where} has ended while others still waited for it" in errors


@pytest.mark.multi
def test_ranks_that_finish_end_in_peace(start_ranks):
    ranks = start_ranks("finish")
    for rank in ranks:
        rank.go_on()
    assert [rank.wait() for rank in ranks] == [(0, ""), (0, "")]


@pytest.mark.multi
def test_rank_0_that_holds_the_store_itself_is_named_too(start_ranks):
    """As where srun starts the ranks; the store ends with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one, other = start_ranks("none", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
    one.process.kill()
    other.go_on()
    code, errors = other.wait()
    assert code == 1
    assert one.where in errors
    assert "Traceback" not in errors


def test_a_single_process_has_no_heartbeat():
    with Heartbeat(0.001) as heartbeat:
        assert not heartbeat.peers
        assert not heartbeat.teller.is_alive()


def test_a_rank_is_silent_for_as_long_as_its_number_stays_the_same_until_it_says_that_it_ends():
    peer = Peer()
    for beats, ended, silent in [(1, False, 0.0), (1, False, 2.0), (1, False, 4.0), (2, False, 0.0), (2, False, 2.0), (2, True, 0.0), (2, True, 0.0)]:
        peer.hear({"host": "a", "pid": 7, "beats": beats, "ended": ended}, 2.0)
        assert peer.silent == silent
    assert (peer.where, peer.has_ended) == ("pid 7 on a", True)


LOST = """
import os, time, torch.distributed as dist
from opd.heartbeat import Heartbeat
with Heartbeat(1.0):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    time.sleep(100)
"""


def test_a_rank_that_loses_the_store_before_its_first_word_there_ends():
    """As it is when the link is cut between the ranks' meeting and the first heartbeat."""
    with socket.socket() as unheard:  # bound, and nobody listens
        unheard.bind(("127.0.0.1", 0))
        place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unheard.getsockname()[1])}
        ended = subprocess.run([sys.executable, "-c", LOST], env=os.environ | place, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "whose store the ranks meet at, has not been heard of" in ended.stderr
