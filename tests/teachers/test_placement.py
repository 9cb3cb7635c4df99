"""Where teachers are held: every plan fits into the memory it is given, and is the roomiest that does, by a search over all plans."""

import itertools

import pytest
import torch

from teachers.config import Placement, TeachersConfig
from teachers.placement import free_memory, plan_placement

GB = 10**9


def place(sizes: list[float], budget: float | None, ranks: int = 1, free: float = 0.0, **settings):
    """The plan for teachers of so many GB."""
    named = {f"t{number}": int(size * GB) for number, size in enumerate(sizes)}
    return plan_placement(named, TeachersConfig(memory_gb=budget, **settings), int(free * GB), ranks)


def roomiest(held: list[float], budget: float, prefetch: bool) -> tuple[int, int]:
    """(teachers that stay, buffers) by trying all: everything if it fits; else as many buffers of the largest as fit, one of them for the next if it can be."""
    if sum(held) <= budget:
        return len(held), len(held)
    buffers = max(number for number in range(1, len(held) + 1) if number * max(held) <= budget)
    return (buffers - 1, buffers) if prefetch and buffers > 1 else (buffers, buffers)


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("sizes", [[8], [8, 8], [8, 2, 2], [1] * 12, [7, 5, 3, 1]], ids=str)
@pytest.mark.parametrize("budget", [2, 8, 10, 12, 15, 16, 17, 24, 100])
def test_a_plan_is_the_roomiest_that_fits_its_memory(budget, sizes, ranks, prefetch):
    together = 2 if prefetch and len(sizes) > 1 else 1
    held = [size / ranks if ranks > 1 and together * size > budget else size for size in sizes]
    if max(held) > budget:
        with pytest.raises(ValueError, match="may be used for teachers: give them more with"):
            place(sizes, budget, ranks, prefetch=prefetch)
        return
    plan = place(sizes, budget, ranks, prefetch=prefetch)
    assert (plan.max_resident, plan.capacity) == roomiest(held, budget, prefetch)
    assert plan.sharded == {f"t{number}" for number, size in enumerate(sizes) if held[number] < size}
    assert sum(held) <= budget or plan.capacity * max(held) <= budget


@pytest.mark.parametrize(("placement", "sharded"), [(Placement.replicated, set()), (Placement.sharded, {"t0", "t1"}), (Placement.auto, {"t0"})])
def test_a_placement_that_is_asked_for_is_taken(placement, sharded):
    assert place([8, 2], 10, ranks=2, placement=placement).sharded == sharded


@pytest.mark.parametrize("max_resident", [1, 2, 3, 9])
@pytest.mark.parametrize("prefetch", [True, False])
def test_a_number_of_residents_that_is_asked_for_is_taken_with_one_more_buffer_for_the_next(max_resident, prefetch):
    plan = place([1, 1, 1], 2, max_resident=max_resident, prefetch=prefetch)
    assert plan.max_resident == min(max_resident, 3)
    assert plan.capacity == min(plan.max_resident + prefetch, 3)


def test_half_of_the_free_memory_is_used_unless_told_otherwise():
    assert place([8, 8], None, free=32).max_resident == 2
    assert place([8, 8], None, free=31).max_resident == 1
    assert place([8, 8], 16, free=0).max_resident == 2


def test_shards_need_several_ranks():
    with pytest.raises(ValueError, match=r"teachers\.placement=sharded needs several ranks"):
        place([1], 10, placement=Placement.sharded)


@pytest.mark.parametrize("max_resident", [0, -1])
def test_no_resident_teacher_is_refused(max_resident):
    with pytest.raises(ValueError, match=rf"teachers\.max_resident={max_resident} leaves no teacher in memory"):
        place([1, 1], 10, max_resident=max_resident)


@pytest.mark.parametrize(("ranks", "settings", "has_more_ranks"), [(1, {}, True), (2, {"placement": Placement.replicated}, False), (2, {}, True)])
def test_what_does_not_fit_is_refused_with_what_helps(ranks, settings, has_more_ranks):
    with pytest.raises(ValueError, match=r"takes .* GB of each rank and 3 GB may be used for teachers: give them more with teachers\.memory_gb") as refusal:
        place([8, 1], 3, ranks=ranks, **settings)
    assert ("or more ranks to share them" in str(refusal.value)) == has_more_ranks


@pytest.mark.parametrize(
    ("sizes", "budget", "ranks", "sentence"),
    [
        ([8], 10, 1, "teachers: 1 of 8 GB per rank, 8 GB in all, 10 GB may be used; all stay in memory"),
        ([8, 2], 20, 1, "teachers: 2 of 8 GB at most per rank, 10 GB in all, 20 GB may be used; all stay in memory"),
        ([4, 4, 4], 8, 1, "teachers: 3 of 4 GB at most per rank, 12 GB in all, 8 GB may be used; 1 in memory at a time, the next read while one scores"),
        ([4, 4, 4], 7, 1, "teachers: 3 of 4 GB at most per rank, 12 GB in all, 7 GB may be used; 1 in memory at a time"),
        ([8, 8, 2], 7, 2, "teachers: 3 of 4 GB at most per rank, 10 GB in all, 7 GB may be used; 2 sharded over the ranks; 1 in memory at a time"),
    ],
)
def test_the_choice_is_told_in_one_sentence(sizes, budget, ranks, sentence):
    assert place(sizes, budget, ranks).description == sentence


def test_the_machines_memory_is_divided_among_its_processes():
    whole, half = free_memory(torch.device("cpu"), 1), free_memory(torch.device("cpu"), 2)
    assert half == pytest.approx(whole / 2, rel=0.2)  # other processes take and give back meanwhile


def test_more_memory_never_holds_fewer_teachers():
    for sizes, prefetch in itertools.product(([3, 3, 3, 3], [5, 1, 1, 1], [2, 3, 4]), (True, False)):
        residents = [place(sizes, budget, prefetch=prefetch).capacity for budget in range(max(sizes), 20)]
        assert residents == sorted(residents)
