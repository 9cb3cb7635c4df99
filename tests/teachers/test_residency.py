"""Residency: a fixed number of buffers whatever is asked for, nothing overwritten that is in use or wanted, no harm to others from a reading that fails."""

import itertools
import subprocess
import sys
import threading
from dataclasses import dataclass, field

import pytest
import torch

from teachers.checkpoint_reader import Reading
from teachers.residency import ALIGNMENT, Layout, Residency, Weights, size_of, views

CPU = torch.device("cpu")


@dataclass
class Numbers:
    """A source whose one weight is its value, over and over; it reads when `may_read` is set, and raises what stands in `errors` first."""

    name: str
    value: float
    size: int = 100
    in_background: bool = True
    may_read: threading.Event = field(default_factory=threading.Event)
    errors: list[Exception] = field(default_factory=list)
    num_reads: int = 0

    def __post_init__(self):
        self.may_read.set()

    @property
    def layout(self) -> Layout:
        return {"weight": (torch.Size([self.size]), torch.float32)}

    def read(self, weights: Weights) -> Reading:
        self.num_reads += 1
        self.may_read.wait()
        if self.errors:
            raise self.errors.pop(0)
        weights["weight"].fill_(self.value)
        return Reading(num_bytes=weights["weight"].nbytes)


def sources(count: int, **settings) -> list[Numbers]:
    return [Numbers(f"source {number}", float(number), **settings) for number in range(count)]


def is_own(source: Numbers, weights: Weights) -> bool:
    return bool((weights["weight"] == source.value).all()) and len(weights["weight"]) == source.size


def memory(residency: Residency) -> set[int]:
    """Addresses of all buffers."""
    buffers = [resident.buffer for resident in residency.residents.values()] + residency.free
    return {buffer.device.data_ptr() for buffer in buffers}


def arrive(residency: Residency, source: Numbers) -> None:
    residency.residents[source.name].thread.join()


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_however_much_is_fetched_and_prefetched_there_are_at_most_capacity_buffers(capacity):
    residency, all_of_them, seen = Residency(capacity, CPU, 10.0), sources(5), set()
    order = torch.randint(5, (60,), generator=torch.Generator().manual_seed(capacity)).tolist()
    for now, following in itertools.pairwise(order):
        weights, _ = residency.fetch(all_of_them[now], {all_of_them[following].name})
        residency.prefetch(all_of_them[following], {all_of_them[now].name})
        assert is_own(all_of_them[now], weights)
        seen |= memory(residency)
        assert len(residency.residents) + len(residency.free) <= capacity
    assert len(seen) == capacity, "memory was taken anew though no source is larger than another"


def test_prefetched_weights_are_used_without_another_reading():
    residency, (one, other) = Residency(2, CPU, 10.0), sources(2)
    residency.fetch(one)
    residency.prefetch(other, {one.name})
    weights, reading = residency.fetch(other)
    assert is_own(other, weights)
    assert reading.num_bytes == 400
    assert other.num_reads == 1
    assert residency.fetch(other) == (weights, None)
    assert residency.num_loads == 2


def test_what_is_prefetched_twice_is_read_once():
    residency, (one, other) = Residency(2, CPU, 10.0), sources(2)
    residency.fetch(one)
    for _ in range(3):
        residency.prefetch(other, {one.name})
    residency.fetch(other)
    assert other.num_reads == 1


def test_weights_that_are_at_work_or_still_wanted_are_not_overwritten_by_a_prefetch():
    residency, (active, wanted, unwanted, new, newer) = Residency(3, CPU, 10.0), sources(5)
    for source in (unwanted, wanted, active):
        residency.fetch(source)
    weights = residency.fetch(active)[0]
    residency.prefetch(new, {active.name, wanted.name, new.name})
    residency.prefetch(newer, {active.name, wanted.name, new.name, newer.name})  # no buffer is left for this one
    arrive(residency, new)
    assert set(residency.names()) == {active.name, wanted.name, new.name}
    assert is_own(active, weights)
    assert is_own(wanted, residency.fetch(wanted)[0])
    assert newer.num_reads == 0


