"""Peak memory of a piece of work, in a process of its own.

On a CPU the operating system counts: after one warm-up the process gives back what is free, the kernel's high-water mark of its
resident memory is reset (5 into /proc/self/clear_refs), and the peak is that mark minus the resident memory before. It holds what
libraries allocate behind torch's back, which a profiler of torch would not see, and not what the warm-up left behind (compiled
code, threads, scratch space of the matrix products). A process of its own, since a heap that others have used hides new allocations.
On CUDA torch's allocator counts.

N: tokens. D: hidden size. V: vocabulary.
"""

import ctypes
import gc
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opd.bench_contenders import OWN, Problem, make_inputs
from opd.bench_peers import PEERS

HIGH_WATER = Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes above what was there before, inputs not counted. without_gradients: less the results, the two gradients."""

    bytes: int
    without_gradients: int


def require_high_water_mark(device: str) -> None:
    """Raises ValueError where the operating system does not tell a peak."""
    if device == "cpu" and not os.access(HIGH_WATER, os.W_OK):
        raise ValueError(f"peak memory needs {HIGH_WATER}, which this system does not have: set memory=false")


def measure_peak(name: str, problem: Problem, threads: int) -> Peak:
    """The peak of one contender on one problem. Raises ValueError where its process is killed, as for want of memory."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_measure_contender, name, problem, threads).result()
        except BrokenProcessPool as error:
            size = f"{problem.num_tokens} tokens and a vocabulary of {problem.vocab_size}"
            raise ValueError(f"{name} was killed at {size}, probably for want of memory: leave it out with contenders=[...]") from error


def _measure_contender(name: str, problem: Problem, threads: int) -> Peak:
    """In the process of its own. Preparing counts too: `products_into` allocates its outputs there."""
    torch.set_num_threads(threads)
    inputs = make_inputs(problem)
    contender = (OWN | PEERS)[name]
    peak, outcome = peak_bytes(lambda: contender.prepare(inputs)(), problem.device)
    results = outcome.hidden_gradient_ND.nbytes + outcome.head_gradient_VD.nbytes
    return Peak(peak, max(0, peak - results))


def peak_bytes(work: Callable[[], Any], device: str) -> tuple[int, Any]:
    """(the most memory that `work` holds at once, its result included; its result). It runs twice, and the first run is not counted."""
    work()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    ctypes.CDLL(None).malloc_trim(0)
    HIGH_WATER.write_text("5")
    before = status_bytes("VmRSS")
    result = work()
    return status_bytes("VmHWM") - before, result


def status_bytes(name: str) -> int:
    """A line of the operating system's account of this process, as VmRSS."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024
