"""Two hosts: network namespaces of this machine, joined by a pair of virtual interfaces, whose link is cut under a job of one rank on each.

Nothing of a cut link reaches either side: no connection is closed, packets are lost. Needs root's rights over the network, and `ip` of iproute2.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

BOUND = 60
"""Seconds; a collective waits for half an hour (launch.timeout_minutes)."""
SETTINGS = [
    "domain=[arithmetic]", "domains.arithmetic.prompts.rows=50", "num_steps=8", "rollout.prompts_per_step=8", "rollout.max_new_tokens=4",
    "rollout.decode_width=8", "checkpoint.every=2", "optim.lr=1e-3", "logger=none", "threads=1", "check.signal=off", "launch.heartbeat_seconds=6",
]  # fmt: skip

REDUCE = """
import os, sys, time, torch
from pathlib import Path
from opd.distributed import Group, reduce_sum, start_processes
from opd.errors import RankLost
from opd.heartbeat import Heartbeat
try:
    with Heartbeat(3.0):
        start_processes()
        while True:
            reduce_sum(torch.zeros(1), Group.data)
            Path(sys.argv[1] + os.environ["RANK"]).touch()
            time.sleep(0.01)
except RankLost as loss:
    sys.exit(f"lost: {loss}")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoHosts:
    """Names of the namespaces; each has an interface veth0, with address 10.99.0.1 and 10.99.0.2."""

    names: tuple[str, str]

    def start(self, *arguments: str) -> list[subprocess.Popen]:
        """The same Python program as rank 0 on the first host and as rank 1 on the second."""
        job = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.99.0.1", "MASTER_PORT": "29500"}
        environment = os.environ | job | {"GLOO_SOCKET_IFNAME": "veth0", "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        commands = [["ip", "netns", "exec", name, sys.executable, *arguments] for name in self.names]
        return [subprocess.Popen(command, env=environment | {"RANK": str(rank)}, **pipes) for rank, command in enumerate(commands)]

    def set_link(self, state: str) -> None:
        ip("-n", self.names[1], "link", "set", "veth0", state)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[TwoHosts]:
    names = (f"opd-{os.getpid()}-0", f"opd-{os.getpid()}-1")
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("-n", names[0], "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.99.0.{number}/24", "dev", "veth0")
            for device in ("lo", "veth0"):
                ip("-n", name, "link", "set", device, "up")
        ip("netns", "exec", names[0], "true")
        yield TwoHosts(names=names)
    except FileNotFoundError:
        pytest.skip("there is no `ip`: install iproute2")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)


def wait_until(condition, ranks: list[subprocess.Popen]) -> None:
    while not condition():
        assert all(rank.poll() is None for rank in ranks), [rank.communicate()[1] for rank in ranks if rank.poll() is not None]
        time.sleep(0.01)


def finish(ranks: list[subprocess.Popen], timeout: float = 300) -> list[str]:
    """What the ranks wrote to stderr, in rank order, all of them within a time."""
    try:
        deadline = time.monotonic() + timeout
        return [rank.communicate(timeout=deadline - time.monotonic())[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def assert_names_the_other(ranks: list[subprocess.Popen], errors: list[str]) -> None:
    """Each rank ends with a failure, and says that it is the other that it does not hear."""
    assert all(rank.returncode == 1 for rank in ranks), errors
    assert f"opd: rank 1 (pid {ranks[1].pid} on " in errors[0]
    assert f"opd: rank 0 (pid {ranks[0].pid} on " in errors[1]
    assert all("has not been heard of for " in text for text in errors)


@pytest.mark.multi
def test_a_cut_link_ends_the_ranks_of_both_hosts_each_with_the_others_name(two_hosts, tmp_path):
    """From the first collective on, when one rank may not have read where the other runs."""
    ranks = two_hosts.start("-c", REDUCE, str(tmp_path / "met"))
    try:
        wait_until(lambda: all((tmp_path / f"met{rank}").exists() for rank in range(2)), ranks)
        two_hosts.set_link("down")
        errors = finish(ranks, BOUND)
    finally:
        two_hosts.set_link("up")
    assert all(rank.returncode == 1 for rank in ranks), errors
    assert all(re.search(rf"rank {1 - rank}\b.* has not been heard of for ", errors[rank]) for rank in range(2)), errors


@pytest.fixture(scope="module")
def settings(saved_v4, saved_qwen3_moe) -> list[str]:
    return [*SETTINGS, f"student.model={saved_v4}", f"domains.arithmetic.teacher.model={saved_qwen3_moe}"]


def num_records(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len([line for line in path.read_text().splitlines() if line.endswith("}")]) if path.is_file() else 0


@pytest.mark.slow
@pytest.mark.multi
def test_a_run_whose_link_was_cut_goes_on_as_if_it_had_not_been(two_hosts, settings, numbers, tmp_path):
    """The same command, on both hosts; the checkpoint that it goes on from is older than the cut."""
    whole = two_hosts.start("-m", "opd", "distill", *settings, f"run_dir={tmp_path / 'whole'}")
    errors = finish(whole)
    assert all(rank.returncode == 0 for rank in whole), errors
    run_dir = tmp_path / "run"
    command = ("-m", "opd", "distill", *settings, f"run_dir={run_dir}")
    ranks = two_hosts.start(*command)
    try:
        wait_until(lambda: num_records(run_dir) >= 5, ranks)
        two_hosts.set_link("down")
        assert_names_the_other(ranks, finish(ranks, BOUND))
    finally:
        two_hosts.set_link("up")
    assert num_records(run_dir) < 9
    again = two_hosts.start(*command)
    errors = finish(again)
    assert all(rank.returncode == 0 for rank in again), errors
    assert [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == list(range(9))
    assert numbers(run_dir) == numbers(tmp_path / "whole")
    assert (run_dir / "student" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "student" / "model.safetensors").read_bytes()
