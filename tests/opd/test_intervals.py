"""Confidence intervals: known values, ends of the range, and coverage by simulation."""

import itertools
import math
import random
from itertools import pairwise

import pytest

from opd.intervals import clustered_proportion, mean, mean_of_differences, pass_at, proportion, ratio


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Wilson's score interval without continuity correction, e.g. Newcombe (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_the_interval_of_a_proportion_has_wilsons_values(successes, trials, low, high):
    interval = proportion(successes, trials)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=6e-5)
    assert interval.value == successes / trials


@pytest.mark.parametrize("trials", [1, 10, 10000])
@pytest.mark.parametrize("share", [0, 1])
def test_a_proportion_of_none_or_all_keeps_a_one_sided_interval_inside_zero_and_one(trials, share):
    interval = proportion(share * trials, trials)
    assert 0.0 <= interval.low <= interval.value <= interval.high <= 1.0
    assert interval.high - interval.low > 0


def test_a_proportion_needs_a_trial():
    with pytest.raises(ValueError, match="at least one trial"):
        proportion(0, 0)


def coverage(top_share: float, bottom_share: float, trials: int) -> float:
    """Share of 2000 simulated pairs of experiments whose interval contains the true ratio."""
    rng, found = random.Random(0), 0
    for _ in range(2000):
        top, bottom = (sum(rng.random() < share for _ in range(trials)) for share in (top_share, bottom_share))
        interval = ratio(proportion(top, trials), proportion(bottom, trials))
        found += interval is not None and interval.low <= top_share / bottom_share <= interval.high
    return found / 2000


@pytest.mark.parametrize(("top", "bottom"), [(0.5, 0.9), (0.9, 0.95), (0.2, 0.3)])
def test_the_interval_of_a_ratio_covers_the_true_ratio_as_often_as_it_says(top, bottom):
    assert 0.93 <= coverage(top, bottom, trials=120) <= 0.985


@pytest.mark.parametrize(("top", "bottom"), [((60, 120), (108, 120)), ((12, 40), (30, 40)), ((99, 100), (50, 100))])
def test_the_ends_of_a_ratios_interval_solve_the_equations_of_their_definition(top, bottom):
    """At the low end r: (p - r q)^2 = (p - low p)^2 + r^2 (high q - q)^2, and mirrored at the high end (Donner and Zou 2012, eq. 9)."""
    one, other = proportion(*top), proportion(*bottom)
    found = ratio(one, other)
    for end, above, below in [(found.low, one.value - one.low, other.high - other.value), (found.high, one.high - one.value, other.value - other.low)]:
        assert (one.value - end * other.value) ** 2 == pytest.approx(above**2 + end**2 * below**2)
    assert found.low < found.value == one.value / other.value < found.high


def test_a_ratio_of_two_perfect_proportions_is_one_with_an_interval_around_it():
    interval = ratio(proportion(50, 50), proportion(50, 50))
    assert interval.value == 1.0
    assert interval.low < 1.0 < interval.high


def test_a_ratio_over_a_proportion_that_may_be_zero_is_undefined():
    assert ratio(proportion(5, 10), proportion(0, 10)) is None


def test_a_ratio_with_nothing_on_top_begins_at_zero():
    interval = ratio(proportion(0, 100), proportion(80, 100))
    assert (interval.value, interval.low) == (0.0, 0.0)
    assert 0.0 < interval.high < 0.1


def test_a_mean_from_sums_is_the_textbook_normal_interval():
    values = [1.0, 2.5, 4.0, 4.0, 7.5]
    centre = sum(values) / 5
    deviation = math.sqrt(sum((value - centre) ** 2 for value in values) / 4)
    interval = mean(sum(values), sum(value**2 for value in values), 5)
    assert interval.value == pytest.approx(centre)
    assert interval.high - interval.value == pytest.approx(1.959964 * deviation / math.sqrt(5))
    assert interval.value - interval.low == pytest.approx(interval.high - interval.value)


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0, 2.0]])
def test_a_mean_without_spread_has_an_interval_of_no_width(values):
    interval = mean(sum(values), sum(value**2 for value in values), len(values))
    assert (interval.low, interval.high) == pytest.approx((interval.value, interval.value), abs=1e-6)


