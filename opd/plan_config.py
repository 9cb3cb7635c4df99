"""Typed settings of `opd plan`: the job whose memory is worked out."""

from dataclasses import dataclass
from enum import Enum


class DeviceKind(Enum):
    """What a rank computes on. What is allocated and never written counts on a GPU; an operating system gives a CPU no memory for it."""

    cuda = "cuda"
    cpu = "cpu"


@dataclass(slots=True)
class PlanConfig:
    """ranks: processes of the job, each with a device of its own; null takes launch.processes.

    ranks_per_node: of them on one machine, which share its host memory.
    device: what a rank computes on.
    memory_gib: memory of a rank's device, in 2**30 bytes; null takes this machine's.
    host_memory_gib: memory of a machine, in 2**30 bytes; null does not judge it.
    prompt_tokens: tokens of the longest prompt, which stand before rollout.max_new_tokens in the longest rollout.
    teachers: so many teachers of the student's architecture, in bfloat16, in place of those of `domains`; null takes the domains' own.
    """

    ranks: int | None = None
    ranks_per_node: int = 8
    device: DeviceKind = DeviceKind.cuda
    memory_gib: float | None = 80.0
    host_memory_gib: float | None = None
    prompt_tokens: int = 1024
    teachers: int | None = None
