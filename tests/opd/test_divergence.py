"""The tiled losses against the naive formulas over a whole matrix of logits."""

import pytest
import torch
from torch.nn import functional

import opd.divergence
from opd.divergence import cross_entropy, reverse_kl

N, V, D_STUDENT, D_TEACHER, V_PADDED = 13, 29, 8, 12, 32
WEIGHT_N = torch.rand(N, generator=torch.Generator().manual_seed(9)) + 0.1


@pytest.fixture(params=[1, 4 * V, 1 << 23], ids=["one row a tile", "four rows a tile", "one tile"])
def tiles(request, monkeypatch) -> None:
    """13 rows in tiles of 1, of 4 (the last one of a single row), and all at once."""
    monkeypatch.setattr(opd.divergence, "TILE_ELEMENTS", request.param)


def tensors(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student's hidden states and head (both with gradients), teacher's hidden states and head; heads with padding rows of large numbers."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(N, D_STUDENT), (V_PADDED, D_STUDENT), (N, D_TEACHER), (V_PADDED, D_TEACHER)]
    hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD = [(scale * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]
    head_VD[V:], teacher_head_VD[V:] = 50.0, -50.0
    return hidden_ND.requires_grad_(), head_VD.requires_grad_(), teacher_hidden_ND, teacher_head_VD


def naive_kl(hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD) -> torch.Tensor:
    """sum_v p (log p - log q) in float64, with autograd."""
    log_p_NV = (hidden_ND.double() @ head_VD.double()[:V].T).log_softmax(-1)
    log_q_NV = (teacher_hidden_ND.double() @ teacher_head_VD.double()[:V].T).log_softmax(-1)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


def gradients(loss: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, tensors))


def test_reverse_kl_per_token_is_the_naive_formula(tiles):
    inputs = tensors()
    loss, losses = reverse_kl(*inputs, WEIGHT_N, V)
    expected_N = naive_kl(*inputs)
    torch.testing.assert_close(losses.loss_N.double(), expected_N, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.double(), (WEIGHT_N * expected_N).sum(), rtol=1e-5, atol=1e-6)


def test_reverse_kl_gradients_are_those_of_autograd_through_the_naive_formula(tiles):
    hidden_ND, head_VD, *teacher = tensors()
    loss, _ = reverse_kl(hidden_ND, head_VD, *teacher, WEIGHT_N, V)
    found = gradients(loss, hidden_ND, head_VD)
    expected = gradients((WEIGHT_N.double() * naive_kl(hidden_ND, head_VD, *teacher)).sum(), hidden_ND, head_VD)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_columns_beyond_the_vocabulary_never_count_and_get_no_gradient(tiles):
    hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD = tensors()
    loss, losses = reverse_kl(hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD, WEIGHT_N, V)
    _, other = reverse_kl(hidden_ND, head_VD[:V], teacher_hidden_ND, teacher_head_VD[:V], WEIGHT_N, V)
    (head_gradient_VD,) = gradients(loss, head_VD)
    assert torch.equal(losses.loss_N, other.loss_N)
    assert (head_gradient_VD[V:] == 0).all()
    assert (head_gradient_VD[:V] != 0).any(dim=1).all()


def test_entropies_are_those_of_the_two_distributions(tiles):
    hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD = tensors()
    _, losses = reverse_kl(hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD, WEIGHT_N, V)
    for found_N, hidden, head in [(losses.student_entropy_N, hidden_ND, head_VD), (losses.teacher_entropy_N, teacher_hidden_ND, teacher_head_VD)]:
        expected_N = torch.distributions.Categorical(logits=(hidden.double() @ head[:V].double().T)).entropy()
        torch.testing.assert_close(found_N.double(), expected_N, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_equal_to_the_student_gives_exactly_zero_loss_and_gradient(tiles, dtype):
    hidden_ND, head_VD, *_ = tensors(dtype)
    loss, losses = reverse_kl(hidden_ND, head_VD, hidden_ND.detach().clone(), head_VD.detach().clone(), WEIGHT_N, V)
    assert loss == 0
    assert (losses.loss_N == 0).all()
    assert all((gradient == 0).all() for gradient in gradients(loss, hidden_ND, head_VD))


@pytest.mark.parametrize("divergence", ["reverse_kl", "cross_entropy"])
def test_a_token_of_weight_zero_is_reported_and_moves_nothing(tiles, divergence):
    hidden_ND, head_VD, *teacher = tensors()
    weight_N = WEIGHT_N.clone()
    weight_N[3:7] = 0

    def loss_of(hidden_ND: torch.Tensor):
        if divergence == "reverse_kl":
            return reverse_kl(hidden_ND, head_VD, *teacher, weight_N, V)
        return cross_entropy(hidden_ND, head_VD, torch.arange(N), weight_N, V)

    loss, losses = loss_of(hidden_ND)
    hidden_gradient_ND, head_gradient_VD = gradients(loss, hidden_ND, head_VD)
    changed_ND = hidden_ND.detach().clone()
    changed_ND[3:7] += 1
    other, _ = loss_of(changed_ND.requires_grad_())
    assert (hidden_gradient_ND[3:7] == 0).all()
    assert (losses.loss_N[3:7] > 0).all()
    assert other == loss
    torch.testing.assert_close(gradients(other, head_VD)[0], head_gradient_VD, rtol=0, atol=1e-6)


def test_all_weights_zero_give_zero_loss_and_gradient(tiles):
    hidden_ND, head_VD, *teacher = tensors()
    loss, _ = reverse_kl(hidden_ND, head_VD, *teacher, torch.zeros(N), V)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, hidden_ND, head_VD))


def test_a_scaled_loss_has_scaled_gradients(tiles):
    hidden_ND, head_VD, *teacher = tensors()
    plain = gradients(reverse_kl(hidden_ND, head_VD, *teacher, WEIGHT_N, V)[0], hidden_ND, head_VD)
    scaled = gradients(-8.0 * reverse_kl(hidden_ND, head_VD, *teacher, WEIGHT_N, V)[0], hidden_ND, head_VD)
    assert all(torch.equal(-8.0 * one, other) for one, other in zip(plain, scaled, strict=True))


def test_cross_entropy_and_its_gradients_are_torchs(tiles):
    hidden_ND, head_VD, *_ = tensors()
    target_N = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
    loss, losses = cross_entropy(hidden_ND, head_VD, target_N, WEIGHT_N, V)
    expected_N = functional.cross_entropy(hidden_ND @ head_VD[:V].T, target_N, reduction="none")
    torch.testing.assert_close(losses.loss_N, expected_N.detach())
    for one, other in zip(gradients(loss, hidden_ND, head_VD), gradients((WEIGHT_N * expected_N).sum(), hidden_ND, head_VD), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert losses.teacher_entropy_N is None


def test_extreme_logits_stay_finite(tiles):
    inputs = tensors(scale=20.0)
    loss, losses = reverse_kl(*inputs, WEIGHT_N, V)
    assert losses.loss_N.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(loss, *inputs[:2]))
    torch.testing.assert_close(losses.loss_N.double(), naive_kl(*inputs), rtol=1e-4, atol=1e-3)
