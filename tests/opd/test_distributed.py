"""Process groups in one process: what a reduction over one rank is, and what a run leaves in the environment."""

import os
import subprocess
import sys

import pytest
import torch

from opd.distributed import Group, barrier, broadcast_object, gather_objects, is_main, num_ranks, on_main, rank, reduce_max, reduce_sum, set_threads


@pytest.mark.parametrize("group", list(Group))
def test_one_process_is_rank_0_of_1_in_every_group(group, device):
    assert (rank(group), num_ranks(group), is_main()) == (0, 1, True)


@pytest.mark.parametrize("reduce", [reduce_sum, reduce_max])
def test_a_reduction_over_one_rank_is_a_new_tensor_of_the_same_values(reduce, device):
    values = torch.tensor([1.0, -2.0])
    reduced = reduce(values, Group.data)
    assert torch.equal(reduced, values)
    reduced += 1
    assert values.tolist() == [1.0, -2.0]


def test_objects_of_one_rank_are_themselves(device):
    value = {"a": [1]}
    barrier()
    assert gather_objects(value, Group.data) == [value]
    assert broadcast_object(value) is value


def test_what_the_main_rank_computes_and_what_it_refuses_reach_every_rank(device):
    def refuse() -> None:
        raise ValueError("the file is not there")

    assert on_main(lambda: {"a": 1}) == {"a": 1}
    with pytest.raises(ValueError, match="the file is not there"):
        on_main(refuse)


def test_what_the_disk_refuses_on_the_main_rank_is_a_sentence(device, tmp_path):
    with pytest.raises(ValueError, match="nowhere: No such file or directory"):
        on_main((tmp_path / "nowhere").read_text)


def run(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def test_a_single_process_leaves_no_address_that_its_children_would_take_for_theirs(device):
    """Two runs of which one starts the other would otherwise wait on one port."""
    script = (
        "import os; from opd.distributed import start_processes, stop_processes, is_main; start_processes(); start_processes(); "
        "print([name for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT') if name in os.environ], is_main()); stop_processes(); stop_processes()"
    )
    assert run(script) == "[] True"


def on_two_ranks(script: str) -> list[str]:
    """The last line that each rank prints."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # of the launcher, as torchrun's: no port to lose
    places = [{"RANK": str(place), "LOCAL_RANK": str(place)} for place in range(2)]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared = address | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=os.environ | shared | place) for place in places
    ]
    return [process.communicate(timeout=120)[0].strip().splitlines()[-1] for process in processes]


def test_a_process_of_a_launcher_takes_its_place_from_the_environment():
    script = (
        "import torch, sys, subprocess, os\n"
        "from opd.distributed import *\n"
        "start_processes(1.0)\n"
        "def refuse():\n"
        "    raise ValueError(f'refused by {rank(Group.data)}')\n"
        "def refusal():\n"
        "    try:\n"
        "        on_main(refuse)\n"
        "    except ValueError as error:\n"
        "        return error\n"
        "own = rank(Group.data)\n"
        "total = reduce_sum(torch.tensor([own + 1.0]), Group.data).item(), reduce_max(torch.tensor([float(own)]), Group.data).item()\n"
        "print(own, num_ranks(Group.data), num_ranks(Group.expert), is_main(), total, gather_objects(own, Group.data), broadcast_object(own), "
        "on_main(lambda: 'main'), refusal())\n"
    )
    expected = ["0 2 1 True (3.0, 1.0) [0, 1] 0 main refused by 0", "1 2 1 False (3.0, 1.0) [0, 1] 0 main refused by 0"]
    assert on_two_ranks(script) == expected


def test_a_percentile_of_two_ranks_values_is_that_of_all_of_them():
    script = (
        "import torch\n"
        "from opd.distributed import *\n"
        "from opd.metrics import DomainTotals\n"
        "start_processes(1.0)\n"
        "totals = DomainTotals(['law', 'code', 'absent'])\n"
        "totals.add_values('law', torch.arange(150.0) + 150 * rank(Group.data))\n"
        "totals.add_values('code', torch.arange(200.0)[rank(Group.data)::2])\n"
        "print(totals.reduced_percentile())\n"
    )
    assert on_two_ranks(script) == [str({"law": 296.0, "code": 197.0, "absent": 0.0})] * 2


def test_work_of_the_main_rank_may_take_longer_than_a_collective():
    script = (
        "import time\n"
        "from opd.distributed import *\n"
        "start_processes(4 / 60)\n"
        "print(on_main_at_length(lambda: time.sleep(8) or 'done'))\n"
    )
    assert on_two_ranks(script) == ["done", "done"]


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_are_those_asked_for(restored_threads):
    assert set_threads(2) == torch.get_num_threads() == 2


@pytest.mark.parametrize("local_processes", [1, 2, 64])
def test_threads_left_open_are_this_processes_share_of_the_cores_less_one_and_at_least_one(local_processes, restored_threads, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_processes))
    cores = len(os.sched_getaffinity(0))
    assert set_threads(None) == max(1, cores // local_processes - 1)
