"""Losses on a student's logits, tile by tile: no [tokens, vocabulary] matrix exists, and nothing is computed twice.

A tile is C tokens by the whole vocabulary, C times V under a fixed budget whatever N; within it the vocabulary is walked in blocks, so that the
element-wise passes find their numbers in the cache. Each tile is walked twice: products and statistics, then gradient and products. The
caller's token weights are known in the forward, so the gradients by hidden states and head are formed there and then, and the
backward only scales them: four matrix products with a teacher's head (three without), none repeated, and nothing is needed from the
weights later, which is what lets a partitioned head (ZeRO-3) be released after the forward. Autograd over chunks was
rejected: it keeps every tile or computes it again.

N: tokens. C: tokens of a tile. D: hidden size. V: vocabulary, of a block: its columns. B: blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from rollout.logits import enter_as_they_are, product_into

TILE_ELEMENTS = {"cpu": 10_000_000, "cuda": 1 << 28}
"""Logits of one tile of one model: 38 MiB of float32 on a CPU, 1 GiB on a GPU (2,076 tokens of DeepSeek-V4)."""

BLOCK_COLUMNS = 8192
"""Columns of a block on a CPU: a row of it is 32 KiB, the first cache. A GPU takes the whole vocabulary at once."""


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """Per-token results [N], detached, float32, in nats; None where there is no such figure.

    loss_N: the divergence of each token as it enters the loss: its negative log-likelihood in supervised training, an estimate (which may
        be negative) from a sampled token.
    student_entropy_N, teacher_entropy_N: of the distributions compared.
    student_tail_N, teacher_tail_N: probability outside the teacher's top-k.
    capped_N: 1 where loss.cap acts on the token, else 0.
    """

    loss_N: torch.Tensor
    student_entropy_N: torch.Tensor
    teacher_entropy_N: torch.Tensor | None = None
    student_tail_N: torch.Tensor | None = None
    teacher_tail_N: torch.Tensor | None = None
    capped_N: torch.Tensor | None = None


class Objective(Protocol):
    """A loss on the student's logits. Per tile: `start`, `measure` for each block, `finish`, `gradient` for each block."""

    def start(self, rows: slice) -> None: ...

    def measure(self, columns: slice, logits_CV: torch.Tensor) -> None:
        """Take in a block of the student's products (head times hidden state), which may be changed in place."""

    def finish(self) -> TokenLosses:
        """Per-token losses of the tile, float32 or float64."""

    def gradient(self, columns: slice, logits_CV: torch.Tensor, weight_C: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """weight times the derivative of the loss by the block's products, [C, V] in dtype; may reuse the block."""


def tiled_loss(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, weight_N: torch.Tensor, vocab_size: int, objective: Objective
) -> tuple[torch.Tensor, TokenLosses]:
    """(sum(weight_N * loss_N), which carries gradients to hidden states and head; per-token losses).

    vocab_size: real vocabulary; rows of the head beyond it are padding: they never count and get gradient 0.
    """
    walk = _Walk(hidden_ND, head_VD, vocab_size, objective)
    loss = _TiledLoss.apply(hidden_ND, head_VD, weight_N, walk, torch.is_grad_enabled())
    return loss, walk.losses


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, head_VD, weight_N, walk: "_Walk", with_gradients: bool):
        wants_hidden, wants_head = (wanted and with_gradients for wanted in ctx.needs_input_grad[:2])
        objective = walk.objective
        hidden_gradient_ND = torch.zeros_like(hidden_ND) if wants_hidden else None
        head_gradient_VD = walk.new_head_gradient() if wants_head else None
        losses = []
        for rows in walk.tiles():
            objective.start(rows)
            for columns, block_CV in walk.blocks(rows):
                product_into(block_CV, hidden_ND[rows], head_VD[columns])
                objective.measure(columns, block_CV)
            losses.append(objective.finish())
            hidden_gradient_CD = torch.zeros(hidden_ND[rows].shape, device=hidden_ND.device) if wants_hidden else None
            for columns, block_CV in walk.blocks(rows) if wants_hidden or wants_head else ():
                gradient_CV = objective.gradient(columns, block_CV, weight_N[rows], walk.product_dtype)
                if wants_hidden:
                    _add_product(hidden_gradient_CD, gradient_CV, head_VD[columns], is_first=columns.start == 0)
                if wants_head:
                    _add_product(head_gradient_VD[columns], gradient_CV.T, hidden_ND[rows], is_first=rows.start == 0)
            if wants_hidden:
                hidden_gradient_ND[rows] = hidden_gradient_CD.to(hidden_ND.dtype)
        walk.losses = _join(losses, hidden_ND.device)
        ctx.gradients = (hidden_gradient_ND, None if head_gradient_VD is None else head_gradient_VD.to(head_VD.dtype))
        return (weight_N * walk.losses.loss_N).sum()

    @staticmethod
    def backward(ctx, scale):
        assert ctx.gradients is not None, "the gradients of a tiled loss are scaled in place: backward runs once"
        gradients, ctx.gradients = ctx.gradients, None
        if scale.device.type != "cpu" or scale != 1:
            gradients = [gradient if gradient is None else gradient.mul_(scale) for gradient in gradients]
        return *gradients, None, None, None


