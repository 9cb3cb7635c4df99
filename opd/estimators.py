"""The loss of a token from what its teacher gives: its whole distribution, its top-k with a tail, or one log-probability.

`distillation_loss` is the one interface; what stands in `signal` decides:

    ModelStates     hidden states and head: the exact divergence over the whole vocabulary (opd/divergence.py)
    TopK            the teacher's k likeliest tokens. All others are one more outcome, the tail, for teacher and student alike: a proper
                    divergence of two coarser distributions, 0 only where they agree and never above the exact one
    SampledToken    the log-probability of the token that was sampled: policy gradient, whose mean over samples is reverse KL's gradient.
                    With ModelStates and policy_gradient=True the exact reverse KL is the baseline, which keeps the mean and
                    usually lowers the variance

GRPO's loss is here too (`grpo_loss`): a clipped policy gradient whose advantages are grades in place of a teacher's opinion, and the exact reverse KL to a
reference.

Two shortcuts cannot be expressed here. A sum over the top-k alone is no divergence: it is least at p = q / e, where it pays the student to
move 63 % of the mass that belongs into the teacher's top-k out of it; renormalised, it ignores what lies outside. And k1 = log p(y) - log q(y), differentiated
as a loss, has the gradient sum_v p_v grad log p_v = 0 on average, so it does not learn (tests/opd/test_estimators.py shows both).

Student-only losses need one product with the head and its two gradients; all their gradients by the logits have one form, a_C p + b at K columns.

N: tokens. C: tokens of a tile. D: hidden size. V: vocabulary, of a block: its columns. K: columns of interest. B: blocks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from opd.batch import MicroBatch
from opd.divergence import ModelStates, full_divergence, make_formula
from opd.divergence_passes import Formula, divergence_terms, transform_slope
from opd.grpo_config import GrpoConfig
from opd.loss_config import DivergenceKind, LossConfig
from opd.tiles import Targets, TokenLosses, inside, join_blocks, tiled_loss, with_targets
from rollout.logits import transform_
from rollout.model import backbone_of, head_of
from rollout.types import IDENTITY, LogitTransform
from teachers.config import SignalKind
from teachers.types import OutputHead

SMALLEST_TAIL = 2.0**-23
"""Least probability of a tail: float32 log-probabilities of a top-k do not add up to 1 more exactly."""


SMALLEST_LOGPROB = -1e4
"""In place of -inf, which 0 times gives NaN."""


@dataclass(frozen=True, slots=True)
class TopK:
    """A teacher's likeliest tokens and their log-probabilities over the whole vocabulary, [N, K] each, at temperature 1."""

    token_NK: torch.Tensor
    logprob_NK: torch.Tensor


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A teacher's log-probability of each sampled token, at temperature 1; and the exact reverse KL, where it is known."""

    logprob_N: torch.Tensor
    baseline_N: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class GradedTokens:
    """The student's own tokens [N], their log-probability under what sampled them, and the advantage of each one's completion."""

    token_N: torch.Tensor
    logprob_N: torch.Tensor
    advantage_N: torch.Tensor


def distillation_loss(
    student: ModelStates,
    signal: ModelStates | TopK | SampledToken,
    sampled: Targets,
    weight_N: torch.Tensor,
    cfg: LossConfig,
    vocab_size: int,
) -> tuple[torch.Tensor, TokenLosses]:
    """(sum(weight_N * loss_N) with gradients to the student's hidden states and head; per-token losses).

    sampled: the student's tokens, which the policy gradient needs; and whether the student's log-probability of them is wanted.
    vocab_size: real vocabulary; rows of a head beyond it never count.

    Raises ValueError for settings that do not fit the signal.
    """
    is_sampled = isinstance(signal, SampledToken) or cfg.policy_gradient
    if is_sampled and (cfg.kind is not DivergenceKind.reverse_kl or cfg.smoothing or cfg.temperature != 1 or sampled.temperature not in (None, 1)):
        raise ValueError("a sampled token estimates plain reverse KL at temperature 1 alone")
    if isinstance(signal, TopK) and (cfg.temperature != 1 or cfg.policy_gradient):
        raise ValueError("a top-k has no other temperature than 1, and no baseline for a policy gradient")
    if isinstance(signal, SampledToken):
        if cfg.constant_penalty:
            loss, losses = constant_penalty(student, sampled.token_N, signal, weight_N, vocab_size)
        else:
            loss, losses = policy_gradient(student, sampled.token_N, signal, weight_N, vocab_size, cfg.cap)
        return loss, losses if sampled.temperature else replace(losses, target_logprob_N=None)
    if isinstance(signal, TopK):
        return top_k_divergence(student, signal, weight_N, cfg, vocab_size, sampled)
    if not cfg.policy_gradient:
        return full_divergence(student, signal, weight_N, cfg, vocab_size, sampled)
    with torch.no_grad():
        _, exact = full_divergence(student, signal, weight_N, replace(cfg, cap=None), vocab_size, sampled)
        _, scored = cross_entropy(signal, sampled.token_N, weight_N, vocab_size)
    loss, losses = policy_gradient(student, sampled.token_N, SampledToken(-scored.loss_N, exact.loss_N), weight_N, vocab_size, cfg.cap)
    return loss, replace(losses, teacher_entropy_N=exact.teacher_entropy_N, target_logprob_N=exact.target_logprob_N)


