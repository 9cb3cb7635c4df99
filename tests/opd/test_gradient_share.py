"""The sketch of a gradient: exact up to its size, unbiased beyond, however the vector is cut. What is measured on a model: tests/opd/test_update.py."""

import pytest
import torch

from opd.gradient_share import Sketch


def two_vectors(length: int, cosine: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two random vectors of about this cosine."""
    one, other = torch.randn(2, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return one.float(), (cosine * one + (1 - cosine**2) ** 0.5 * other).float()


def sketched(vector: torch.Tensor, size: int, pieces: int = 1) -> Sketch:
    sketch = Sketch(size)
    for piece in vector.chunk(pieces):
        sketch.add(piece)
    return sketch


def exact(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.cosine_similarity(one.double(), other.double(), dim=0))


@pytest.mark.parametrize("cosine", [-0.9, 0.0, 0.4, 1.0])
def test_a_cosine_is_exact_where_the_sketch_holds_the_vector(cosine):
    one, other = two_vectors(1000, cosine)
    assert sketched(one, 1024).cosine(sketched(other, 1024)) == pytest.approx(exact(one, other), abs=1e-6)


def test_a_sketch_does_not_depend_on_how_its_vector_is_cut():
    vector, _ = two_vectors(5000, 0.0)
    whole, cut = sketched(vector, 256), sketched(vector, 256, pieces=7)
    torch.testing.assert_close(whole.sums, cut.sums)
    assert whole.square == pytest.approx(cut.square)
    assert whole.square == pytest.approx(float(vector.double().square().sum()))


@pytest.mark.parametrize("cosine", [-0.7, 0.0, 0.5])
def test_beyond_its_size_a_cosine_has_the_stated_error(cosine):
    """Forty pairs, a sixteenth kept: their mean error is near 0 and its root mean square near sqrt((1 + c^2) / size)."""
    size, errors = 512, []
    for seed in range(40):
        one, other = two_vectors(16 * size, cosine, seed)
        errors.append(sketched(one, size).cosine(sketched(other, size)) - exact(one, other))
    error, bound = torch.tensor(errors), ((1 + cosine**2) / size) ** 0.5
    assert float(error.square().mean().sqrt()) < 1.35 * bound
    assert abs(float(error.mean())) < 4 * bound / 40**0.5


def test_a_vector_that_repeats_in_each_stretch_does_not_meet_itself():
    """Without the turning, two numbers in the same place of two stretches would meet every time: their error would not fall with the size."""
    size = 1024
    spike = torch.zeros(16 * size)
    spike[::size] = 1.0
    sign = torch.ones(16 * size)
    sign[8 * size :] = -1.0
    assert abs(sketched(spike, size).cosine(sketched(spike * sign, size))) < 0.2
