"""The exact divergence against its formula over a whole matrix of logits, in float64 with autograd; the backends agree in test_divergence_triton.py."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import opd.tiles
from opd.divergence import ModelStates, divergence, full_divergence
from opd.loss_config import Backend, DivergenceKind, LossConfig
from rollout.types import IDENTITY, LogitTransform

N, V, D_STUDENT, D_TEACHER = 13, 97, 8, 12
KINDS = ["reverse_kl", "forward_kl", "jsd"]
DTYPES = [torch.float32, torch.bfloat16]
WEIGHT_N = torch.rand(N, generator=torch.Generator().manual_seed(9)) + 0.1
TILES = {
    "one row a tile": (1, 8192),
    "four rows a tile, the last of one, in blocks of 40, 40 and 17 columns": (4 * V, 40),
    "blocks of one column": (1 << 23, 1),
    "everything at once": (1 << 23, 8192),
}


def set_tiles(monkeypatch, elements: int, columns: int) -> None:
    monkeypatch.setitem(opd.tiles.TILE_ELEMENTS, "cpu", elements)
    monkeypatch.setattr(opd.tiles, "BLOCK_COLUMNS", columns)


@pytest.fixture(params=TILES.values(), ids=TILES)
def tiles(request, monkeypatch) -> None:
    set_tiles(monkeypatch, *request.param)


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    set_tiles(monkeypatch, 4 * V, 40)


def tensors(dtype: torch.dtype = torch.float32, size: float = 2.0, num_tokens: int = N, padding: tuple[int, int] = (0, 0)) -> list[Tensor]:
    """Student's hidden states and head (both with gradients), teacher's hidden states and head; logits N(0, size^2), padding rows full of large numbers."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for width, rows in ((D_STUDENT, padding[0]), (D_TEACHER, padding[1])):
        head_VD = size * width**-0.5 * torch.randn(V, width, generator=generator)
        padded_VD = torch.cat([head_VD, torch.full((rows, width), 1e4)])
        found += [torch.randn(num_tokens, width, generator=generator).to(dtype), padded_VD.to(dtype)]
    return [found[0].requires_grad_(), found[1].requires_grad_(), *found[2:]]


def of_logits(student_NV: Tensor, teacher_NV: Tensor) -> list[Tensor]:
    """Inputs whose products are these very logits, without rounding: unit vectors as hidden states."""
    unit_NN = torch.eye(len(student_NV))
    return [unit_NN.clone().requires_grad_(), student_NV.T.contiguous().requires_grad_(), unit_NN, teacher_NV.T.contiguous()]


def transformed(products_NV: Tensor, transform: LogitTransform) -> Tensor:
    if transform.softcap is None:
        return transform.scale * products_NV
    return transform.softcap * torch.tanh(transform.scale * products_NV / transform.softcap)


def naive(
    hidden_ND: Tensor, head_VD: Tensor, teacher_hidden_ND: Tensor, teacher_head_VD: Tensor, *, kind: str = "reverse_kl", beta: float = 0.5,
    temperature: float = 1.0, smoothing: float = 0.0, cap: float | None = None, vocab_size: int = V,
    student_transform: LogitTransform = IDENTITY, teacher_transform: LogitTransform = IDENTITY,
) -> Tensor:  # fmt: skip
    """The formula in float64, with autograd."""
    log_p_NV = (transformed(hidden_ND.double() @ head_VD.double()[:vocab_size].T, student_transform) / temperature).log_softmax(-1)
    log_q_NV = (transformed(teacher_hidden_ND.double() @ teacher_head_VD.double()[:vocab_size].T, teacher_transform) / temperature).log_softmax(-1)
    if smoothing:
        log_q_NV = torch.logaddexp(math.log(1 - smoothing) + log_q_NV, math.log(smoothing) + log_p_NV)

    def kl(of_NV: Tensor, to_NV: Tensor) -> Tensor:
        return (of_NV.exp() * (of_NV - to_NV)).sum(-1)

    if kind == "jsd" and 0 < beta < 1:
        log_m_NV = torch.logaddexp(math.log(1 - beta) + log_p_NV, math.log(beta) + log_q_NV)
        value_N = (1 - beta) * kl(log_p_NV, log_m_NV) + beta * kl(log_q_NV, log_m_NV)
    elif kind == "reverse_kl" or (kind == "jsd" and beta == 1):
        value_N = kl(log_p_NV, log_q_NV)
    else:
        value_N = kl(log_q_NV, log_p_NV)
    return value_N if cap is None else value_N.clamp(max=cap)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


