"""Confidence intervals (95 %) of the figures that are reported."""

import math
from dataclasses import dataclass

Z = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def proportion(successes: float, trials: int, z: float = Z) -> Interval:
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
