"""The recovery certificate: its inequality on distributions that are small enough to sum over, its floor, and what counts as a contradiction."""

import math

import pytest
import torch

from opd.certificate import accuracy_floor, binary_kl, certify
from opd.intervals import Interval, proportion


def test_no_event_tells_two_distributions_better_apart_than_their_outcomes():
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        ours_N, theirs_N = (torch.randn(2, 40, generator=generator, dtype=torch.float64) * 2).softmax(-1)
        kl = float((ours_N * (ours_N / theirs_N).log()).sum())
        accepted_N = torch.rand(40, generator=generator) < 0.5
        ours, theirs = float(ours_N[accepted_N].sum()), float(theirs_N[accepted_N].sum())
        assert binary_kl(ours, theirs) <= kl + 1e-12
        assert accuracy_floor(theirs, kl) <= ours + 1e-9


@pytest.mark.parametrize("teacher", [0.02, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("kl", [1e-4, 0.01, 0.3, 5.0])
def test_the_floor_is_the_smallest_accuracy_that_is_not_too_far(teacher, kl):
    grid = [step / 100_000 for step in range(100_001)]

    def coins(p: float, q: float) -> float:
        return sum(0.0 if one == 0 else math.inf if other == 0 else one * math.log(one / other) for one, other in ((p, q), (1 - p, 1 - q)))

    assert accuracy_floor(teacher, kl) == pytest.approx(min(p for p in grid if coins(p, teacher) <= kl), abs=1e-5)


@pytest.mark.parametrize(("teacher", "kl"), [(0.8, 0.0048), (0.9, 0.01), (0.95, 0.0188), (0.98, 0.0377), (0.99, 0.0579), (0.995, 0.0826)])
def test_95_percent_of_a_teacher_need_so_small_a_divergence(teacher, kl):
    """Solved for by hand."""
    assert accuracy_floor(teacher, kl) == pytest.approx(0.95 * teacher, rel=2e-3)


def test_without_a_divergence_the_floor_is_the_teacher():
    assert accuracy_floor(0.9, 0.0) == accuracy_floor(0.9, -1e-9) == 0.9


def certificate(student: float, teacher: float, kl: float, error: float = 0.001, prompts: int = 1000):
    return certify(proportion(student * prompts, prompts), proportion(teacher * prompts, prompts), prompts, Interval(kl, kl - 1.96 * error, kl + 1.96 * error))


@pytest.mark.parametrize(
    ("student", "teacher", "kl", "holds"),
    [(0.99, 0.99, 0.01, True), (0.98, 0.99, 0.0, True), (0.5, 0.99, 0.01, False), (0.9, 0.3, 0.01, False), (0.5, 0.99, 3.0, True), (1.0, 1.0, 0.0, True)],
)
def test_what_the_errors_do_not_explain_is_a_contradiction(student, teacher, kl, holds):
    assert certificate(student, teacher, kl).holds is holds


def test_with_more_prompts_a_smaller_difference_is_one():
    assert certificate(0.95, 0.97, 1e-6, prompts=1000).holds
    assert not certificate(0.95, 0.97, 1e-6, error=1e-7, prompts=100_000).holds


def test_the_low_end_takes_the_worse_end_of_both_intervals_and_the_share_is_of_the_teacher():
    found = certificate(0.98, 0.99, 0.05, error=0.01)
    assert found.low == accuracy_floor(proportion(990, 1000).low, 0.05 + 1.96 * 0.01) < found.floor
    assert found.share == found.low / 0.99
    assert certificate(0.0, 0.0, 0.05).share is None


def test_a_teacher_that_was_never_seen_to_fail_does_not_guarantee_everything():
    """But more than one that failed once."""
    assert 0.8 < certificate(1.0, 0.999, 0.5).floor < certificate(1.0, 1.0, 0.5).floor < 0.95
    assert certificate(0.0, 1.0, 30.0).floor == 0.0
