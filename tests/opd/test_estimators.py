"""The losses of thin signal against their formulas in float64, and why the two shortcuts that opd/estimators.py refuses are wrong."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import opd.tiles
from opd.divergence import ModelStates, divergence
from opd.estimators import SMALLEST_TAIL, SampledToken, TopK, cross_entropy, distillation_loss, policy_gradient, top_k_divergence
from opd.loss_config import Backend, DivergenceKind, LossConfig
from opd.tiles import Targets
from rollout.types import IDENTITY, LogitTransform

N, V, V_PADDED, D, K = 13, 53, 60, 8, 6
WEIGHT_N = torch.rand(N, generator=torch.Generator().manual_seed(9)) + 0.1
SOFTCAP = LogitTransform(0.8, 3.0)


@pytest.fixture(params=[(1, 8192), (4 * V, 20), (1 << 23, 1), (1 << 23, 8192)], ids=["rows", "rows and blocks", "columns", "all"])
def tiles(request, monkeypatch) -> None:
    """Tiles of one row; of four rows (the last of one) in blocks of 20, 20 and 13 columns; blocks of one column; everything at once."""
    monkeypatch.setitem(opd.tiles.TILE_ELEMENTS, "cpu", request.param[0])
    monkeypatch.setattr(opd.tiles, "BLOCK_COLUMNS", request.param[1])


def draw(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def student_states(dtype: torch.dtype = torch.float32, transform: LogitTransform = IDENTITY) -> ModelStates:
    """Logits N(0, 4); the head's padding rows hold large numbers."""
    head_VD = draw((V_PADDED, D), 1, 2 * D**-0.5)
    head_VD[V:] = 1e4
    return ModelStates(draw((N, D), 0).to(dtype).requires_grad_(), head_VD.to(dtype).requires_grad_(), transform)


def teacher_states() -> ModelStates:
    return ModelStates(draw((N, D), 2), draw((V, D), 3, 2 * D**-0.5))


