"""Counter-based sampling: the numbers are uniform, keyed, and read off the distribution exactly."""

import functools
import math

import pytest
import torch

from rollout.config import SamplingConfig
from rollout.sampling import draw as draw_with
from rollout.sampling import uniform

MASK = (1 << 64) - 1


def draw(logits, numbers, temperature, **truncation):
    return draw_with(logits, numbers, SamplingConfig(temperature=temperature, **truncation))


def splitmix(value: int) -> int:
    """The finaliser of SplitMix64 on Python's unbounded integers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def uniform_of_one_key(seed: int, request: int, position: int) -> float:
    state = splitmix((request + 0x9E3779B97F4A7C15 * (seed + 1)) & MASK)
    state = splitmix((state + 0xD1B54A32D192ED03 * (position + 1)) & MASK)
    return (splitmix(state) >> 11) / 2**53


COUNT = 3000


@functools.cache
def numbers_along(axis: str) -> torch.Tensor:
    """Numbers whose keys differ in one part only."""
    count = COUNT
    if axis == "request":
        return uniform(7, torch.arange(count) << 16, 30)
    if axis == "sample":
        return uniform(7, (torch.tensor(12) << 16) + torch.arange(count), 30)
    if axis == "position":
        return torch.cat([uniform(7, torch.tensor([12 << 16]), position) for position in range(count)])
    return torch.cat([uniform(seed, torch.tensor([12 << 16]), 30) for seed in range(count)])


AXES = ("request", "sample", "position", "seed")


@pytest.mark.parametrize("axis", AXES)
def test_numbers_along_each_part_of_the_key_are_uniform(axis):
    ordered = numbers_along(axis).sort().values
    above = (torch.arange(1, COUNT + 1) / COUNT - ordered).max()
    below = (ordered - torch.arange(COUNT) / COUNT).max()
    assert max(above, below) < 1.95 / math.sqrt(COUNT)  # Kolmogorov-Smirnov at p = 0.001


@pytest.mark.parametrize("axis", AXES)
def test_numbers_of_neighbouring_keys_are_independent(axis):
    numbers = numbers_along(axis)
    cells = (numbers[:-1] * 8).long() * 8 + (numbers[1:] * 8).long()
    counts = torch.bincount(cells, minlength=64)
    expected = (COUNT - 1) / 64
    assert ((counts - expected) ** 2 / expected).sum() < 103.4  # chi-square with 63 degrees of freedom at p = 0.001


def test_different_keys_give_different_numbers():
    numbers = torch.cat([uniform(seed, (torch.arange(20) << 16) + sample, position) for seed in range(3) for sample in range(3) for position in range(20)])
    assert len(numbers.unique()) == 3 * 3 * 20 * 20


def test_numbers_equal_the_same_hash_in_unbounded_integers():
    keys = [(seed, request, position) for seed in (0, 1, 123456789) for request in (0, 1, 65536, (1 << 56) + 3) for position in (0, 1, 100000)]
    for seed, request, position in keys:
        assert uniform(seed, torch.tensor([request]), position).item() == uniform_of_one_key(seed, request, position)


def test_a_number_does_not_depend_on_the_rest_of_the_batch():
    requests = torch.arange(50) << 16
    alone = torch.cat([uniform(3, requests[row : row + 1], 17) for row in range(50)])
    assert torch.equal(uniform(3, requests, 17), alone)


def test_numbers_are_at_least_zero_and_below_one():
    numbers = uniform(0, torch.arange(20000), 0)
    assert numbers.dtype == torch.float64
    assert numbers.min() >= 0
    assert numbers.max() < 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_occur_as_often_as_the_softmax_says(temperature):
    logits = torch.randn(11, generator=torch.Generator().manual_seed(0)) * 2
    count = 10000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, _ = draw(logits.expand(count, -1), grid, temperature)
    expected = torch.softmax(logits.double() / temperature, dim=0) * count
    assert (torch.bincount(tokens, minlength=11) - expected).abs().max() <= 1  # an even grid of numbers hits each share to one number


def test_keyed_draws_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    count = 20000
    tokens, _ = draw(logits.expand(count, -1), uniform(5, torch.arange(count) << 16, 40), 1.0)
    expected = torch.softmax(logits, dim=0) * count
    assert ((torch.bincount(tokens, minlength=4) - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_the_log_probability_is_that_of_the_drawn_token_at_the_temperature(temperature):
    logits = torch.randn(200, 30, generator=torch.Generator().manual_seed(1)) * 3
    tokens, logprobs = draw(logits, uniform(0, torch.arange(200), 0), temperature)
    weights = (logits.double() / temperature).exp()
    expected = (weights / weights.sum(1, keepdim=True)).log()[torch.arange(200), tokens]
    assert logprobs.dtype == torch.float32
    assert torch.allclose(logprobs.double(), expected, atol=2e-6, rtol=1e-6)


def test_temperature_zero_takes_the_most_likely_token_whatever_the_number():
    logits = torch.randn(100, 30, generator=torch.Generator().manual_seed(2))
    for number in (0.0, 0.5, 1 - 2.0**-53):
        tokens, logprobs = draw(logits, torch.full((100,), number, dtype=torch.float64), 0.0)
        assert tokens.tolist() == [max(range(30), key=row.tolist().__getitem__) for row in logits]
        assert torch.allclose(logprobs, logits.log_softmax(1).max(1).values)


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([-math.inf, -1e4, 3.0, -1e4, 3.0, -1e4, -math.inf])
    numbers = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    tokens, logprobs = draw(logits.expand(4, -1), numbers, 1.0)
    assert tokens.tolist() == [2, 2, 4, 4]
    assert torch.allclose(logprobs, torch.full((4,), math.log(0.5)))


def test_large_logits_do_not_overflow():
    tokens, logprobs = draw(torch.tensor([[3e4, -3e4, 3e4 - 1]]), torch.tensor([0.9], dtype=torch.float64), 1.0)
    assert tokens.item() == 2  # shares 0.731, 0, 0.269
    assert logprobs.item() == pytest.approx(math.log(1 / (1 + math.e)), abs=1e-6)


def test_half_precision_logits_are_drawn_in_float32():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(3)).bfloat16()
    numbers = uniform(0, torch.arange(64), 0)
    for low, full in zip(draw(logits, numbers, 1.0), draw(logits.float(), numbers, 1.0), strict=True):
        assert torch.equal(low, full)


def kept_by_definition(probabilities: list[float], top_p: float, top_k: int | None, min_p: float) -> set[int]:
    """min_p, then top_k, then top_p of what is left, token by token."""
    order = sorted(range(len(probabilities)), key=lambda token: (-probabilities[token], token))
    order = [token for token in order if probabilities[token] >= min_p * probabilities[order[0]]][:top_k]
    total, mass, kept = sum(probabilities[token] for token in order), 0.0, set()
    for token in order:
        if mass >= top_p:
            break
        kept.add(token)
        mass += probabilities[token] / total
    return kept


@pytest.mark.parametrize("truncation", [{"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.2}, {"top_p": 0.6, "top_k": 8, "min_p": 0.05}, {"top_p": 1e-9}])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_truncated_draws_follow_the_distribution_that_is_left(truncation, temperature):
    logits = torch.randn(23, generator=torch.Generator().manual_seed(4)) * 2
    probabilities = torch.softmax(logits.double() / temperature, dim=0)
    kept = kept_by_definition(probabilities.tolist(), **({"top_p": 1.0, "top_k": None, "min_p": 0.0} | truncation))
    count = 5000
    tokens, logprobs = draw(logits.expand(count, -1), (torch.arange(count, dtype=torch.float64) + 0.5) / count, temperature, **truncation)
    left = torch.zeros(23, dtype=torch.float64)
    left[list(kept)] = probabilities[list(kept)] / probabilities[list(kept)].sum()
    assert set(tokens.tolist()) == kept
    assert (torch.bincount(tokens, minlength=23) - left * count).abs().max() <= 1
    assert torch.allclose(logprobs.double().exp(), left[tokens], atol=1e-6)