def student_states(model: PreTrainedModel, batch: MicroBatch, transform: LogitTransform) -> ModelStates:
    """The student's states that predict the completion tokens of a micro-batch."""
    hidden = backbone_of(model)(input_ids=batch.tokens_BL, position_ids=batch.position_ids_BL, use_cache=False)[0]
    return ModelStates(hidden.flatten(0, 1)[batch.position_N], head_of(model).weight, transform)


def signal_of(batch: MicroBatch, teacher_head: OutputHead | None) -> ModelStates | TopK | SampledToken | None:
    """What the teacher of a micro-batch gave; None for supervised examples."""
    if batch.signal is None:
        return None
    if batch.signal is SignalKind.top_k:
        return TopK(batch.teacher_token_NK, batch.teacher_logprob_NK)
    if batch.signal is SignalKind.sampled_token:
        return SampledToken(batch.teacher_logprob_NK[:, 0])
    return ModelStates(batch.teacher_hidden_ND, teacher_head.weight_VD, teacher_head.transform)


def cross_entropy(student: ModelStates, target_N: torch.Tensor, weight_N: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, TokenLosses]:
    """Negative log-likelihood of the target tokens (supervised fine-tuning); returns as `distillation_loss` does."""

    def coefficients(logprob_CK: torch.Tensor, rows: slice) -> "_Coefficients":
        ones_C = torch.ones_like(logprob_CK[:, 0])
        return _Coefficients(-logprob_CK[:, 0], everywhere_C=ones_C, at_CK=-ones_C[:, None])

    return _loss_at_columns(student, target_N[:, None], weight_N, vocab_size, coefficients)


def policy_gradient(
    student: ModelStates,
    sampled_N: torch.Tensor,
    teacher: SampledToken,
    weight_N: torch.Tensor,
    vocab_size: int,
    cap: float | None = None,
) -> tuple[torch.Tensor, TokenLosses]:
    """-A log p(y) with the advantage A = log q(y) - log p(y) held constant; with the reverse KL as baseline, A + KL.

    The sampled token must come from the student as it is: temperature 1 and no top-p. The value of loss_N is the baseline (exact) or
    log p(y) - log q(y), an unbiased estimate that may be negative; the gradient is that of -A log p(y).
    cap: A, baseline included, is clipped to this size, which biases it.
    """

    def coefficients(logprob_CK: torch.Tensor, rows: slice) -> "_Coefficients":
        estimate_C = logprob_CK[:, 0] - teacher.logprob_N[rows]
        exact_C = estimate_C if teacher.baseline_N is None else teacher.baseline_N[rows].double()
        advantage_C = -estimate_C if teacher.baseline_N is None else exact_C - estimate_C
        is_capped_C = None if cap is None else advantage_C.abs() > cap
        advantage_C = advantage_C if cap is None else advantage_C.clamp(-cap, cap)
        return _Coefficients(exact_C, everywhere_C=advantage_C, at_CK=-advantage_C[:, None], capped_C=is_capped_C)

    return _loss_at_columns(student, sampled_N[:, None], weight_N, vocab_size, coefficients, Targets(sampled_N, temperature=1.0))


def constant_penalty(
    student: ModelStates, sampled_N: torch.Tensor, teacher: SampledToken, weight_N: torch.Tensor, vocab_size: int
) -> tuple[torch.Tensor, TokenLosses]:
    """-A log p(y) with A = -1 where p(y) < 1/2, else 0: what sharpening alone does. loss_N is log p(y) - log q(y) as of `policy_gradient`, to be compared."""

    def coefficients(logprob_CK: torch.Tensor, rows: slice) -> "_Coefficients":
        advantage_C = -(logprob_CK[:, 0] < math.log(0.5)).double()
        return _Coefficients(logprob_CK[:, 0] - teacher.logprob_N[rows], everywhere_C=advantage_C, at_CK=-advantage_C[:, None])

    return _loss_at_columns(student, sampled_N[:, None], weight_N, vocab_size, coefficients, Targets(sampled_N, temperature=1.0))