class _Walk:
    """Tiles of rows and blocks of columns, with the buffers that hold one tile's logits; in the end the per-token losses."""

    def __init__(self, hidden_ND: torch.Tensor, head_VD: torch.Tensor, vocab_size: int, objective: Objective):
        self.objective, self.losses = objective, None
        self.num_tokens, self.head_VD, self.vocab_size = len(hidden_ND), head_VD, vocab_size
        self.num_rows = min(self.num_tokens, tile_rows(hidden_ND.device, vocab_size))
        self.columns = blocks_of(hidden_ND.device, vocab_size)
        self.buffers = new_buffers(self.num_rows, self.columns, hidden_ND.device)
        self.product_dtype = head_VD.dtype if enter_as_they_are(hidden_ND, head_VD) else torch.float32

    def tiles(self) -> Iterator[slice]:
        for start in range(0, self.num_tokens, max(1, self.num_rows)):
            yield slice(start, min(start + self.num_rows, self.num_tokens))

    def blocks(self, rows: slice) -> Iterator[tuple[slice, torch.Tensor]]:
        for columns, buffer_CV in zip(self.columns, self.buffers, strict=True):
            yield columns, buffer_CV[: rows.stop - rows.start]

    def new_head_gradient(self) -> torch.Tensor:
        """float32 [V, D]; the rows that the first tile does not write are 0."""
        gradient_VD = torch.empty(self.head_VD.shape, device=self.head_VD.device)
        gradient_VD[self.vocab_size if self.num_tokens else 0 :] = 0
        return gradient_VD


def tile_rows(device: torch.device, vocab_size: int) -> int:
    """C: tokens of a tile; a multiple of 16 where there are so many, since matrix products like it."""
    rows = max(1, TILE_ELEMENTS["cpu" if device.type == "cpu" else "cuda"] // vocab_size)
    return rows if rows < 16 else rows // 16 * 16


def blocks_of(device: torch.device, vocab_size: int) -> list[slice]:
    width = BLOCK_COLUMNS if device.type == "cpu" else vocab_size
    return [slice(start, min(start + width, vocab_size)) for start in range(0, vocab_size, width)]


def new_buffers(num_rows: int, columns: list[slice], device: torch.device) -> list[torch.Tensor]:
    """One float32 buffer [C, V] for each block."""
    return [torch.empty(num_rows, block.stop - block.start, device=device) for block in columns]


def join_blocks(maximum_BC: torch.Tensor, total_BC: torch.Tensor, moment_BC: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(maximum_C, total_C, moment_C, factor_BC) of rows that were measured in B blocks: with e = exp(z - maximum), sum e and sum e (z - maximum).

    The factor takes a block's sum of terms e x to the common maximum.
    """
    maximum_C = maximum_BC.amax(0)
    shift_BC = maximum_BC - maximum_C
    factor_BC = shift_BC.exp()
    return maximum_C, (total_BC * factor_BC).sum(0), ((moment_BC + shift_BC * total_BC) * factor_BC).sum(0), factor_BC


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, is_first: bool) -> None:
    """total += left times right in float32; the first product is written without reading `total`."""
    if enter_as_they_are(left, right):
        if is_first:
            torch.mm(left, right, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    elif is_first:
        torch.mm(left, right.float(), out=total)
    else:
        torch.addmm(total, left, right.float(), out=total)


def _join(losses: list[TokenLosses], device: torch.device) -> TokenLosses:
    """The tiles' figures, one after another."""
    columns = []
    for name in TokenLosses.__slots__:
        parts = [getattr(tile, name) for tile in losses]
        columns.append(torch.cat(parts).float() if parts and parts[0] is not None else None)
    if not losses:
        columns[:2] = [torch.zeros(0, device=device), torch.zeros(0, device=device)]
    return TokenLosses(*columns)
