"""Residency: whose weights are in memory, and bringing in the next ones while others work.

A fixed number of buffers, as long as the largest of the weights that take turns in them, so that memory does not grow with the number of teachers.
A buffer is on the device; on a GPU it is filled through pinned host memory. Reading happens in a thread of its own (file reads, copies and
checksums release Python's lock), into a buffer whose owner is neither at work nor still wanted; who asks for weights that are on their way
waits for them, and that wait is what loading costs a step.

An interpreter that ends waits for readings too, for EXIT_SECONDS: torch aborts a process whose threads are cut off inside it.
"""

import atexit
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from teachers.checkpoint_reader import Reading

ALIGNMENT = 64
"""Bytes: each weight begins at a multiple of it, as vector instructions want."""

EXIT_SECONDS = 30.0
"""Longest wait for readings at the end of the process; one that hangs in the file system ends with it, and harms nothing."""

_READERS: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()

Weights = dict[str, torch.Tensor]
Layout = dict[str, tuple[torch.Size, torch.dtype]]
"""Shape and dtype of each weight."""


class Source(Protocol):
    """Where weights are read from."""

    name: str
    layout: Layout
    in_background: bool
    """Whether it can be read while other threads work."""

    def read(self, weights: Weights) -> Reading:
        """Fill all weights; raises whatever reading raises."""


@dataclass(slots=True)
class LoadFigures:
    """What loading was and cost: readings, bytes read, seconds of reading, seconds that somebody waited for it."""

    loads: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, other: "LoadFigures") -> None:
        self.loads, self.num_bytes = self.loads + other.loads, self.num_bytes + other.num_bytes
        self.seconds, self.waited = self.seconds + other.seconds, self.waited + other.waited


@dataclass(slots=True)
class Buffer:
    """Memory for one set of weights; `host` is the pinned memory that a GPU's is filled through, else the same."""

    device: torch.Tensor
    host: torch.Tensor