def grpo_loss(
    student: ModelStates, reference: ModelStates | None, graded: GradedTokens, weight_N: torch.Tensor, cfg: GrpoConfig, vocab_size: int
) -> tuple[torch.Tensor, TokenLosses]:
    """The clipped policy gradient plus cfg.kl times the exact KL(student || reference) of each token; returns as `distillation_loss` does."""
    loss, losses = clipped_policy_gradient(student, graded, weight_N, cfg, vocab_size)
    if reference is None:
        return loss, losses
    exact, distance = full_divergence(student, reference, weight_N, LossConfig(), vocab_size)
    return loss + cfg.kl * exact, replace(losses, loss_N=losses.loss_N + cfg.kl * distance.loss_N, reference_kl_N=distance.loss_N)


def clipped_policy_gradient(
    student: ModelStates, graded: GradedTokens, weight_N: torch.Tensor, cfg: GrpoConfig, vocab_size: int
) -> tuple[torch.Tensor, TokenLosses]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = p_trainer / p_sampler of the sampled token (PPO, arXiv:1707.06347), whose gradient is that
    of -r A, or 0 where the clip decides (capped_N).
    """

    def coefficients(logprob_CK: torch.Tensor, rows: slice) -> "_Coefficients":
        advantage_C = graded.advantage_N[rows].double()
        ratio_C = (logprob_CK[:, 0] - graded.logprob_N[rows].double()).exp()
        gain_C = ratio_C * advantage_C
        bounded_C = ratio_C.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * advantage_C
        is_clipped_C = bounded_C < gain_C
        slope_C = gain_C.masked_fill(is_clipped_C, 0)
        return _Coefficients(-torch.minimum(gain_C, bounded_C), everywhere_C=slope_C, at_CK=-slope_C[:, None], capped_C=is_clipped_C)

    return _loss_at_columns(student, graded.token_N[:, None], weight_N, vocab_size, coefficients, Targets(graded.token_N, temperature=1.0))


def top_k_divergence(
    student: ModelStates, teacher: TopK, weight_N: torch.Tensor, cfg: LossConfig, vocab_size: int, targets: Targets | None = None
) -> tuple[torch.Tensor, TokenLosses]:
    """The divergence of the distributions over K tokens and the tail; at most the exact one (log-sum inequality).

    Raises ValueError where a row names a token twice, or its probabilities add up to more than 1.
    """
    formula = make_formula(cfg, IDENTITY, IDENTITY)
    ordered_NK = teacher.token_NK.sort(dim=1).values
    if (ordered_NK[:, 1:] == ordered_NK[:, :-1]).any():
        raise ValueError("a teacher's top-k names a token twice")
    if (teacher.logprob_NK.exp().sum(1) > 1 + 1e-3).any():
        raise ValueError("the probabilities of a teacher's top-k add up to more than 1: they must be log-probabilities over the whole vocabulary")

    def coefficients(logprob_CK: torch.Tensor, rows: slice) -> "_Coefficients":
        return _coarse_divergence(logprob_CK, teacher.logprob_NK[rows].double().clamp(min=SMALLEST_LOGPROB), formula, cfg.cap)

    return _loss_at_columns(student, teacher.token_NK, weight_N, vocab_size, coefficients, targets)


def _coarse_divergence(student_CK: torch.Tensor, teacher_CK: torch.Tensor, formula: Formula, cap: float | None) -> "_Coefficients":
    """Value and gradient over K + 1 outcomes: with the derivative d_b of outcome b and E = sum_b p_b d_b, a logit v of outcome b gets p_v (d_b - E)."""
    student_CK, student_tail_C = _with_tail(student_CK)
    teacher_CK, teacher_tail_C = _with_tail(teacher_CK)
    p_CK = student_CK.exp()
    value_CK, slope_CK = divergence_terms(p_CK, teacher_CK.exp(), student_CK - teacher_CK, formula)
    loss_C, expectation_C = value_CK.sum(1), slope_CK.sum(1)
    tail_C = slope_CK[:, -1] / p_CK[:, -1]
    everywhere_C, at_CK = tail_C - expectation_C, slope_CK[:, :-1] - p_CK[:, :-1] * tail_C[:, None]
    is_capped_C = None if cap is None else loss_C > cap
    if cap is not None:
        loss_C, everywhere_C = loss_C.clamp(max=cap), everywhere_C.masked_fill(is_capped_C, 0)
        at_CK = at_CK.masked_fill(is_capped_C[:, None], 0)
    return _Coefficients(loss_C, everywhere_C, at_CK, student_tail_C, teacher_tail_C, is_capped_C)


def _with_tail(logprob_CK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities with the tail's as last column, probability of the tail)."""
    tail_C = (1 - logprob_CK.exp().sum(1)).clamp(min=SMALLEST_TAIL)
    return torch.cat([logprob_CK, tail_C.log()[:, None]], dim=1), tail_C