def test_a_fetch_keeps_what_is_wanted_if_it_can_and_takes_the_least_recently_used_if_not():
    residency, (oldest, newest, wanted, other) = Residency(2, CPU, 10.0), sources(4)
    residency.fetch(oldest)
    residency.fetch(newest)
    residency.fetch(wanted, {oldest.name})
    assert residency.names() == [oldest.name, wanted.name]
    residency.fetch(other, {oldest.name, wanted.name})
    assert residency.names() == [wanted.name, other.name]


def test_whose_memory_is_overwritten_is_told_before_it_happens():
    told: list[tuple[str, bool]] = []
    residency, (one, other) = Residency(1, CPU, 10.0), sources(2)
    weights, _ = residency.fetch(one)
    residency.on_evict = lambda name: told.append((name, is_own(one, weights)))
    residency.fetch(other)
    assert told == [(one.name, True)]
    assert is_own(other, weights | {"weight": weights["weight"]})


def test_a_buffer_that_is_too_small_gives_way_to_a_larger_one_which_smaller_ones_use():
    residency, small, large = Residency(1, CPU, 10.0), Numbers("small", 1.0, size=10), Numbers("large", 2.0, size=1000)
    residency.fetch(small)
    assert is_own(large, residency.fetch(large)[0])
    [first] = memory(residency)
    assert is_own(small, residency.fetch(small)[0])
    assert is_own(large, residency.fetch(large)[0])
    assert memory(residency) == {first}


@pytest.mark.parametrize("in_background", [True, False])
def test_an_error_of_reading_is_raised_where_the_weights_are_asked_for_and_the_next_attempt_reads_anew(in_background):
    residency = Residency(1, CPU, 10.0)
    source = Numbers("faulty", 1.0, in_background=in_background, errors=[OSError("stale file handle")])
    with pytest.raises(OSError, match="stale file handle"):
        residency.fetch(source)
    assert source.name not in residency
    assert is_own(source, residency.fetch(source)[0])
    assert residency.take_figures()[source.name].loads == 1


def test_an_error_in_the_background_waits_for_who_asks_for_those_weights():
    residency, (good, faulty) = Residency(2, CPU, 10.0), sources(2)
    faulty.errors = [OSError("stale file handle")]
    residency.fetch(good)
    residency.prefetch(faulty, {good.name})
    arrive(residency, faulty)
    assert is_own(good, residency.fetch(good)[0])
    with pytest.raises(OSError, match="stale file handle"):
        residency.fetch(faulty)


def test_a_background_reading_that_fails_is_not_the_failure_of_weights_that_need_its_buffer():
    residency, (faulty, wanted) = Residency(1, CPU, 10.0), sources(2)
    faulty.errors = [OSError("stale file handle")]
    faulty.may_read.clear()
    residency.prefetch(faulty, set())
    threading.Timer(0.05, faulty.may_read.set).start()
    assert is_own(wanted, residency.fetch(wanted)[0])


def test_a_prefetch_that_nobody_uses_makes_room_for_what_is_asked_for():
    residency, (unused, wanted, other) = Residency(1, CPU, 10.0), sources(3)
    residency.prefetch(unused, set())
    assert is_own(wanted, residency.fetch(wanted)[0])
    assert is_own(other, residency.fetch(other)[0])
    assert residency.num_loads == 2


def test_a_reading_that_hangs_is_given_up_after_the_timeout_and_what_it_writes_later_harms_nothing():
    residency, (hanging, other) = Residency(1, CPU, 0.2), sources(2)
    hanging.may_read.clear()
    with pytest.raises(TimeoutError, match=r"its weights were not read within 0\.2 seconds"):
        residency.fetch(hanging)
    reader = next(thread for thread in threading.enumerate() if thread.name == "read source 0")
    weights, _ = residency.fetch(other)
    hanging.may_read.set()
    reader.join()
    assert is_own(other, weights)
    assert is_own(hanging, residency.fetch(hanging)[0])


