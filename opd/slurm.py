"""Ranks that `srun` starts, without another launcher between: the place of a task of a SLURM step, in the words that torchrun would use.

torchrun ends with 1 whatever its ranks ended with; srun hands on the highest of their exit codes, and a batch script can tell a run that ended early with a
checkpoint (75) from one that was refused (2): conf/slurm/opd.sbatch.

Only a task of a step of several is a rank. SLURM sets SLURM_PROCID and SLURM_NTASKS for the batch shell too, so those alone say nothing; SLURM_STEP_NUM_TASKS
is srun's. Under `srun --ntasks=1`, and in a shell of an allocation, a command is a process of its own, which may start ranks by launch.processes. What
another launcher has set (torchrun, accelerate or deepspeed, itself started once per node by srun) holds.

Ranks meet at rank 0's host, the first of the step, or where MASTER_ADDR says; at a port that follows from the job's number, or MASTER_PORT.
"""

import re
from collections.abc import Mapping

LOOPBACK = "127.0.0.1"
OF_A_TASK = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
FIRST_PORT, NUM_PORTS = 20000, 10000
"""Below those that Linux gives to outgoing connections."""


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """What makes this process a rank, as torchrun would say it; empty where it is none of SLURM's. Raises ValueError for a step that contradicts itself."""
    count = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if count == 1:
        return {}
    missing = [name for name in OF_A_TASK if name not in environment]
    if missing:
        raise ValueError(f"srun started {count} tasks, and {missing[0]} is not set: hand SLURM's whole environment on to opd (into a container too)")
    number = int(environment["SLURM_PROCID"])
    if "RANK" in environment:
        _require_agreement(environment, number, count)
        return {}
    if number >= count:
        raise ValueError(f"srun says that this is task {number} of {count}: start all ranks in one step of one job, without components (a colon)")
    node, tasks = int(environment["SLURM_NODEID"]), tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    if sum(tasks) != count or node >= len(tasks):
        raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={environment['SLURM_STEP_TASKS_PER_NODE']} are not {count} tasks: start opd by srun itself")
    places = {"RANK": number, "WORLD_SIZE": count, "LOCAL_RANK": int(environment["SLURM_LOCALID"]), "LOCAL_WORLD_SIZE": tasks[node], "GROUP_RANK": node}
    is_one_host = len(tasks) == 1
    address = LOOPBACK if is_one_host else first_host(environment["SLURM_STEP_NODELIST"])
    port = FIRST_PORT + (int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))) % NUM_PORTS
    meeting = {"MASTER_ADDR": address, "MASTER_PORT": str(port)} | ({"GLOO_SOCKET_IFNAME": "lo"} if is_one_host else {})
    meeting |= {name: environment[name] for name in meeting if name in environment}
    return {name: str(value) for name, value in places.items()} | meeting


def first_host(nodes: str) -> str:
    """The first of SLURM's list of hosts: of `node[012-015,020]-ib,login1` it is node012-ib."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def tasks_per_node(text: str) -> list[int]:
    """Tasks on each host of a step, from SLURM's `2(x3),1`."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    if None in parts:
        raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={text} cannot be read: start opd by srun itself")
    return [int(part[1]) for part in parts for _ in range(int(part[2] or 1))]


def _require_agreement(environment: Mapping[str, str], number: int, count: int) -> None:
    """torchrun numbers its ranks in the order in which its agents come; any other launcher of one rank per task keeps srun's."""
    is_one_per_task = environment.get("WORLD_SIZE") == str(count) and "TORCHELASTIC_RUN_ID" not in environment
    if is_one_per_task and environment["RANK"] != str(number):
        raise ValueError(f"RANK={environment['RANK']} is set, and srun started this process as task {number} of {count}: unset RANK and WORLD_SIZE")
