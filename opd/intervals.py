"""Confidence intervals (95 %) of the figures that are reported."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

Z = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""
ONE_END = 0.025
"""Chance that is left at one end of an interval."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def proportion(successes: float, trials: float, z: float = Z) -> Interval:
    """A proportion with Wilson's score interval, which stays in [0, 1] and works near its ends; z: its half width in standard errors."""
    if trials == 0:
        raise ValueError("a proportion needs at least one trial")
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))  # rounding must not put p outside


def ratio(top: Interval, bottom: Interval) -> Interval | None:
    """top / bottom from two independent intervals (MOVER-R, Donner and Zou 2012); None where bottom may be 0."""
    if bottom.low <= 0:
        return None
    product = top.value * bottom.value
    low_root = product**2 - top.low * bottom.high * (2 * top.value - top.low) * (2 * bottom.value - bottom.high)
    high_root = product**2 - top.high * bottom.low * (2 * top.value - top.high) * (2 * bottom.value - bottom.low)
    low = (product - math.sqrt(max(0.0, low_root))) / (bottom.high * (2 * bottom.value - bottom.high))
    high = (product + math.sqrt(max(0.0, high_root))) / (bottom.low * (2 * bottom.value - bottom.low))
    return Interval(top.value / bottom.value, max(0.0, low), high)


def mean(total: float, total_of_squares: float, count: int) -> Interval:
    """A mean with its normal interval, from sums."""
    value = total / count
    variance = max(0.0, total_of_squares / count - value * value) * count / max(1, count - 1)
    half = Z * math.sqrt(variance / count)
    return Interval(value, value - half, value + half)


def mean_of_differences(differences: Sequence[float]) -> Interval:
    """A mean of differences in [-1, 1] with its normal interval, or that of n differences that are all alike where this is wider: few that differ among many
    say little of the spread. Of all prompts, a share of `unseen` may differ from those seen, by -1 or by 1.
    """
    found, share = mean(sum(differences), sum(difference**2 for difference in differences), len(differences)), unseen(len(differences))
    value = min(1.0, max(-1.0, found.value))
    return Interval(value, min(found.low, value - share * (value + 1)), max(found.high, value + share * (1 - value)))


def unseen(count: int) -> float:
    """The largest share of cases of which `count` draws show none by a chance of 2.5 % (Clopper and Pearson 1934)."""
    return 1 - ONE_END ** (1 / count)


def ratio_of_sums(count: float, below: float, above: float, below_squared: float, above_squared: float, product: float) -> Interval:
    """sum(above) / sum(below) with the linearised (delta-method) interval of a ratio of two sums over `count` pairs."""
    value = above / below
    residual = max(0.0, above_squared - 2 * value * product + value**2 * below_squared)
    mean_below = below / count
    spread = mean(0.0, residual, int(count))
    half = (spread.high - spread.value) / mean_below
    return Interval(value, value - half, value + half)


def clustered_proportion(means: Sequence[float], each: int) -> Interval:
    """A proportion from the means of clusters of `each` trials: Wilson's interval at the effective number of trials, which is that of the clusters where
    those of one are all alike, and of the trials where they are independent (Kish 1965; Korn and Graubard 1998).
    """
    count, p = len(means), sum(means) / len(means)
    if each == 1:
        return proportion(sum(means), count)
    spread = sum((value - p) ** 2 for value in means) / count
    trials = count if not 0 < p < 1 else count * each if not spread else min(count * each, max(count, count * p * (1 - p) / spread))
    return replace(proportion(p * trials, trials), value=p)  # which a division of the product would not give to the last bit


def pass_at(right: Sequence[int], samples: int, k: int) -> Interval:
    """The chance that one of k completions of a prompt is right, from so many right ones of `samples`: the unbiased estimate of each prompt (Chen et al.
    2021), its mean over the prompts, with the interval of clusters of as many trials as there are k completions: of k = 1 it is the accuracy's.
    """
    return clustered_proportion([1 - math.comb(samples - found, k) / math.comb(samples, k) for found in right], samples // k)
