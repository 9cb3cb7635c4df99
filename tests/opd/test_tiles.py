"""The walk over tiles and blocks, on losses so simple that the answer is known, and its parts."""

import pytest
import torch
from torch import Tensor

import opd.tiles
from opd.divergence import divergence
from opd.tiles import TokenLosses, blocks_of, join_blocks, tile_rows, tiled_loss
from rollout.logits import product_into

N, V, D = 37, 50, 8
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class HalfSquares:
    """loss = sum of the squared logits of the vocabulary, halved: the gradient by the logits is the logits."""

    def __init__(self):
        self.walked: list[tuple[int, int]] = []
        self.num_gradients = 0

    def start(self, rows: slice) -> None:
        self.walked.append((rows.start, rows.stop))
        self.sums: list[Tensor] = []

    def measure(self, columns: slice, logits_CV: Tensor) -> None:
        self.sums.append(logits_CV.square().sum(1) / 2)

    def finish(self) -> TokenLosses:
        loss_C = torch.stack(self.sums).sum(0)
        return TokenLosses(loss_C, -loss_C, student_tail_N=2 * loss_C)

    def gradient(self, columns: slice, logits_CV: Tensor, weight_C: Tensor, dtype: torch.dtype) -> Tensor:
        self.num_gradients += 1
        return (logits_CV * weight_C[:, None]).to(dtype)


def tensors(dtype: torch.dtype = torch.float32, padding: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND, head_VD = torch.randn(N, D, generator=generator), torch.randn(V + padding, D, generator=generator)
    return hidden_ND.to(dtype).requires_grad_(), head_VD.to(dtype).requires_grad_(), torch.rand(N, generator=generator)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(params=[(1, 7), (5 * V, 50), (20 * V, 16), (1 << 23, 1), (1 << 23, 8192)], ids=["1 row", "5 rows", "16 rows", "columns", "all"])
def tiles(request, monkeypatch) -> int:
    """Rows of a tile."""
    monkeypatch.setitem(opd.tiles.TILE_ELEMENTS, "cpu", request.param[0])
    monkeypatch.setattr(opd.tiles, "BLOCK_COLUMNS", request.param[1])
    return min(N, tile_rows(CPU, V))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_do_not_depend_on_the_tiles(tiles, dtype):
    hidden_ND, head_VD, weight_N = tensors(dtype)
    loss, losses = tiled_loss(hidden_ND, head_VD, weight_N, V, HalfSquares())
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_ND, head_VD)]
    expected_N = (exact[0] @ exact[1][:V].T).square().sum(1) / 2
    expected = torch.autograd.grad((weight_N * expected_N).sum(), exact)
    assert relative(losses.loss_N, expected_N.detach()) <= 1e-6
    for found, right in zip(torch.autograd.grad(loss, (hidden_ND, head_VD)), expected, strict=True):
        assert relative(found, right) <= (1e-6 if dtype is torch.float32 else 4e-3)


def test_the_tiles_cover_every_token_once_and_in_order(tiles):
    objective = HalfSquares()
    tiled_loss(*tensors(), V, objective)
    assert [start for start, _ in objective.walked] == list(range(0, N, tiles))
    assert [stop for _, stop in objective.walked] == [*range(tiles, N, tiles), N]


def test_figures_of_the_tiles_are_joined_and_missing_ones_stay_missing(tiles):
    loss, losses = tiled_loss(*tensors(), V, HalfSquares())
    assert losses.loss_N.shape == (N,)
    assert torch.equal(losses.student_entropy_N, -losses.loss_N)
    assert torch.equal(losses.student_tail_N, 2 * losses.loss_N)
    assert losses.teacher_entropy_N is None
    assert losses.teacher_tail_N is None
    assert loss.requires_grad
    assert not losses.loss_N.requires_grad


def test_without_gradients_the_objective_is_asked_for_none():
    hidden_ND, head_VD, weight_N = tensors()
    objective = HalfSquares()
    with torch.no_grad():
        loss, _ = tiled_loss(hidden_ND, head_VD, weight_N, V, objective)
    assert not loss.requires_grad
    tiled_loss(hidden_ND.detach(), head_VD.detach(), weight_N, V, objective)
    assert objective.num_gradients == 0


def test_no_tokens_make_no_tile():
    hidden_ND, head_VD, weight_N = tensors()
    loss, losses = tiled_loss(hidden_ND[:0], head_VD, weight_N[:0], V, HalfSquares())
    assert loss == 0
    assert losses.loss_N.shape == losses.student_entropy_N.shape == (0,)
    assert torch.equal(torch.autograd.grad(loss, head_VD)[0], torch.zeros(V + 5, D))