def require_naive(inputs: list[Tensor], value: float = 1e-6, gradient: float = 1e-5, **settings) -> None:
    """Loss, loss of each token and both gradients are those of the formula on the same inputs in float64, within these relative errors."""
    hidden_ND, head_VD, *teacher = inputs
    loss, kl_N = divergence(hidden_ND, head_VD, *teacher, WEIGHT_N[: len(hidden_ND)], backend="eager", **settings)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_ND, head_VD)]
    expected_N = naive(*exact, *teacher, **settings)
    expected_loss = (WEIGHT_N[: len(hidden_ND)].double() * expected_N).sum()
    assert kl_N.dtype is torch.float32
    assert not kl_N.requires_grad
    assert relative(kl_N, expected_N.detach()) <= value
    assert relative(loss.detach(), expected_loss.detach()) <= value
    for found, right in zip(gradients(loss, hidden_ND, head_VD), gradients(expected_loss, *exact), strict=True):
        assert found.dtype is hidden_ND.dtype
        assert relative(found, right) <= gradient


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_its_formula_however_it_is_tiled(tiles, kind, dtype):
    require_naive(tensors(dtype), kind=kind, gradient=1e-5 if dtype is torch.float32 else 4e-3)


@pytest.mark.parametrize("temperature", [0.5, 0.9, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_temperature_divides_the_logits_of_both(small_tiles, kind, temperature):
    require_naive(tensors(size=1.0 + temperature), kind=kind, temperature=temperature)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.0, 0.05, 0.3, 0.5, 0.9, 1.0])
def test_jsd_is_its_formula_for_every_beta(small_tiles, beta, smoothing):
    require_naive(tensors(), kind="jsd", beta=beta, smoothing=smoothing)