@dataclass(slots=True)
class Resident:
    """A source's weights in a buffer; `thread` fills it after `idle`, a GPU's last use of what was there, and `outcome` is what came of that."""

    source: Source
    buffer: Buffer
    weights: Weights
    thread: threading.Thread | None = None
    outcome: Reading | BaseException | None = None
    seconds: float = 0.0
    idle: torch.cuda.Event | None = None

    @property
    def is_arriving(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


@dataclass(slots=True)
class Residency:
    """At most `capacity` sets of weights in memory.

    on_evict: called with the name of weights whose memory will be overwritten.
    timeout: seconds that a reading may take.
    num_loads: readings so far.
    """

    capacity: int
    device: torch.device
    timeout: float
    on_evict: Callable[[str], None] = lambda name: None
    residents: OrderedDict[str, Resident] = field(default_factory=OrderedDict)
    free: list[Buffer] = field(default_factory=list)
    figures: dict[str, LoadFigures] = field(default_factory=dict)
    num_loads: int = 0

    def __contains__(self, name: str) -> bool:
        return name in self.residents

    def names(self) -> list[str]:
        """Weights in memory or on their way, the least recently used first."""
        return list(self.residents)

    def prefetch(self, source: Source, keep: set[str]) -> None:
        """Begin to read a source's weights, if they are not there and a buffer can be had from weights other than `keep`."""
        if source.name not in self.residents and source.in_background:
            buffer = self._buffer(source, keep)
            if buffer is not None:
                self._begin(source, buffer)

    def fetch(self, source: Source, keep: set[str] = frozenset()) -> tuple[Weights, Reading | None]:
        """A source's weights, and what their reading was if they come from the files; the weights of `keep` stay if they can.

        Raises TimeoutError, and whatever reading raised.
        """
        begun = time.monotonic()
        if source.name not in self.residents:
            buffer = self._buffer(source, keep) or self._buffer(source, set())
            if buffer is None:  # all that are there are on their way; what comes of the first is told to who asks for it
                first = next(iter(self.residents))
                self.residents[first].thread.join(self.timeout)
                self.discard(first)
                buffer = self._buffer(source, set())
            self._begin(source, buffer)
        resident = self.residents[source.name]
        reading = self._wait(resident, begun) if resident.thread is not None else None
        self.residents.move_to_end(source.name)
        return resident.weights, reading

    def discard(self, name: str) -> None:
        """Forget weights, as they may be wrong."""
        resident = self.residents.pop(name, None)
        if resident is not None:
            self.on_evict(name)
            if not resident.is_arriving:
                self.free.append(resident.buffer)

    def take_figures(self) -> dict[str, LoadFigures]:
        """Figures of each source since this was last asked."""
        figures, self.figures = self.figures, {}
        return figures

    def _begin(self, source: Source, buffer: Buffer) -> None:
        resident = Resident(source, buffer, {})
        if self.device.type == "cuda":
            resident.idle = torch.cuda.current_stream(self.device).record_event()
        resident.thread = threading.Thread(target=self._read, args=(resident,), daemon=True, name=f"read {source.name}")
        self.residents[source.name] = resident
        if source.in_background:
            resident.thread.start()
            _READERS.add(resident.thread)
        else:
            resident.thread.run()

    def _buffer(self, source: Source, keep: set[str]) -> Buffer | None:
        """Memory for a source: a free buffer, a new one, or that of the least recently used weights."""
        size = size_of(source.layout)
        if not self.free and len(self.residents) >= self.capacity:
            victim = next((name for name, resident in self.residents.items() if name not in keep and not resident.is_arriving), None)
            if victim is None:
                return None
            self.discard(victim)
        buffer = self.free.pop() if self.free else None
        if buffer is not None and len(buffer.device) >= size:
            return buffer
        del buffer
        host = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        return Buffer(torch.empty(size, dtype=torch.uint8, device=self.device) if self.device.type == "cuda" else host, host)

    def _read(self, resident: Resident) -> None:
        """In the thread: fill the buffer."""
        begun = time.monotonic()
        try:
            resident.outcome = resident.source.read(views(resident.buffer.host, resident.source.layout))
            if resident.buffer.device is not resident.buffer.host:
                stream = torch.cuda.Stream(self.device)
                stream.wait_event(resident.idle)
                with torch.cuda.stream(stream):
                    resident.buffer.device.copy_(resident.buffer.host, non_blocking=True)
                stream.synchronize()
            resident.weights = views(resident.buffer.device, resident.source.layout)
        except BaseException as error:  # whatever it is, it is raised where the weights are asked for
            resident.outcome = error
        resident.seconds = time.monotonic() - begun

    def _wait(self, resident: Resident, begun: float) -> Reading:
        if resident.is_arriving:
            resident.thread.join(self.timeout)
        waited = time.monotonic() - begun if resident.source.in_background else resident.seconds
        if resident.is_arriving:
            del self.residents[resident.source.name]  # with its buffer, which the thread may still write to
            raise TimeoutError(f"its weights were not read within {self.timeout:g} seconds")
        resident.thread = None
        if isinstance(resident.outcome, BaseException):
            self.discard(resident.source.name)
            raise resident.outcome
        figures = LoadFigures(1, resident.outcome.num_bytes, resident.seconds, waited)
        self.figures.setdefault(resident.source.name, LoadFigures()).add(figures)
        self.num_loads += 1
        return resident.outcome


@atexit.register
def _wait_for_readers() -> None:
    end = time.monotonic() + EXIT_SECONDS
    for thread in list(_READERS):
        thread.join(max(0.0, end - time.monotonic()))


def views(buffer: torch.Tensor, layout: Layout) -> Weights:
    """The weights of a layout as views of a buffer of bytes, one after another."""
    found, begin = {}, 0
    for name, (shape, dtype) in layout.items():
        found[name] = buffer[begin : begin + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        begin += _padded(shape, dtype)
    return found


def size_of(layout: Layout) -> int:
    """Bytes of a buffer that holds a layout."""
    return sum(_padded(shape, dtype) for shape, dtype in layout.values())


def _padded(shape: torch.Size, dtype: torch.dtype) -> int:
    return -(-shape.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
