"""Which teachers are whole on every rank and which are sharded, and how many stay in memory: from sizes and free memory, before anything is loaded."""

from dataclasses import dataclass

import psutil
import torch

from teachers.config import Placement, TeachersConfig

GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementPlan:
    """sharded: teachers whose weights are divided among the ranks. max_resident: how many stay in memory. capacity: how many there is memory for, the one on
    its way included. description: one sentence.
    """

    sharded: frozenset[str]
    max_resident: int
    capacity: int
    description: str


def plan_placement(sizes: dict[str, int], cfg: TeachersConfig, free_bytes: int, num_ranks: int) -> PlacementPlan:
    """Place teachers of so many bytes each, into half of a rank's free memory unless the config says how much.

    Raises ValueError where a teacher fits neither whole nor in shards.
    """
    budget = int(cfg.memory_gb * GB) if cfg.memory_gb is not None else free_bytes // 2
    if cfg.placement is Placement.sharded and num_ranks == 1:
        raise ValueError("teachers.placement=sharded needs several ranks: start with torchrun, or use placement=replicated")
    if cfg.max_resident is not None and cfg.max_resident < 1:
        raise ValueError(f"teachers.max_resident={cfg.max_resident} leaves no teacher in memory: use 1 or more, or null for as many as fit")
    together = 2 if cfg.prefetch and len(sizes) > 1 else 1
    sharded = set()
    if cfg.placement is not Placement.replicated:
        sharded = {name for name, size in sizes.items() if cfg.placement is Placement.sharded or (num_ranks > 1 and together * size > budget)}
    held = {name: -(-size // num_ranks) if name in sharded else size for name, size in sizes.items()}
    largest = max(held.values(), default=0)
    if largest > budget:
        advice = "give them more with teachers.memory_gb" + ("" if num_ranks > 1 and not sharded else ", or more ranks to share them")
        raise ValueError(f"the largest teacher takes {largest / GB:.3g} GB of each rank and {budget / GB:.3g} GB may be used for teachers: {advice}")
    fits_all = sum(held.values()) <= budget
    fitting = len(sizes) if fits_all else max(1, budget // largest)
    max_resident = min(len(sizes), cfg.max_resident or (fitting if fits_all else max(1, fitting - (together - 1))))
    has_room = cfg.max_resident is not None or (max_resident + 1) * largest <= budget
    is_prefetched = cfg.prefetch and max_resident < len(sizes) and has_room
    capacity = max_resident + (1 if is_prefetched else 0)
    return PlacementPlan(
        sharded=frozenset(sharded), max_resident=max_resident, capacity=capacity, description=_description(held, sharded, budget, max_resident, is_prefetched)
    )


def free_memory(device: torch.device, local_processes: int) -> int:
    """Bytes of memory that a process may count on: free on its GPU, or available on the machine divided among the node's processes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // local_processes


def _description(held: dict[str, int], sharded: set[str], budget: int, max_resident: int, is_prefetched: bool) -> str:
    if not held:
        return "teachers: all behind servers"
    size = f"{max(held.values(), default=0) / GB:.3g} GB at most" if len(held) > 1 else f"{sum(held.values()) / GB:.3g} GB"
    parts = [f"teachers: {len(held)} of {size} per rank, {sum(held.values()) / GB:.3g} GB in all, {budget / GB:.3g} GB may be used"]
    if sharded:
        parts.append(f"{len(sharded)} sharded over the ranks")
    if max_resident == len(held):
        parts.append("all stay in memory")
    else:
        parts.append(f"{max_resident} in memory at a time" + (", the next read while one scores" if is_prefetched else ""))
    return "; ".join(parts)