@pytest.mark.parametrize(
    ("elements", "vocab_size", "rows"),
    [(1, 50, 1), (99, 50, 1), (100, 50, 2), (15 * 50, 50, 15), (16 * 50, 50, 16), (31 * 50, 50, 16), (33 * 50, 50, 32), (1 << 28, 129_280, 2064)],
)
def test_rows_of_a_tile_fit_the_budget_and_are_a_multiple_of_16_where_there_are_so_many(monkeypatch, elements, vocab_size, rows):
    for device in (CPU, CUDA):
        monkeypatch.setitem(opd.tiles.TILE_ELEMENTS, device.type, elements)
        assert tile_rows(device, vocab_size) == rows


@pytest.mark.parametrize("width", [1, 7, 25, 50, 51, 8192])
def test_blocks_cover_the_vocabulary_once(monkeypatch, width):
    monkeypatch.setattr(opd.tiles, "BLOCK_COLUMNS", width)
    blocks = blocks_of(CPU, V)
    assert [column for block in blocks for column in range(block.start, block.stop)] == list(range(V))
    assert all(block.stop - block.start == width for block in blocks[:-1])


def test_a_gpu_takes_the_whole_vocabulary_at_once(monkeypatch):
    monkeypatch.setattr(opd.tiles, "BLOCK_COLUMNS", 7)
    assert blocks_of(CUDA, V) == [slice(0, V)]


@pytest.mark.parametrize("offset", [0.0, 300.0, -300.0])
def test_statistics_of_blocks_join_to_those_of_the_row(offset):
    logits_CV = 20 * torch.randn(4, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits_CV[:, 10:20] += offset
    parts = logits_CV.split(10, dim=1)
    maximum_BC = torch.stack([part.amax(1) for part in parts])
    powers = [(part - part.amax(1, keepdim=True)).exp() for part in parts]
    total_BC = torch.stack([power.sum(1) for power in powers])
    moment_BC = torch.stack([(power * (part - part.amax(1, keepdim=True))).sum(1) for power, part in zip(powers, parts, strict=True)])
    maximum_C, total_C, moment_C, factor_BC = join_blocks(maximum_BC, total_BC, moment_BC)
    centred_CV = logits_CV - logits_CV.amax(1, keepdim=True)
    torch.testing.assert_close(maximum_C, logits_CV.amax(1))
    torch.testing.assert_close(total_C, centred_CV.exp().sum(1))
    torch.testing.assert_close(moment_C, (centred_CV.exp() * centred_CV).sum(1))
    torch.testing.assert_close(factor_BC, (maximum_BC - maximum_C).exp())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_in_float32_whatever_their_factors(dtype):
    hidden_ND, head_VD, _ = tensors(dtype)
    out_NV = torch.empty(N, V + 5)
    with torch.no_grad():
        product_into(out_NV, hidden_ND, head_VD)
    assert relative(out_NV, (hidden_ND.double() @ head_VD.double().T).detach()) <= 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_on_a_gpu_are_in_float32_whatever_their_factors(dtype):
    hidden_ND, head_VD, _ = (tensor.detach().cuda() for tensor in tensors(dtype))
    out_NV = torch.empty(N, V + 5, device="cuda")
    product_into(out_NV, hidden_ND, head_VD)
    assert relative(out_NV, hidden_ND.double() @ head_VD.double().T) <= 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_on_a_gpu_do_not_depend_on_the_tiles(monkeypatch, dtype):
    monkeypatch.setitem(opd.tiles.TILE_ELEMENTS, "cuda", 16 * V)
    hidden_ND, head_VD, weight_N = (tensor.detach().cuda() for tensor in tensors(dtype))
    leaves = [hidden_ND.requires_grad_(), head_VD.requires_grad_()]
    loss, _ = tiled_loss(*leaves, weight_N, V, HalfSquares())
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    expected = torch.autograd.grad((weight_N * (exact[0] @ exact[1][:V].T).square().sum(1) / 2).sum(), exact)
    for found, right in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        assert relative(found, right) <= (1e-5 if dtype is torch.float32 else 5e-3)


def test_weights_that_ask_for_a_gradient_are_refused():
    with pytest.raises(ValueError, match="get no gradient"):
        divergence(*torch.randn(2, 3, 4).unbind(), *torch.randn(2, 3, 4).unbind(), torch.ones(3, requires_grad=True))