@dataclass(frozen=True, slots=True)
class _Coefficients:
    """A tile's losses and their gradient by the logits, everywhere_C * p + at_CK at the K columns; float64."""

    loss_C: torch.Tensor
    everywhere_C: torch.Tensor
    at_CK: torch.Tensor
    student_tail_C: torch.Tensor | None = None
    teacher_tail_C: torch.Tensor | None = None
    capped_C: torch.Tensor | None = None


CoefficientsOf = Callable[[torch.Tensor, slice], _Coefficients]
"""(log-probabilities [C, K] of the columns, which rows) -> the tile's losses and gradient."""


def _loss_at_columns(
    student: ModelStates, column_NK: torch.Tensor, weight_N: torch.Tensor, vocab_size: int, coefficients: CoefficientsOf, targets: Targets | None = None
) -> tuple[torch.Tensor, TokenLosses]:
    if len(column_NK) != len(student.hidden_ND):
        raise ValueError(f"{len(column_NK)} rows of tokens do not fit {len(student.hidden_ND)} hidden states")
    if ((column_NK < 0) | (column_NK >= vocab_size)).any():
        raise ValueError(f"a token lies outside the vocabulary of {vocab_size}: has its teacher another tokenizer?")
    objective = with_targets(_AtColumns(student.transform, column_NK, coefficients), targets)
    return tiled_loss(student.hidden_ND, student.head_VD, weight_N, vocab_size, objective)


class _AtColumns:
    """The Objective of opd/tiles.py for losses that depend on the log-probabilities of K columns per token."""

    def __init__(self, transform: LogitTransform, column_NK: torch.Tensor, coefficients: CoefficientsOf):
        self.transform, self.column_NK, self.coefficients = transform, column_NK, coefficients

    def start(self, rows: slice) -> None:
        self.rows, self.column_CK = rows, self.column_NK[rows]
        self.logit_CK = torch.zeros(self.column_CK.shape, device=self.column_CK.device)
        self.statistics: list[torch.Tensor] = []

    def measure(self, columns: slice, logits_CV: torch.Tensor) -> None:
        transform_(logits_CV, self.transform)
        inside_CK, local_CK = inside(self.column_CK, columns)
        self.logit_CK += logits_CV.gather(1, local_CK) * inside_CK
        maximum_C1 = logits_CV.amax(1, keepdim=True)
        centred_CV = logits_CV - maximum_C1
        power_CV = centred_CV.exp()
        self.statistics.append(torch.stack([maximum_C1[:, 0], power_CV.sum(1), centred_CV.mul_(power_CV).sum(1)]))

    def finish(self) -> TokenLosses:
        maximum_BC, total_BC, moment_BC = torch.stack(self.statistics).double().unbind(1)
        self.maximum_C, self.total_C, moment_C, _ = join_blocks(maximum_BC, total_BC, moment_BC)
        self.log_total_C = self.maximum_C + self.total_C.log()
        logprob_CK = self.logit_CK.double() - self.log_total_C[:, None]
        self.found = self.coefficients(logprob_CK, self.rows)
        entropy_C = self.total_C.log() - moment_C / self.total_C
        return TokenLosses(self.found.loss_C, entropy_C, None, self.found.student_tail_C, self.found.teacher_tail_C, self.found.capped_C)

    def gradient(self, columns: slice, logits_CV: torch.Tensor, weight_C: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        slope = transform_slope(logits_CV, self.transform)
        scale_C = (weight_C * self.found.everywhere_C / self.total_C).float()
        gradient_CV = logits_CV.sub_(self.maximum_C.float()[:, None]).exp_().mul_(scale_C[:, None])
        inside_CK, local_CK = inside(self.column_CK, columns)
        gradient_CV.scatter_add_(1, local_CK, (weight_C[:, None] * self.found.at_CK * inside_CK).float())
        return gradient_CV.mul_(slope).to(dtype)