@pytest.mark.parametrize("count", [1, 2, 5, 256])
@pytest.mark.parametrize("value", [-1.0, 0.0, 0.25, 1.0])
def test_differences_that_are_all_alike_leave_room_for_as_many_others_as_may_have_been_missed(value, count):
    found = mean_of_differences([value] * count)
    below, above = ((found.value - found.low) / (value + 1) if value > -1 else None), ((found.high - found.value) / (1 - value) if value < 1 else None)
    shares = [share for share in (below, above) if share is not None]
    assert [(1 - share) ** count for share in shares] == pytest.approx([0.025] * len(shares)), "of so many others, none is seen by a chance of 2.5 %"
    assert -1 <= found.low <= found.value == value <= found.high <= 1
    assert found.low < found.high


def test_differences_that_rounding_alone_tells_apart_are_alike():
    alike, rounded = mean_of_differences([1 / 3] * 4), mean_of_differences([1 / 3, 2 / 3 - 1 / 3, 1 - 2 / 3, 1 / 3])
    assert len({1 / 3, 1 - 2 / 3}) == 2
    assert (rounded.low, rounded.high) == pytest.approx((alike.low, alike.high))


def test_differences_that_differ_have_the_normal_interval():
    values = [1.0, 0.0, 0.0, -1.0, 0.5]
    assert mean_of_differences(values) == mean(sum(values), sum(value**2 for value in values), 5)


@pytest.mark.parametrize("count", [16, 256, 1024])
def test_each_prompt_that_is_lost_lowers_the_mean_and_its_lower_end(count):
    found = [mean_of_differences([-1.0] * lost + [0.0] * (count - lost)) for lost in range(5)]
    assert all(after.low < before.low and after.value < before.value for before, after in pairwise(found))


def test_pass_at_k_is_the_mean_over_all_draws_of_k_completions():
    right, samples = [0, 1, 3, 4], 4
    for k in (1, 2, 4):
        chances = []
        for found in right:
            draws = list(itertools.combinations([True] * found + [False] * (samples - found), k))
            chances.append(sum(any(draw) for draw in draws) / len(draws))
        assert pass_at(right, samples, k).value == pytest.approx(sum(chances) / len(chances))


def test_pass_at_1_is_the_accuracy_with_its_interval():
    assert pass_at([0, 1, 3, 4], 4, 1) == clustered_proportion([0.0, 0.25, 0.75, 1.0], 4)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_the_interval_of_pass_at_k_covers_in_simulation(k):
    generator, covered = random.Random(k), 0
    true = (1 - 0.9**k + 1 - 0.5**k) / 2
    for _ in range(400):
        right = [sum(generator.random() < chance for _ in range(6)) for chance in generator.choices([0.1, 0.5], k=60)]
        found = pass_at(right, 6, k)
        covered += found.low <= true <= found.high
    assert covered / 400 >= 0.92


def test_clustered_trials_count_for_as_much_as_they_differ():
    alike, unlike = [0.0, 1.0] * 20, [0.5] * 40
    assert clustered_proportion(alike, 8) == proportion(20, 40)
    assert clustered_proportion(unlike, 8) == proportion(160, 320)
    assert clustered_proportion([1.0] * 40, 8) == proportion(40, 40)  # all right tells nothing of how alike they are
    assert clustered_proportion(alike, 1) == proportion(20, 40)


def test_the_clustered_interval_covers_in_simulation():
    generator, covered = random.Random(0), 0
    for _ in range(400):
        chances = [generator.choice([0.1, 0.9]) for _ in range(60)]
        means = [sum(generator.random() < chance for _ in range(6)) / 6 for chance in chances]
        found = clustered_proportion(means, 6)
        covered += found.low <= 0.5 <= found.high
    assert 0.92 <= covered / 400 <= 0.98