def test_a_prefetch_that_hangs_is_no_hindrance_to_others_in_the_one_buffer():
    residency, (hanging, wanted) = Residency(1, CPU, 0.2), sources(2)
    hanging.may_read.clear()
    residency.prefetch(hanging, set())
    try:
        assert is_own(wanted, residency.fetch(wanted)[0])
    finally:
        hanging.may_read.set()


def test_a_slow_reading_is_waited_for_and_counted_as_waiting():
    residency, (slow, other) = Residency(2, CPU, 10.0), sources(2)
    slow.may_read.clear()
    threading.Timer(0.2, slow.may_read.set).start()
    assert is_own(slow, residency.fetch(slow)[0])
    residency.prefetch(other, {slow.name})
    arrive(residency, other)
    residency.fetch(other)
    figures = residency.take_figures()
    assert figures[slow.name].waited == pytest.approx(figures[slow.name].seconds, abs=0.1)
    assert figures[slow.name].seconds > 0.15
    assert figures[other.name].waited < 0.1
    assert residency.take_figures() == {}


def test_discarded_weights_are_read_again():
    residency, (source,) = Residency(1, CPU, 10.0), sources(1)
    residency.fetch(source)
    residency.discard(source.name)
    residency.discard("what is not there")
    assert residency.fetch(source)[1] is not None
    assert source.num_reads == 2


def test_weights_that_arrive_when_they_are_discarded_do_not_share_their_memory():
    residency, (late, other) = Residency(1, CPU, 10.0), sources(2)
    late.may_read.clear()
    residency.prefetch(late, set())
    reader = residency.residents[late.name].thread
    residency.discard(late.name)
    weights, _ = residency.fetch(other)
    late.may_read.set()
    reader.join()
    assert is_own(other, weights)


def test_a_source_that_cannot_be_read_in_the_background_is_never_prefetched():
    residency, source = Residency(1, CPU, 10.0), Numbers("foreground", 1.0, in_background=False)
    residency.prefetch(source, set())
    assert source.num_reads == 0
    assert is_own(source, residency.fetch(source)[0])
    figures = residency.take_figures()[source.name]
    assert figures.waited == figures.seconds


def test_weights_of_a_layout_are_aligned_apart_and_exactly_as_large_as_said():
    layout = {"a": (torch.Size([3, 5]), torch.bfloat16), "b": (torch.Size([]), torch.float32), "c": (torch.Size([0, 4]), torch.float32)}
    layout |= {"d": (torch.Size([70]), torch.int64)}
    buffer = torch.zeros(size_of(layout), dtype=torch.uint8)
    found = views(buffer, layout)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == layout
    assert all((tensor.data_ptr() - buffer.data_ptr()) % ALIGNMENT == 0 for tensor in found.values() if tensor.numel())
    for value, tensor in enumerate(found.values(), start=1):
        tensor.fill_(value)
    assert all((tensor == value).all() for value, tensor in enumerate(found.values(), start=1))


@pytest.mark.slow
def test_a_process_that_ends_while_weights_are_read_ends_with_its_own_exit_code(tmp_path):
    """A thread that is cut off inside torch would abort it (SIGABRT)."""
    script = f"""
import sys
import torch
from safetensors.torch import save_file
from teachers.checkpoint_reader import CheckpointMap, Piece, Rows
from teachers.residency import Residency

file = {str(tmp_path / "weights.safetensors")!r}
save_file({{"w": torch.zeros(1 << 24)}}, file)
place = dict(weight="w", size=(1 << 24,), stride=(1,), offset=0, first_row=0, num_rows=1 << 24)

class Slow:
    name, in_background, layout = "slow", True, {{"w": (torch.Size([1 << 24]), torch.float32)}}

    def read(self, weights):
        for _ in range(8):
            reading = CheckpointMap((Piece(stored="w", file=file, **place),)).read({{"w": Rows(weights["w"])}})
        return reading

Residency(2, torch.device("cpu"), 60.0).prefetch(Slow(), set())
sys.exit(3)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 3, result.stderr[-500:]
