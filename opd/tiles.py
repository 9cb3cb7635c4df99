"""Losses on a student's logits, tile by tile: no [tokens, vocabulary] matrix exists, and no matrix product is made twice.

A tile is C tokens by the whole vocabulary, C times V under a fixed budget whatever N; within it the vocabulary is walked in blocks, so that the
element-wise passes find their numbers in the cache. Each tile is walked twice: products and statistics, then gradient and products. The
caller's token weights are known in the forward, so the gradients by hidden states and head are formed there and then, and the
backward only scales them: four matrix products with a teacher's head (three without), none repeated, and nothing is needed from the
weights later, which is what lets a partitioned head (ZeRO-3) be released after the forward. Autograd over chunks was
rejected: it keeps every tile or computes it again.

N: tokens. C: tokens of a tile. D: hidden size. V: vocabulary, of a block: its columns. B: blocks.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from rollout.logits import enter_as_they_are, product_into

TILE_ELEMENTS = {"cpu": 10_000_000, "cuda": 1 << 28}
"""Logits of one tile of one model: 38 MiB of float32 on a CPU, 1 GiB on a GPU (2,064 tokens of DeepSeek-V4)."""

BLOCK_COLUMNS = 8192
"""Columns of a block on a CPU: a row of it is 32 KiB, the first cache. A GPU takes the whole vocabulary at once."""


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """Per-token results [N], detached, float32, in nats; None where there is no such figure.

    loss_N: the divergence of each token, as it enters the loss: its negative log-likelihood in supervised training; from a sampled token an
        estimate, which may be negative and of which a cap bounds the gradient only.
    student_entropy_N, teacher_entropy_N: of the distributions compared.
    student_tail_N, teacher_tail_N: probability outside the teacher's top-k.
    capped_N: 1 where loss.cap, or GRPO's clip of the ratio, acts on the token, else 0.
    target_logprob_N: the student's log-probability of the token that was sampled, where `Targets` ask for it.
    reference_kl_N: the reverse KL from GRPO's reference.
    likeliest, compared: opd/likeliest.py, of a micro-batch that is inspected, or compared.
    """

    loss_N: torch.Tensor
    student_entropy_N: torch.Tensor
    teacher_entropy_N: torch.Tensor | None = None
    student_tail_N: torch.Tensor | None = None
    teacher_tail_N: torch.Tensor | None = None
    capped_N: torch.Tensor | None = None
    target_logprob_N: torch.Tensor | None = None
    reference_kl_N: torch.Tensor | None = None
    likeliest: Any = None
    compared: Any = None


@dataclass(frozen=True, slots=True)
class Targets:
    """Sampled tokens [N], and the temperature at which their log-probability is wanted; None: it is not."""

    token_N: torch.Tensor
    temperature: float | None = None


class Objective(Protocol):
    """A loss on the student's logits. Per tile: `start`, `measure` for each block, `finish`, `gradient` for each block."""

    def start(self, rows: slice) -> None: ...

    def measure(self, columns: slice, logits_CV: torch.Tensor) -> None:
        """Take in a block of the student's products (head times hidden state), which may be changed in place."""

    def finish(self) -> TokenLosses:
        """Per-token losses of the tile, float32 or float64."""

    def gradient(self, columns: slice, logits_CV: torch.Tensor, weight_C: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """weight times the derivative of the loss by the block's products, [C, V] in dtype; may reuse the block."""


class NormalisedObjective(Objective, Protocol):
    """One whose `measure` leaves logits in the block, and that has after `finish` the logarithm of their sum of exponentials."""

    log_total_C: torch.Tensor


class WithTargets:
    """An objective that also gives the log-probability of one token per row, read off the blocks that it has in hand.

    At the temperature of the objective's own logits that costs a look-up; at another one it costs a pass over each block, but no product.
    """

    def __init__(self, objective: NormalisedObjective, targets: Targets, temperature: float):
        """temperature: by which the objective's logits are divided."""
        self.objective, self.targets, self.factor = objective, targets, temperature / targets.temperature

    def start(self, rows: slice) -> None:
        self.objective.start(rows)
        self.token_C = self.targets.token_N[rows]
        self.logit_C = torch.zeros(self.token_C.shape, device=self.token_C.device)
        self.log_totals: list[torch.Tensor] = []

    def measure(self, columns: slice, logits_CV: torch.Tensor) -> None:
        self.objective.measure(columns, logits_CV)
        inside_C, local_C = inside(self.token_C, columns)
        self.logit_C += logits_CV.gather(1, local_C[:, None])[:, 0] * inside_C
        if self.factor != 1:
            self.log_totals.append((logits_CV * self.factor).logsumexp(1))

    def finish(self) -> TokenLosses:
        losses = self.objective.finish()
        log_total_C = self.objective.log_total_C if self.factor == 1 else torch.stack(self.log_totals).double().logsumexp(0)
        return replace(losses, target_logprob_N=self.logit_C.double() * self.factor - log_total_C)

    def gradient(self, columns: slice, logits_CV: torch.Tensor, weight_C: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.objective.gradient(columns, logits_CV, weight_C, dtype)


def inside(token: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """(whether each token lies in a block of columns, its number there)."""
    is_inside = (token >= columns.start) & (token < columns.stop)
    return is_inside, torch.where(is_inside, token - columns.start, 0)


def with_targets(objective: NormalisedObjective, targets: Targets | None, temperature: float = 1.0) -> Objective:
    """The objective as it is, where no log-probability is wanted; `temperature` is that of its logits."""
    return objective if targets is None or targets.temperature is None else WithTargets(objective, targets, temperature)


def tiled_loss(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, weight_N: torch.Tensor, vocab_size: int, objective: Objective
) -> tuple[torch.Tensor, TokenLosses]:
    """(sum(weight_N * loss_N), which carries gradients to hidden states and head; per-token losses).

    vocab_size: real vocabulary; rows of the head beyond it are padding: they never count and get gradient 0.

    Raises ValueError for shapes that do not fit, and for weights that ask for a gradient, which they would not get.
    """
    if hidden_ND.dim() != 2 or head_VD.dim() != 2 or hidden_ND.shape[1] != head_VD.shape[1] or weight_N.shape != hidden_ND.shape[:1]:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (hidden_ND, head_VD, weight_N))
        raise ValueError(f"hidden states [N, D], head [V, D] and weights [N] do not fit: {shapes}")
    if not 1 <= vocab_size <= len(head_VD):
        raise ValueError(f"a vocabulary of {vocab_size} does not fit a head of {len(head_VD)} rows")
    if weight_N.requires_grad:
        raise ValueError("the weights of tokens get no gradient: detach them")
    wanted = (torch.is_grad_enabled() and hidden_ND.requires_grad, torch.is_grad_enabled() and head_VD.requires_grad)
    with torch.no_grad():
        losses, *gradients = _walk(hidden_ND, head_VD, weight_N, vocab_size, objective, wanted)
        loss = (weight_N * losses.loss_N).sum()
    return _WithGradients.apply(hidden_ND, head_VD, loss, *gradients), losses


class _WithGradients(torch.autograd.Function):
    """A number whose gradients by hidden states and head are known already."""

    @staticmethod
    def forward(ctx, hidden_ND, head_VD, loss, hidden_gradient_ND, head_gradient_VD):
        ctx.gradients = (hidden_gradient_ND, head_gradient_VD)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a tiled loss are scaled in place: backward runs once")
        gradients, ctx.gradients = ctx.gradients, None
        if scale.device.type != "cpu" or scale != 1:
            gradients = [gradient if gradient is None else gradient.mul_(scale) for gradient in gradients]
        return *gradients, None, None, None


def _walk(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, weight_N: torch.Tensor, vocab_size: int, objective: Objective, wanted: tuple[bool, bool]
) -> tuple[TokenLosses, torch.Tensor | None, torch.Tensor | None]:
    """(per-token losses, gradient by the hidden states, by the head); wanted: which of the gradients."""
    wants_hidden, wants_head = wanted
    num_tokens, device = len(hidden_ND), hidden_ND.device
    num_rows, columns_of = min(num_tokens, tile_rows(device, vocab_size)), blocks_of(device, vocab_size)
    buffers = [torch.empty(num_rows, columns.stop - columns.start, device=device) for columns in columns_of]
    dtype = head_VD.dtype if enter_as_they_are(hidden_ND, head_VD) else torch.float32
    hidden_gradient_ND = torch.empty(hidden_ND.shape, device=device) if wants_hidden else None
    head_gradient_VD = torch.empty(head_VD.shape, device=device) if wants_head else None
    if wants_head:
        head_gradient_VD[vocab_size if num_tokens else 0 :] = 0  # what the first tile does not write
    losses = []
    for start in range(0, num_tokens, max(1, num_rows)):
        rows = slice(start, min(start + num_rows, num_tokens))
        blocks = [(columns, buffer_CV[: rows.stop - start]) for columns, buffer_CV in zip(columns_of, buffers, strict=True)]
        objective.start(rows)
        for columns, block_CV in blocks:
            product_into(block_CV, hidden_ND[rows], head_VD[columns])
            objective.measure(columns, block_CV)
        losses.append(objective.finish())
        for columns, block_CV in blocks if wants_hidden or wants_head else ():
            gradient_CV = objective.gradient(columns, block_CV, weight_N[rows], dtype)
            if wants_hidden:
                _add_product(hidden_gradient_ND[rows], gradient_CV, head_VD[columns], is_first=columns.start == 0)
            if wants_head:
                _add_product(head_gradient_VD[columns], gradient_CV.T, hidden_ND[rows], is_first=start == 0)
    gradients = (None if total is None else total.to(like.dtype) for total, like in ((hidden_gradient_ND, hidden_ND), (head_gradient_VD, head_VD)))
    return _join(losses, device), *gradients


def tile_rows(device: torch.device, vocab_size: int) -> int:
    """C: tokens of a tile; a multiple of 16 where there are so many, since matrix products like it."""
    rows = max(1, TILE_ELEMENTS["cpu" if device.type == "cpu" else "cuda"] // vocab_size)
    return rows if rows < 16 else rows // 16 * 16


def blocks_of(device: torch.device, vocab_size: int) -> list[slice]:
    width = BLOCK_COLUMNS if device.type == "cpu" else vocab_size
    return [slice(start, min(start + width, vocab_size)) for start in range(0, vocab_size, width)]


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
    for field in fields(TokenLosses):
        parts = [getattr(tile, field.name) for tile in losses]
        columns.append(torch.cat(parts).float() if parts and parts[0] is not None else None)
    if not losses:
        columns[:2] = [torch.zeros(0, device=device), torch.zeros(0, device=device)]
    return TokenLosses(*columns)
