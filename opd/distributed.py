"""Process groups by what they are for, and the few reductions the project needs.

Every reduction names its group: `data` (ranks with different rollouts), `expert` (ranks that hold different experts),
`sequence` (ranks that hold different pieces of one sequence). Today data is all ranks, and expert and sequence are one rank each;
code that names the right group keeps its meaning when that changes. The number of processes is read nowhere else.
"""

import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist

from opd.slurm import LOOPBACK

SIGN_OF_LIFE_SECONDS = 1.0
"""How often ranks hear that the main one is still at work."""


class Group(Enum):
    data = "data"
    expert = "expert"
    sequence = "sequence"


def start_processes(timeout_minutes: float = 30.0) -> torch.device:
    """Join the job's process group (one of a single process outside torchrun) and return this rank's device."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    use_gpu = torch.cuda.is_available()
    if use_gpu:
        _choose_gpu()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout=timedelta(minutes=timeout_minutes), **_meeting(timeout_minutes))
    return device


def _meeting(timeout_minutes: float) -> dict[str, Any]:
    """Where the ranks meet, for torch; empty where it finds the place itself, but then rank 0 listens at every address of its host."""
    if "WORLD_SIZE" not in os.environ:
        return {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # no port, nothing for children to inherit
    if not is_store_of_rank_0() or os.environ.get("MASTER_ADDR") != LOOPBACK:
        return {}
    number, count = launched_as()
    store = open_store(int(os.environ["MASTER_PORT"])) if number == 0 else connect_store(60 * timeout_minutes)
    return {"store": store, "rank": number, "world_size": count}


def _choose_gpu() -> None:
    """Where a launcher shows each rank one GPU of its own (srun --gpus-per-task=1), this is number 0. Raises ValueError where there are too few."""
    local, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if num_gpus == 1 and "SLURM_LOCALID" in os.environ:
        os.environ["LOCAL_RANK"] = "0"
    elif local >= num_gpus:
        raise ValueError(f"this is rank {local} of its host, where it sees {num_gpus} GPUs: start as many ranks per host, or give each one of its own")


def stop_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_launched() -> bool:
    """Whether a launcher started this process as one of its ranks."""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def has_met() -> bool:
    """Whether this rank has met all others: their connections are made when the group is."""
    return dist.is_initialized()


def launched_as() -> tuple[int, int]:
    """(number of this rank, number of ranks) as its launcher gave them, before they have joined."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def open_store(port: int = 0) -> dist.TCPStore:
    """A store of this process, on a free port unless told, at which ranks on this machine can meet; left to itself it would listen to other machines too."""
    listener = socket.create_server((LOOPBACK, port))
    port = listener.getsockname()[1]
    return dist.TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def rank_environment(number: int, count: int, store: dist.TCPStore) -> dict[str, str]:
    """What makes a process rank `number` of `count` on this machine, as torchrun would; a single one is no rank."""
    if count == 1:
        return {}
    places = {"RANK": number, "LOCAL_RANK": number, "GROUP_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": store.port}
    return {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": LOOPBACK, "GLOO_SOCKET_IFNAME": "lo", "TORCHELASTIC_USE_AGENT_STORE": "True"}


def connect_store(seconds: float) -> dist.TCPStore:
    """A connection to the store at which this job's ranks meet. One waits for its answer, so a thread needs its own. Raises RuntimeError."""
    timeout = timedelta(seconds=seconds)
    return dist.TCPStore(os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0")), None, False, timeout, wait_for_workers=False)


def start_number() -> str:
    """How often torchrun has started these ranks again."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def is_store_of_rank_0() -> bool:
    """Whether the store at which the ranks meet ends with rank 0; else it is their launcher's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def is_broken_connection(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is that of a collective whose other end is gone; gloo's are plain RuntimeErrors."""
    if error is None:
        return False
    is_own = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    return is_own or is_broken_connection(error.__cause__)


def set_threads(threads: int | None) -> int:
    """Threads of this process: the number asked for, else the machine's cores shared among its processes, less one.

    Two busy threads per core are far slower than one (up to thirty times, measured on two cores), and a spare core keeps
    data loading, logging and the neighbours of a shared machine from stopping a matrix product half-way.
    """
    chosen = threads or max(1, num_cores() // num_local_processes() - 1)
    torch.set_num_threads(chosen)
    return chosen


def num_local_processes() -> int:
    """Processes of this job on this machine; deepspeed's launcher has a name of its own for it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def rank(group: Group) -> int:
    return dist.get_rank() if _is_split(group) else 0


def num_ranks(group: Group) -> int:
    return dist.get_world_size() if _is_split(group) else 1


def is_main() -> bool:
    """Whether this rank writes files and logs."""
    return not dist.is_initialized() or dist.get_rank() == 0


def reduce_sum(values: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum over the group's ranks, as a new tensor."""
    return _reduced(values, dist.ReduceOp.SUM, group)


def reduce_max(values: torch.Tensor, group: Group) -> torch.Tensor:
    """The maximum over the group's ranks, as a new tensor."""
    return _reduced(values, dist.ReduceOp.MAX, group)


def gather_objects(value: Any, group: Group) -> list[Any]:
    """The value of every rank of the group, in rank order, on every rank."""
    if not _is_split(group):
        return [value]
    values = [None] * num_ranks(group)
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """The main rank's value, on every rank."""
    if not _is_split(Group.data):
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def on_main(compute: Callable[[], Any]) -> Any:
    """What the main rank computes, on every rank; where it raises ValueError, or the disk refuses, every rank raises ValueError."""
    value = problem = None
    if is_main():
        try:
            value = compute()
        except ValueError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    value, problem = broadcast_object((value, problem))
    if problem is not None:
        raise ValueError(problem)
    return value


def on_main_at_length(compute: Callable[[], Any]) -> Any:
    """`on_main` for what may outlast the collectives' timeout: the main rank computes in a thread, and tells the others every second that it does."""
    with ThreadPoolExecutor(1) as pool:
        work = [pool.submit(compute)] if is_main() else []
        while broadcast_object(bool(work) and not wait(work, SIGN_OF_LIFE_SECONDS).done):
            pass
        return on_main(lambda: work[0].result())


def barrier() -> None:
    if _is_split(Group.data):
        dist.barrier()


def _is_split(group: Group) -> bool:
    return group is Group.data and dist.is_initialized() and dist.get_world_size() > 1


def _reduced(values: torch.Tensor, operation: dist.ReduceOp, group: Group) -> torch.Tensor:
    result = values.clone()
    if _is_split(group):
        dist.all_reduce(result, op=operation)
    return result