def exact_log_p(student: ModelStates) -> tuple[list[Tensor], Tensor]:
    """(hidden states and head in float64 with gradients, log-probabilities made of them)."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (student.hidden_ND, student.head_VD)]
    logits_NV = leaves[0] @ leaves[1][:V].T
    if student.transform.softcap is not None:
        logits_NV = student.transform.softcap * torch.tanh(student.transform.scale * logits_NV / student.transform.softcap)
    return leaves, logits_NV.log_softmax(-1)


def exact_log_q() -> Tensor:
    teacher = teacher_states()
    return (teacher.hidden_ND.double() @ teacher.head_VD.double().T).log_softmax(-1)


def top_k(k: int = K) -> TopK:
    logprob_NK, token_NK = exact_log_q().topk(k)
    return TopK(token_NK, logprob_NK.float())


def coarse(logprob_NV: Tensor, token_NK: Tensor) -> Tensor:
    """Log-probabilities of K tokens and of all others together."""
    logprob_NK = logprob_NV.gather(1, token_NK)
    return torch.cat([logprob_NK, (1 - logprob_NK.exp().sum(1, keepdim=True)).log()], dim=1)


def naive(log_p_NV: Tensor, log_q_NV: Tensor, kind: str, beta: float = 0.5, smoothing: float = 0.0) -> Tensor:
    if smoothing:
        log_q_NV = torch.logaddexp(math.log(1 - smoothing) + log_q_NV, math.log(smoothing) + log_p_NV)

    def kl(of_NV: Tensor, to_NV: Tensor) -> Tensor:
        return (of_NV.exp() * (of_NV - to_NV)).sum(-1)

    if kind == "jsd":
        log_m_NV = torch.logaddexp(math.log(1 - beta) + log_p_NV, math.log(beta) + log_q_NV)
        return (1 - beta) * kl(log_p_NV, log_m_NV) + beta * kl(log_q_NV, log_m_NV)
    return kl(log_p_NV, log_q_NV) if kind == "reverse_kl" else kl(log_q_NV, log_p_NV)


def config(kind: str = "reverse_kl", **settings) -> LossConfig:
    return LossConfig(kind=DivergenceKind(kind), backend=Backend.eager, **settings)


def gradients(loss: Tensor, student: ModelStates) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (student.hidden_ND, student.head_VD))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def require(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) <= tolerance


def free_logits(logits_V: Tensor) -> ModelStates:
    """One token whose logits are free: the head is the identity."""
    return ModelStates(logits_V[None], torch.eye(len(logits_V)))


def minimise(loss_of, logits_V: Tensor) -> Tensor:
    """The logits at the minimum of a loss, by descent with line search."""
    logits_V = logits_V.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits_V], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-7, tolerance_change=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(logits_V)
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits_V.detach()


# Top-k with a tail


@pytest.mark.parametrize("settings", [{}, {"smoothing": 0.1, "beta": 0.2}])
@pytest.mark.parametrize("logits", [IDENTITY, SOFTCAP], ids=["plain", "soft cap"])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_top_k_is_the_divergence_over_k_tokens_and_the_tail(tiles, kind, logits, settings):
    student, teacher = student_states(transform=logits), top_k()
    loss, losses = top_k_divergence(student, teacher, WEIGHT_N, config(kind, **settings), V)
    leaves, log_p_NV = exact_log_p(student)
    teacher_NK = teacher.logprob_NK.double()
    log_q_NK = torch.cat([teacher_NK, (1 - teacher_NK.exp().sum(1, keepdim=True)).log()], dim=1)
    expected_N = naive(coarse(log_p_NV, teacher.token_NK), log_q_NK, kind, **settings)
    assert relative(losses.loss_N, expected_N.detach()) <= 1e-6
    found, expected = gradients(loss, student), torch.autograd.grad((WEIGHT_N * expected_N).sum(), leaves)
    require(found, expected)
    assert (found[1][V:] == 0).all()


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_top_k_takes_bfloat16(kind):
    student, teacher = student_states(torch.bfloat16), top_k()
    loss, losses = top_k_divergence(student, teacher, WEIGHT_N, config(kind), V)
    leaves, log_p_NV = exact_log_p(student)
    expected_N = naive(coarse(log_p_NV, teacher.token_NK), coarse(exact_log_q(), teacher.token_NK), kind)
    assert relative(losses.loss_N, expected_N.detach()) <= 1e-6
    require(gradients(loss, student), torch.autograd.grad((WEIGHT_N * expected_N).sum(), leaves), tolerance=4e-3)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_the_cap_of_top_k_is_a_clamp_in_value_and_gradient(kind):
    student, teacher = student_states(), top_k()
    leaves, log_p_NV = exact_log_p(student)
    plain_N = naive(coarse(log_p_NV, teacher.token_NK), coarse(exact_log_q(), teacher.token_NK), kind)
    cap = float(plain_N.median()) + 1e-3
    loss, losses = top_k_divergence(student, teacher, WEIGHT_N, config(kind, cap=cap), V)
    assert relative(losses.loss_N, plain_N.detach().clamp(max=cap)) <= 1e-6
    assert torch.equal(losses.capped_N, (plain_N >= cap).float())
    require(gradients(loss, student), torch.autograd.grad((WEIGHT_N * plain_N.clamp(max=cap)).sum(), leaves))


@pytest.mark.parametrize("k", [1, 3, 20, V - 1])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_top_k_is_never_above_the_exact_divergence(kind, k):
    student = student_states()
    _, losses = top_k_divergence(student, top_k(k), WEIGHT_N, config(kind), V)
    exact_N = naive(exact_log_p(student)[1], exact_log_q(), kind).detach()
    assert (losses.loss_N <= exact_N * (1 + 1e-5)).all()
    assert (losses.loss_N >= 0).all()


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_top_k_with_a_tail_of_one_token_is_the_exact_divergence(kind):
    student, teacher = student_states(), teacher_states()
    head_VD = teacher.head_VD.clone()
    head_VD[0], teacher_hidden_ND = 0.0, 0.3 * teacher.hidden_ND  # flat, so that the last token is no rounding error of the others
    log_q_NV = (teacher_hidden_ND.double() @ head_VD.double().T).log_softmax(-1)
    logprob_NK, token_NK = log_q_NV.topk(V - 1)
    flat = ModelStates((0.3 * student.hidden_ND.detach()).requires_grad_(), student.head_VD)
    loss, losses = top_k_divergence(flat, TopK(token_NK, logprob_NK), WEIGHT_N, config(kind), V)
    exact, exact_N = divergence(flat.hidden_ND, flat.head_VD, teacher_hidden_ND, head_VD, WEIGHT_N, kind=kind, vocab_size=V)
    assert relative(losses.loss_N, exact_N) <= 1e-5
    require(gradients(loss, flat), gradients(exact, flat), tolerance=2e-5)


def test_top_k_of_the_students_own_distribution_is_zero():
    student = student_states()
    logprob_NK, token_NK = exact_log_p(student)[1].detach().topk(K)
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        loss, losses = top_k_divergence(student, TopK(token_NK, logprob_NK), WEIGHT_N, config(kind), V)
        assert losses.loss_N.abs().max() <= 1e-6
        assert all(gradient.abs().max() <= 2e-6 for gradient in gradients(loss, student))


def test_the_tails_are_the_probabilities_outside_the_teachers_top_k(tiles):
    student, teacher = student_states(), top_k()
    _, losses = top_k_divergence(student, teacher, WEIGHT_N, config(), V)
    for found_N, logprob_NV in [(losses.student_tail_N, exact_log_p(student)[1].detach()), (losses.teacher_tail_N, exact_log_q())]:
        assert relative(found_N, 1 - logprob_NV.gather(1, teacher.token_NK).exp().sum(1)) <= 1e-6


def test_log_probabilities_that_add_up_to_more_than_one_stay_finite():
    student = student_states()
    logprob_NV, token_NV = exact_log_q().topk(V)
    loss, losses = top_k_divergence(student, TopK(token_NV, logprob_NV.float() + 1e-6), WEIGHT_N, config(), V)
    assert losses.loss_N.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(loss, student))
    assert (losses.teacher_tail_N == SMALLEST_TAIL).all()


def test_a_token_named_twice_is_refused():
    teacher = top_k()
    teacher.token_NK[4, 5] = teacher.token_NK[4, 2]
    with pytest.raises(ValueError, match="names a token twice"):
        top_k_divergence(student_states(), teacher, WEIGHT_N, config(), V)


# What is wrong with a sum over the top-k alone


def test_the_partial_sum_is_least_where_the_student_has_left_the_top_k():
    log_q_V = draw((20,), 5, 1.5).double().log_softmax(-1)
    logprob_K, token_K = log_q_V.topk(5)
    mass = float(logprob_K.exp().sum())

    def partial_sum(logits_V: Tensor) -> Tensor:
        log_p_K = logits_V.log_softmax(-1)[token_K]
        return (log_p_K.exp() * (log_p_K - logprob_K)).sum()

    found_V = minimise(partial_sum, torch.zeros(20, dtype=torch.float64))
    torch.testing.assert_close(found_V.softmax(-1)[token_K], logprob_K.exp() / math.e, rtol=1e-4, atol=0)
    assert abs(float(partial_sum(found_V)) + mass / math.e) <= 1e-9

    start_V = found_V.float()
    teacher = TopK(token_K[None], logprob_K[None])
    right_V = minimise(lambda logits_V: top_k_divergence(free_logits(logits_V), teacher, torch.ones(1), config(), 20)[0], start_V)
    torch.testing.assert_close(right_V.double().softmax(-1)[token_K], logprob_K.exp(), rtol=1e-3, atol=1e-5)
    assert top_k_divergence(free_logits(start_V), teacher, torch.ones(1), config(), 20)[0] > 0.3
    assert top_k_divergence(free_logits(right_V), teacher, torch.ones(1), config(), 20)[0].abs() <= 1e-6


def test_a_renormalised_top_k_does_not_see_what_lies_outside():
    q_V = torch.tensor([0.5, 0.3, 0.1, 0.05, 0.05], dtype=torch.float64)
    p_V = torch.tensor([0.005, 0.003, 0.001, 0.0, 0.991], dtype=torch.float64) + 1e-12
    token_K = torch.tensor([0, 1, 2])
    log_p_K, log_q_K = (one_V[token_K].log().log_softmax(-1) for one_V in (p_V, q_V))
    assert abs(float((log_p_K.exp() * (log_p_K - log_q_K)).sum())) <= 1e-9
    for kind, least in (("reverse_kl", 2.0), ("forward_kl", 3.0), ("jsd", 0.4)):
        _, losses = top_k_divergence(free_logits(p_V.log().float()), TopK(token_K[None], q_V[token_K].log()[None]), torch.ones(1), config(kind), 5)
        assert losses.loss_N > least
        assert losses.student_tail_N > 0.99


# One log-probability


def outcomes() -> tuple[ModelStates, Tensor, Tensor, Tensor]:
    """Every token of the vocabulary as sample of one and the same position: (student [V rows], p_V, log p_V, log q_V), float64."""
    student = student_states()
    hidden_VD = student.hidden_ND[:1].detach().expand(V, D).clone().requires_grad_()
    log_p_V, log_q_V = exact_log_p(student)[1][0].detach(), exact_log_q()[0]
    return ModelStates(hidden_VD, student.head_VD), log_p_V.exp(), log_p_V, log_q_V


def reverse_kl_gradients(log_q_V: Tensor) -> tuple[Tensor, Tensor]:
    leaves, log_p_NV = exact_log_p(student_states())
    hidden_gradient_ND, head_gradient_VD = torch.autograd.grad(naive(log_p_NV[0], log_q_V, "reverse_kl"), leaves)
    return hidden_gradient_ND[0], head_gradient_VD


def test_k1_as_a_loss_has_no_gradient_on_average():
    leaves, log_p_NV = exact_log_p(student_states())
    log_p_V, log_q_V = log_p_NV[0], exact_log_q()[0]
    k1 = (log_p_V.detach().exp() * (log_p_V - log_q_V)).sum()  # its expectation: the sample does not depend on the parameters
    assert all(gradient.abs().max() <= 1e-14 for gradient in torch.autograd.grad(k1, leaves))
    assert all(gradient.norm() > 0.1 for gradient in reverse_kl_gradients(log_q_V))


@pytest.mark.parametrize("with_baseline", [False, True])
def test_the_policy_gradient_is_the_gradient_of_reverse_kl_on_average(tiles, with_baseline):
    student, p_V, log_p_V, log_q_V = outcomes()
    kl = (p_V * (log_p_V - log_q_V)).sum()
    baseline_V = kl.float().expand(V) if with_baseline else None
    loss, losses = policy_gradient(student, torch.arange(V), SampledToken(log_q_V, baseline_V), p_V.float(), V)
    hidden_gradient_VD, head_gradient_VD = gradients(loss, student)
    require((hidden_gradient_VD.sum(0), head_gradient_VD), reverse_kl_gradients(log_q_V))
    assert abs(float((p_V * losses.loss_N).sum() - kl)) <= 1e-5 * float(kl)
    assert torch.equal(losses.loss_N, baseline_V) if with_baseline else (losses.loss_N < 0).any()


def test_the_exact_baseline_lowers_the_variance():
    student, p_V, log_p_V, log_q_V = outcomes()
    baseline_V = (p_V * (log_p_V - log_q_V)).sum().expand(V)

    def variance(**settings) -> float:
        loss, _ = policy_gradient(student, torch.arange(V), SampledToken(log_q_V, **settings), torch.ones(V), V)
        gradient_VD = torch.autograd.grad(loss, student.hidden_ND)[0].double()
        return float((p_V * (gradient_VD - p_V @ gradient_VD).square().sum(1)).sum())

    assert variance(baseline_N=baseline_V) < 0.9 * variance()


def test_the_policy_gradient_is_minus_advantage_times_the_gradient_of_the_log_probability(tiles):
    student, sampled_N = student_states(transform=SOFTCAP), torch.arange(N)
    teacher_logprob_N = exact_log_q()[torch.arange(N), sampled_N]
    loss, losses = policy_gradient(student, sampled_N, SampledToken(teacher_logprob_N), WEIGHT_N, V)
    leaves, log_p_NV = exact_log_p(student)
    log_p_N = log_p_NV[torch.arange(N), sampled_N]
    advantage_N = teacher_logprob_N - log_p_N.detach()
    assert relative(losses.loss_N, -advantage_N) <= 1e-6
    require(gradients(loss, student), torch.autograd.grad(-(WEIGHT_N * advantage_N * log_p_N).sum(), leaves))


@pytest.mark.parametrize("with_baseline", [False, True])
def test_the_cap_clips_the_advantage_of_the_policy_gradient(with_baseline):
    student, sampled_N = student_states(), torch.arange(N)
    teacher_logprob_N = exact_log_q()[torch.arange(N), sampled_N]
    baseline_N = torch.full((N,), 1.5) if with_baseline else None
    loss, losses = policy_gradient(student, sampled_N, SampledToken(teacher_logprob_N, baseline_N), WEIGHT_N, V, cap=0.5)
    leaves, log_p_NV = exact_log_p(student)
    log_p_N = log_p_NV[torch.arange(N), sampled_N]
    advantage_N = teacher_logprob_N - log_p_N.detach() + (1.5 if with_baseline else 0)
    assert (advantage_N.abs() > 0.5).any()
    require(gradients(loss, student), torch.autograd.grad(-(WEIGHT_N * advantage_N.clamp(-0.5, 0.5) * log_p_N).sum(), leaves))
    assert torch.equal(losses.capped_N, (advantage_N.abs() >= 0.5).float())
    assert relative(losses.loss_N, baseline_N if with_baseline else -advantage_N) <= 1e-6  # what is reported is not clipped


def test_the_constant_penalty_pushes_down_sampled_tokens_that_are_unlikely_and_hears_no_teacher(tiles):
    student, sampled_N = student_states(), torch.arange(N)
    leaves, log_p_NV = exact_log_p(student)
    sampled_N[::2] = log_p_NV.argmax(1)[::2]
    log_p_N = log_p_NV[torch.arange(N), sampled_N]
    is_unlikely_N = log_p_N.detach() < math.log(0.5)
    teacher_logprob_N = exact_log_q()[torch.arange(N), sampled_N]
    cfg = LossConfig(constant_penalty=True)
    loss, losses = distillation_loss(student, SampledToken(teacher_logprob_N), Targets(sampled_N), WEIGHT_N, cfg, V)
    assert is_unlikely_N.any()
    own = gradients(loss, student)
    require(own, torch.autograd.grad((WEIGHT_N * is_unlikely_N * log_p_N).sum(), leaves))
    assert relative(losses.loss_N, log_p_N - teacher_logprob_N) <= 1e-6
    other, _ = distillation_loss(student, SampledToken(teacher_logprob_N - 3), Targets(sampled_N), WEIGHT_N, cfg, V)
    assert all(torch.equal(one, two) for one, two in zip(own, gradients(other, student), strict=True))


# Supervised training


@pytest.mark.parametrize("logits", [IDENTITY, SOFTCAP], ids=["plain", "soft cap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_and_its_gradients_are_torchs(tiles, dtype, logits):
    student = student_states(dtype, logits)
    target_N = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
    loss, losses = cross_entropy(student, target_N, WEIGHT_N, V)
    leaves, log_p_NV = exact_log_p(student)
    expected_N = functional.nll_loss(log_p_NV, target_N, reduction="none")
    found = gradients(loss, student)
    assert relative(losses.loss_N, expected_N.detach()) <= 1e-6
    require(found, torch.autograd.grad((WEIGHT_N * expected_N).sum(), leaves), 1e-5 if dtype is torch.float32 else 4e-3)
    assert (found[1][V:] == 0).all()
    assert losses.teacher_entropy_N is None


def test_cross_entropy_of_a_token_of_weight_zero_is_reported_and_moves_nothing():
    student, weight_N = student_states(), WEIGHT_N.clone()
    weight_N[3:7] = 0
    loss, losses = cross_entropy(student, torch.arange(N), weight_N, V)
    assert (gradients(loss, student)[0][3:7] == 0).all()
    assert (losses.loss_N[3:7] > 0).all()


def test_the_entropy_of_the_student_is_reported_with_every_loss(tiles):
    student = student_states()
    expected_N = torch.distributions.Categorical(logits=exact_log_p(student)[1].detach()).entropy()
    sampled_N = torch.arange(N)
    for _, losses in (
        cross_entropy(student, sampled_N, WEIGHT_N, V),
        top_k_divergence(student, top_k(), WEIGHT_N, config(), V),
        policy_gradient(student, sampled_N, SampledToken(torch.zeros(N)), WEIGHT_N, V),
    ):
        assert relative(losses.student_entropy_N, expected_N) <= 1e-6


def test_logits_of_size_200_stay_finite():
    student = ModelStates(torch.eye(N).requires_grad_(), (400 * torch.rand(V, N, generator=torch.Generator().manual_seed(5)) - 200).requires_grad_())
    for loss, losses in (
        cross_entropy(student, torch.arange(N), WEIGHT_N, V),
        *(top_k_divergence(student, top_k(), WEIGHT_N, config(kind), V) for kind in ("reverse_kl", "forward_kl", "jsd")),
        policy_gradient(student, torch.arange(N), SampledToken(exact_log_q()[:, 0]), WEIGHT_N, V),
    ):
        assert losses.loss_N.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients(loss, student))


# The one interface


def test_whole_distributions_give_the_exact_divergence():
    student, teacher = student_states(), teacher_states()
    settings = {"kind": DivergenceKind.jsd, "beta": 0.3, "temperature": 1.3, "smoothing": 0.01, "cap": 0.3}
    loss, losses = distillation_loss(student, teacher, Targets(torch.arange(N)), WEIGHT_N, LossConfig(**settings), V)
    expected, expected_N = divergence(student.hidden_ND, student.head_VD, teacher.hidden_ND, teacher.head_VD, WEIGHT_N, vocab_size=V, **settings)
    assert torch.equal(losses.loss_N, expected_N)
    assert torch.equal(losses.capped_N, (expected_N == torch.tensor(0.3)).float())
    assert all(torch.equal(*pair) for pair in zip(gradients(loss, student), gradients(expected, student), strict=True))


def test_whole_distributions_with_policy_gradient_use_the_exact_divergence_as_baseline():
    student, teacher, sampled_N = student_states(), teacher_states(), torch.arange(N)
    loss, losses = distillation_loss(student, teacher, Targets(sampled_N), WEIGHT_N, config(policy_gradient=True), V)
    leaves, log_p_NV = exact_log_p(student)
    exact_N = naive(log_p_NV, exact_log_q(), "reverse_kl").detach()
    log_p_N = log_p_NV[torch.arange(N), sampled_N]
    advantage_N = exact_log_q()[torch.arange(N), sampled_N] - log_p_N.detach() + exact_N
    assert relative(losses.loss_N, exact_N) <= 1e-6
    require(gradients(loss, student), torch.autograd.grad(-(WEIGHT_N * advantage_N * log_p_N).sum(), leaves))
    assert relative(losses.teacher_entropy_N, torch.distributions.Categorical(logits=exact_log_q()).entropy()) <= 1e-6


def test_thin_signal_takes_its_own_estimator():
    student, sampled_N, cfg = student_states(), torch.arange(N), config(cap=0.8)
    logprob_N = exact_log_q()[torch.arange(N), sampled_N]
    for signal, (expected, _) in (
        (top_k(), top_k_divergence(student, top_k(), WEIGHT_N, cfg, V)),
        (SampledToken(logprob_N), policy_gradient(student, sampled_N, SampledToken(logprob_N), WEIGHT_N, V, cap=0.8)),
    ):
        loss, _ = distillation_loss(student, signal, Targets(sampled_N), WEIGHT_N, cfg, V)
        assert torch.equal(loss, expected)
        assert all(torch.equal(*pair) for pair in zip(gradients(loss, student), gradients(expected, student), strict=True))


def test_a_top_k_of_raw_logits_is_refused():
    raised = TopK(top_k().token_NK, top_k().logprob_NK + 1)
    with pytest.raises(ValueError, match="add up to more than 1"):
        top_k_divergence(student_states(), raised, WEIGHT_N, config(), V)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_a_token_that_the_teacher_rules_out_gives_no_nan(kind):
    ruled_out_NK = top_k().logprob_NK.clone()
    ruled_out_NK[:, -1] = -math.inf
    student = student_states()
    loss, losses = top_k_divergence(student, TopK(top_k().token_NK, ruled_out_NK), WEIGHT_N, config(kind, cap=3.0), V)
    assert losses.loss_N.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(loss, student))


def test_a_token_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="outside the vocabulary"):
        cross_entropy(student_states(), torch.full((N,), V), WEIGHT_N, V)