@pytest.mark.parametrize(("beta", "kind"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_the_ends_of_beta_are_the_plain_divergences(small_tiles, beta, kind):
    inputs = tensors()
    loss, kl_N = divergence(*inputs, WEIGHT_N, kind="jsd", beta=beta)
    other, other_N = divergence(*inputs, WEIGHT_N, kind=kind)
    assert torch.equal(kl_N, other_N)
    assert all(torch.equal(*pair) for pair in zip(gradients(loss, *inputs[:2]), gradients(other, *inputs[:2]), strict=True))


@pytest.mark.parametrize("smoothing", [1e-4, 0.1, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_smoothing_mixes_the_student_into_the_teacher(small_tiles, kind, smoothing):
    require_naive(tensors(), kind=kind, smoothing=smoothing, temperature=1.1)


def test_smoothing_bounds_the_reverse_divergence():
    _, kl_N = divergence(*tensors(size=200.0), WEIGHT_N, smoothing=0.01)
    assert (kl_N <= -math.log(0.01) + 1e-5).all()
    assert kl_N.max() > 4


@pytest.mark.parametrize("smoothing", [0.0, 0.05])
@pytest.mark.parametrize("kind", KINDS)
def test_the_cap_is_a_clamp_in_value_and_gradient(small_tiles, kind, smoothing):
    inputs = tensors()
    cap = float(naive(*inputs, kind=kind, smoothing=smoothing).median()) + 1e-3
    require_naive(inputs, kind=kind, smoothing=smoothing, cap=cap)
    loss, kl_N = divergence(*inputs, WEIGHT_N, kind=kind, smoothing=smoothing, cap=cap)
    is_capped_N = kl_N == torch.tensor(cap)
    assert 0 < is_capped_N.sum() < N
    assert (gradients(loss, inputs[0])[0][is_capped_N] == 0).all()


@pytest.mark.parametrize("student_transform", [LogitTransform(0.4, 3.0), LogitTransform(1.7), IDENTITY])
@pytest.mark.parametrize("teacher_transform", [LogitTransform(1.3, 2.0), LogitTransform(0.6), IDENTITY])
@pytest.mark.parametrize("kind", KINDS)
def test_each_side_has_its_own_scale_and_soft_cap(small_tiles, kind, student_transform, teacher_transform):
    require_naive(tensors(), kind=kind, temperature=0.8, student_transform=student_transform, teacher_transform=teacher_transform)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_at_once_is_the_formula(tiles, kind):
    transforms = {"student_transform": LogitTransform(0.7, 4.0), "teacher_transform": LogitTransform(1.2, 5.0)}
    require_naive(tensors(padding=(3, 31)), kind=kind, beta=0.3, temperature=1.4, smoothing=0.02, cap=1.0, vocab_size=V, **transforms)


@pytest.mark.parametrize(("student", "teacher"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_the_dtypes_of_student_and_teacher_may_differ(small_tiles, student, teacher):
    hidden_ND, head_VD, *others = tensors()
    inputs = [tensor.detach().to(student).requires_grad_() for tensor in (hidden_ND, head_VD)] + [tensor.to(teacher) for tensor in others]
    require_naive(inputs, gradient=1e-5 if student is torch.float32 else 4e-3)


@pytest.mark.parametrize("padding", [(32, 32), (0, 7), (7, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_rows_of_a_head_never_count_and_get_gradient_zero(small_tiles, kind, padding):
    padded, plain = tensors(padding=padding), tensors()
    loss, kl_N = divergence(*padded, WEIGHT_N, kind=kind, vocab_size=V)
    other, other_N = divergence(*plain, WEIGHT_N, kind=kind)
    hidden_gradient_ND, head_gradient_VD = gradients(loss, *padded[:2])
    expected_ND, expected_VD = gradients(other, *plain[:2])
    assert torch.equal(kl_N, other_N)
    assert (head_gradient_VD[V:] == 0).all()
    assert torch.equal(head_gradient_VD[:V], expected_VD)
    assert torch.equal(hidden_gradient_ND, expected_ND)


def test_a_tied_embedding_gets_the_gradient_of_both_its_uses(small_tiles):
    generator = torch.Generator().manual_seed(4)
    embedding_VD = torch.randn(V, D_STUDENT, generator=generator).requires_grad_()
    mix_DD, token_N = torch.randn(D_STUDENT, D_STUDENT, generator=generator), torch.randint(V, (N,), generator=generator)
    teacher = tensors()[2:]

    def hidden_of(embedding_VD: Tensor) -> Tensor:
        return torch.tanh(functional.embedding(token_N, embedding_VD) @ mix_DD.to(embedding_VD.dtype))

    exact_VD = embedding_VD.detach().double().requires_grad_()
    (2 * divergence(hidden_of(embedding_VD), embedding_VD, *teacher, WEIGHT_N)[0]).backward()
    (2 * (WEIGHT_N * naive(hidden_of(exact_VD), exact_VD, *teacher)).sum()).backward()
    assert relative(embedding_VD.grad, exact_VD.grad) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"student_transform": LogitTransform(0.3, 4.0), "teacher_transform": LogitTransform(0.3, 4.0)}])
def test_a_teacher_equal_to_the_student_gives_exactly_zero_reverse_kl_and_gradient(tiles, dtype, settings):
    hidden_ND, head_VD, *_ = tensors(dtype)
    loss, kl_N = divergence(hidden_ND, head_VD, hidden_ND.detach().clone(), head_VD.detach().clone(), WEIGHT_N, **settings)
    assert loss == 0
    assert (kl_N == 0).all()
    assert all((gradient == 0).all() for gradient in gradients(loss, hidden_ND, head_VD))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "smoothing"), [("forward_kl", 0.0), ("jsd", 0.0), ("reverse_kl", 0.1), ("forward_kl", 0.1), ("jsd", 0.1)])
def test_a_teacher_equal_to_the_student_gives_zero_to_rounding_for_the_other_kinds(tiles, dtype, kind, smoothing):
    hidden_ND, head_VD, *_ = tensors(dtype)
    loss, kl_N = divergence(hidden_ND, head_VD, hidden_ND.detach().clone(), head_VD.detach().clone(), WEIGHT_N, kind=kind, smoothing=smoothing)
    assert kl_N.abs().max() <= 1e-6
    assert all(gradient.abs().max() <= 2e-6 for gradient in gradients(loss, hidden_ND, head_VD))


@pytest.mark.parametrize("settings", [{}, {"smoothing": 1e-3}, {"temperature": 0.5}, {"beta": 0.1}])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_size_200_stay_finite_and_right(small_tiles, kind, settings):
    student_NV, teacher_NV = 400 * torch.rand(2, 6, V, generator=torch.Generator().manual_seed(5)) - 200
    student_NV[0], teacher_NV[0] = 200.0, -200.0  # both uniform
    student_NV[1, 3], teacher_NV[1, 3] = 200.0, -200.0
    student_NV[2], teacher_NV[2] = teacher_NV[2].clone(), student_NV[2].clone()
    inputs = of_logits(student_NV, teacher_NV)
    loss, kl_N = divergence(*inputs, torch.ones(6), kind=kind, **settings)
    exact_VD = inputs[1].detach().double().requires_grad_()
    expected_N = naive(inputs[0], exact_VD, *inputs[2:], kind=kind, **settings)
    torch.testing.assert_close(kl_N.double(), expected_N.detach(), rtol=1e-6, atol=1e-7)
    for found, right in zip(gradients(loss, inputs[1]), gradients(expected_N.sum(), exact_VD), strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=5e-7 * max(1.0, float(kl_N.max())))  # of p (r - E), with r and E so large


@pytest.mark.parametrize("size", [1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_divergence_is_off_by_the_rounding_of_float32_sums_alone(small_tiles, kind, size):
    noise_NV, logits_NV = torch.randn(2, N, V, generator=torch.Generator().manual_seed(6))
    inputs = of_logits(size * logits_NV, size * logits_NV + 1e-4 * noise_NV)
    _, kl_N = divergence(*inputs, WEIGHT_N, kind=kind, backend="eager")
    torch.testing.assert_close(kl_N.double(), naive(*inputs, kind=kind).detach(), rtol=0, atol=3e-7)


@pytest.mark.parametrize("size", [1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_divergence_has_the_right_gradient(small_tiles, kind, size):
    noise_NV, logits_NV = torch.randn(2, N, V, generator=torch.Generator().manual_seed(6))
    inputs = of_logits(size * logits_NV, size * logits_NV + 1e-4 * noise_NV)
    loss, _ = divergence(*inputs, WEIGHT_N, kind=kind, backend="eager")
    exact_VD = inputs[1].detach().double().requires_grad_()
    expected = (WEIGHT_N * naive(inputs[0], exact_VD, *inputs[2:], kind=kind)).sum()
    assert relative(*gradients(loss, inputs[1]), *gradients(expected, exact_VD)) <= 2e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_of_weight_zero_is_reported_and_moves_nothing(small_tiles, kind):
    inputs, weight_N = tensors(), WEIGHT_N.clone()
    weight_N[3:7] = 0
    loss, kl_N = divergence(*inputs, weight_N, kind=kind)
    hidden_gradient_ND, head_gradient_VD = gradients(loss, *inputs[:2])
    kept_N = weight_N > 0
    kept = [inputs[0][kept_N].detach(), inputs[1], inputs[2][kept_N], inputs[3]]
    other, other_N = divergence(*kept, weight_N[kept_N], kind=kind)
    assert (hidden_gradient_ND[3:7] == 0).all()
    assert (kl_N[3:7] > 0).all()
    assert relative(kl_N[kept_N], other_N) <= 1e-6
    assert relative(loss.detach(), other.detach()) <= 1e-6
    assert relative(head_gradient_VD, gradients(other, inputs[1])[0]) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_all_weights_zero_give_zero_loss_and_gradient(tiles, kind):
    inputs = tensors()
    loss, _ = divergence(*inputs, torch.zeros(N), kind=kind)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, *inputs[:2]))


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_at_all_give_zero_loss_and_gradients_of_zero(kind):
    inputs = tensors(num_tokens=0)
    loss, kl_N = divergence(*inputs, torch.zeros(0), kind=kind)
    hidden_gradient_ND, head_gradient_VD = gradients(loss, *inputs[:2])
    assert loss == 0
    assert kl_N.shape == (0,)
    assert hidden_gradient_ND.shape == (0, D_STUDENT)
    assert torch.equal(head_gradient_VD, torch.zeros(V, D_STUDENT))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_loss_has_scaled_gradients(small_tiles, kind, dtype):
    inputs = tensors(dtype)
    plain = gradients(divergence(*inputs, WEIGHT_N, kind=kind)[0], *inputs[:2])
    scaled = gradients(-8.0 * divergence(*inputs, WEIGHT_N, kind=kind)[0], *inputs[:2])
    assert all(torch.equal(-8.0 * one, other) for one, other in zip(plain, scaled, strict=True))


def test_a_second_backward_is_refused():
    loss, _ = divergence(*tensors(), WEIGHT_N)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()


def test_two_losses_add_their_gradients(small_tiles):
    inputs = tensors()
    one, _ = divergence(*inputs, WEIGHT_N)
    other, _ = divergence(*inputs, WEIGHT_N, kind="forward_kl")
    expected = [sum(pair) for pair in zip(gradients(one, *inputs[:2]), gradients(other, *inputs[:2]), strict=True)]
    (divergence(*inputs, WEIGHT_N)[0] + divergence(*inputs, WEIGHT_N, kind="forward_kl")[0]).backward()
    assert relative(inputs[0].grad, expected[0]) <= 1e-6
    assert relative(inputs[1].grad, expected[1]) <= 1e-6


class Recorded(TorchDispatchMode):
    """Every operation's name and the elements of its largest result."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, list | tuple) else [result]
        size = max((tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in results if isinstance(tensor, Tensor)), default=0)
        self.calls.append((func.overloadpacket.__name__, size))
        return result

    @property
    def num_products(self) -> int:
        return sum(name in ("mm", "addmm") for name, _ in self.calls)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [{}, {"kind": "forward_kl", "temperature": 2.0}, {"kind": "jsd", "smoothing": 0.1, "cap": 1.0}])
def test_no_tensor_is_larger_than_a_tile_or_a_head(monkeypatch, dtype, settings):
    set_tiles(monkeypatch, 16 * V, 40)
    hidden_ND, head_VD, *teacher = tensors(dtype, num_tokens=100)
    with Recorded() as recorded:
        divergence(hidden_ND, head_VD, *teacher, torch.ones(100), **settings)[0].backward()
    assert max(size for _, size in recorded.calls) <= max(16 * V, V * max(D_STUDENT, D_TEACHER))


def test_without_gradients_only_the_two_products_of_the_loss_are_made(small_tiles):
    inputs = tensors()
    with torch.no_grad(), Recorded() as recorded:
        loss, kl_N = divergence(*inputs, WEIGHT_N)
    assert not loss.requires_grad
    assert recorded.num_products == 2 * 4 * 3  # models, tiles, blocks
    assert torch.equal(kl_N, divergence(*inputs, WEIGHT_N)[1])


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_gradient_that_is_not_wanted_is_not_made(small_tiles, wanted):
    inputs = tensors()
    expected = gradients(divergence(*inputs, WEIGHT_N)[0], *inputs[:2])[wanted]
    alone = [tensor.detach().requires_grad_(number == wanted) for number, tensor in enumerate(inputs)]
    with Recorded() as recorded:
        divergence(*alone, WEIGHT_N)[0].backward()
    assert torch.equal(alone[wanted].grad, expected)
    assert alone[1 - wanted].grad is None
    assert recorded.num_products == 3 * 4 * 3


def test_the_teacher_gets_no_gradient():
    hidden_ND, head_VD, *teacher = tensors()
    teacher = [tensor.requires_grad_() for tensor in teacher]
    divergence(hidden_ND, head_VD, *teacher, WEIGHT_N)[0].backward()
    assert all(tensor.grad is None for tensor in teacher)


def test_the_inputs_are_left_as_they_were(small_tiles):
    inputs = tensors()
    before = [tensor.detach().clone() for tensor in inputs]
    divergence(*inputs, WEIGHT_N, temperature=2.0)[0].backward()
    assert all(torch.equal(one, other.detach()) for one, other in zip(before, inputs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_entropies_are_those_of_the_two_distributions(tiles, kind):
    hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD = tensors(padding=(3, 4))
    student, teacher = ModelStates(hidden_ND, head_VD), ModelStates(teacher_hidden_ND, teacher_head_VD)
    cfg = LossConfig(kind=DivergenceKind(kind), temperature=1.5, backend=Backend.eager)
    _, losses = full_divergence(student, teacher, WEIGHT_N, cfg, V)
    for found_N, model in [(losses.student_entropy_N, student), (losses.teacher_entropy_N, teacher)]:
        logits_NV = model.hidden_ND.detach().double() @ model.head_VD[:V].detach().double().T / 1.5
        assert relative(found_N, torch.distributions.Categorical(logits=logits_NV).entropy()) <= 1e-6


@pytest.mark.parametrize("kind", ["k1", "partial_top_k", "kl"])
def test_what_is_no_divergence_over_the_vocabulary_is_refused(kind):
    with pytest.raises(ValueError, match=f"there is no divergence '{kind}'; there are {', '.join(known.value for known in DivergenceKind)}"):
        divergence(*tensors(), WEIGHT_N, kind=kind)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"smoothing": -0.1}, "smoothing"),
        ({"beta": 1.1}, "beta"),
        ({"beta": -0.1}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"cap": 0.0}, "cap"),
        ({"cap": math.nan}, "cap"),
        ({"vocab_size": V + 1}, f"do not fit {N} tokens and a vocabulary of {V + 1}"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        divergence(*tensors(), WEIGHT_N, **settings)


@pytest.mark.parametrize(("padding", "numbers"), [((0, 3), f"{V} and {V + 3}"), ((3, 0), f"{V + 3} and {V}")])
def test_heads_of_unequal_size_need_the_vocabulary(padding, numbers):
    with pytest.raises(ValueError, match=f"the heads have {numbers} rows: give vocab_size"):
        divergence(*tensors(padding=padding), WEIGHT_N)


def test_a_teacher_head_smaller_than_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=f"do not fit {N} tokens and a vocabulary of {V + 3}"):
        divergence(*tensors(padding=(3, 0)), WEIGHT_N, vocab_size=V + 3)


@pytest.mark.parametrize("wrong", ["teacher", "weights"])
def test_numbers_of_tokens_that_do_not_fit_are_refused(wrong):
    hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD = tensors()
    with pytest.raises(ValueError, match="do not fit"):
        divergence(hidden_ND, head_VD, teacher_hidden_ND[wrong == "teacher" :], teacher_head_VD, WEIGHT_N[wrong == "weights" :])
