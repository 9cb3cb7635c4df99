"""A process's memory over its own baseline: on a CPU what the operating system has given it, on CUDA what the allocator has handed out.

On a CPU that is RssAnon of /proc/self/status. Pages of files, which the whole resident set has too, are the kernel's to take back: reading a checkpoint maps
as much again as it loads, and libraries come in when they are first called. The kernel's high-water mark knows the whole resident set alone, so
the peak is what a thread sees that looks every PAUSE seconds; memory that comes and goes in between escapes it.

glibc keeps freed memory for later, in holes between blocks in use. It is asked to give back their pages before anything is measured, and again where a
peak grows: holes that imports had left were filled and emptied layer by layer otherwise, which looked like 0.05 to 0.1 GiB of activations. A process
that was started with MALLOC_MMAP_THRESHOLD_=65536 has fewer of them, since a block for which there is no hole then has pages of its own.
"""

import ctypes
import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from opd.bench_memory import status_bytes

PAUSE = 0.002

GROWTH = 4 << 20
"""Bytes of a new peak that are looked at again when free memory is given back."""


class MemoryMeter:
    """Memory of this process since the meter was made. before, peak: bytes at the beginning of the last `watched`, and at most in it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.baseline = self.before = self.peak = 0
        self.baseline = self.resident()

    def resident(self) -> int:
        """Bytes in use over the baseline."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        else:
            ctypes.CDLL(None).malloc_trim(0)
        return self._present()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Find `before` and `peak` of the work inside."""
        self.before = self.peak = self.resident()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            self.peak = torch.cuda.max_memory_allocated(self.device) - self.baseline
            return
        is_over = threading.Event()
        thread = threading.Thread(target=self._look, args=(is_over,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _look(self, is_over: threading.Event) -> None:
        trim = ctypes.CDLL(None).malloc_trim
        while not is_over.is_set():
            if self._present() > self.peak + GROWTH:
                trim(0)
            self.peak = max(self.peak, self._present())
            time.sleep(PAUSE)

    def _present(self) -> int:
        return (torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else status_bytes("RssAnon")) - self.baseline
