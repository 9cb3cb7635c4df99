"""Exact losses over the whole vocabulary from hidden states and heads, without a [tokens, vocabulary] matrix.

Reverse KL per token, with student logits z = W h, teacher logits z' = W' h', p = softmax(z), q = softmax(z'):

    kl = sum_v p_v (log p_v - log q_v)            d kl / d z_v = p_v (log p_v - log q_v - kl)

The tokens are walked in tiles of C rows, C times V under a fixed budget. The caller's weights are known in the forward, so
each tile's gradient with respect to hidden states and head is formed there and then, from logits that are in hand, and the
backward only scales it: no tile is computed twice, and nothing is needed from the weights later, which is what lets a
partitioned head (ZeRO-3) be released after the forward. Autograd over chunks was rejected: it keeps every tile or recomputes it.

N: tokens. D: hidden size. V: vocabulary. C: tokens of a tile. S: statistics per token. Statistics are in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

TILE_ELEMENTS = 1 << 23
"""Logits of one tile: 8 M elements, 32 MiB in float32."""

TileLoss = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""(student logits of a tile [C, V] in float32, which rows) -> (loss_C, its gradient by the logits [C, V], statistics_CS)."""


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """Per-token results, detached, float32.

    loss_N: the divergence (or negative log-likelihood) of each token, in nats.
    student_entropy_N, teacher_entropy_N: nats; the teacher's is None where there is no teacher.
    """

    loss_N: torch.Tensor
    student_entropy_N: torch.Tensor
    teacher_entropy_N: torch.Tensor | None


def reverse_kl(
    student_hidden_ND: torch.Tensor,
    student_head_VD: torch.Tensor,
    teacher_hidden_ND: torch.Tensor,
    teacher_head_VD: torch.Tensor,
    weight_N: torch.Tensor,
    vocab_size: int,
) -> tuple[torch.Tensor, TokenLosses]:
    """KL(student || teacher) of every token over the whole vocabulary (arXiv:2606.19348, 5.1.2).

    vocab_size: real vocabulary; rows of a head beyond it are padding and never count.
    Returns (sum(weight_N * kl_N), which carries gradients to the student's hidden states and head; per-token losses).
    """

    def tile_loss(logits_CV: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        teacher_logits_CV = (teacher_hidden_ND[rows] @ teacher_head_VD[:vocab_size].T).float()
        log_p_CV = torch.log_softmax(logits_CV, dim=-1)
        log_q_CV = torch.log_softmax(teacher_logits_CV, dim=-1)
        p_CV, q_CV = log_p_CV.exp(), log_q_CV.exp()
        student_entropy_C, teacher_entropy_C = -(p_CV * log_p_CV).sum(-1), -(q_CV * log_q_CV).sum(-1)
        ratio_CV = log_p_CV - log_q_CV
        kl_C = (p_CV * ratio_CV).sum(-1)
        return kl_C, p_CV * (ratio_CV - kl_C[:, None]), torch.stack([student_entropy_C, teacher_entropy_C], dim=1)

    loss, loss_N, statistics_NS = _TiledLoss.apply(student_hidden_ND, student_head_VD, weight_N, vocab_size, tile_loss, torch.is_grad_enabled())
    return loss, TokenLosses(loss_N, statistics_NS[:, 0], statistics_NS[:, 1])


def cross_entropy(
    student_hidden_ND: torch.Tensor, student_head_VD: torch.Tensor, target_N: torch.Tensor, weight_N: torch.Tensor, vocab_size: int
) -> tuple[torch.Tensor, TokenLosses]:
    """Negative log-likelihood of the target tokens (supervised fine-tuning); returns as `reverse_kl` does."""

    def tile_loss(logits_CV: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        log_p_CV = torch.log_softmax(logits_CV, dim=-1)
        target_C1 = target_N[rows, None]
        gradient_CV = log_p_CV.exp()
        entropy_C1 = -(gradient_CV * log_p_CV).sum(-1, keepdim=True)
        gradient_CV.scatter_add_(1, target_C1, torch.full_like(target_C1, -1, dtype=gradient_CV.dtype))
        return -log_p_CV.gather(1, target_C1)[:, 0], gradient_CV, entropy_C1

    loss, loss_N, statistics_NS = _TiledLoss.apply(student_hidden_ND, student_head_VD, weight_N, vocab_size, tile_loss, torch.is_grad_enabled())
    return loss, TokenLosses(loss_N, statistics_NS[:, 0], None)


class _TiledLoss(torch.autograd.Function):
    """sum(weight_N * loss_N) with its gradients formed tile by tile in the forward."""

    @staticmethod
    def forward(ctx, hidden_ND, head_VD, weight_N, vocab_size: int, tile_loss: TileLoss, with_gradients: bool):
        rows_per_tile = max(1, TILE_ELEMENTS // vocab_size)
        head_gradient_VD = torch.zeros_like(head_VD, dtype=torch.float32) if with_gradients else None
        hidden_gradient_ND = torch.zeros_like(hidden_ND) if with_gradients else None
        losses, statistics = [], []
        for start in range(0, len(hidden_ND), rows_per_tile):
            rows = slice(start, start + rows_per_tile)
            logits_CV = (hidden_ND[rows] @ head_VD[:vocab_size].T).float()
            loss_C, gradient_CV, statistics_CS = tile_loss(logits_CV, rows)
            if with_gradients:
                gradient_CV = (gradient_CV * weight_N[rows, None]).to(hidden_ND.dtype)
                hidden_gradient_ND[rows] = gradient_CV @ head_VD[:vocab_size]
                head_gradient_VD[:vocab_size] += gradient_CV.T @ hidden_ND[rows]
            losses.append(loss_C)
            statistics.append(statistics_CS)
        loss_N, statistics_NS = torch.cat(losses), torch.cat(statistics)
        if with_gradients:
            ctx.save_for_backward(hidden_gradient_ND, head_gradient_VD.to(head_VD.dtype))
        ctx.mark_non_differentiable(loss_N, statistics_NS)
        return (weight_N * loss_N).sum(), loss_N, statistics_NS

    @staticmethod
    def backward(ctx, scale, _loss_N, _statistics_NS):
        hidden_gradient_ND, head_gradient_VD = ctx.saved_tensors
        return hidden_gradient_ND * scale, head_gradient_VD * scale, None, None, None, None
