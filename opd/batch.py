"""Scored rollouts (or supervised examples) -> micro-batches, ordered by teacher, the same number on every rank.

Rows are padded on the right, never on the left: DeepSeek-V4's compressed attention pools tokens across whatever stands in its
windows. Packing puts all rollouts into one row whose position ids begin anew with each; it is offered for the families in
PACKING_FAMILIES, whose attention is shown by a test to keep the documents apart, and refused for all others. Masks come from
lengths, never from token ids, since the padding id may equal the end-of-sequence id.

Every rank runs the same number of forwards, because a partitioned model communicates in each: ranks that have fewer
micro-batches repeat their last one with weight 0.

B: rows. L: padded positions. N: completion tokens of the micro-batch, flattened. D: teacher's hidden size. M: layers with routed experts.
K: tokens named per position, or experts per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from opd.config import BatchConfig
from opd.distributed import Group, reduce_max
from rollout.padding import completion_span, group_by_length, pad_right, sequence_length
from rollout.types import Rollout
from teachers.config import SignalKind
from teachers.pool import TeacherPool
from teachers.types import ScoredRollout, TeacherSignal

PACKING_FAMILIES = ("qwen3", "qwen3_moe")
"""Model types for which tests/opd/test_packing.py shows equal logits, packed and alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What one forward and backward needs.

    tokens_BL: ids, right-padded (packed: one row). real_BL: False on padding.
    position_ids_BL: where each document of a packed row begins anew; None where rows are padded.
    position_N: index into the flattened [B * L] hidden states of the state that predicts each completion token.
    target_N: the completion tokens. mask_N: whether a token enters the loss.
    weight_N: float32, w_d / N_d on tokens of the loss and 0 elsewhere, so that the step's loss is sum(weight * divergence).
    rollout_N: index into `rollouts` of each token.
    sampled_logprob_N: float32, log-probability of each token when it was sampled.
    advantage_N: float32, of each token's completion over the others of its prompt (opd/grpo.py); None but in GRPO.
    teacher, signal: who scored and what was given; signal is None for supervised examples, in the filler of a rank whose teachers are dropped, and in
        GRPO without a reference, which else is the teacher.
    teacher_hidden_ND, teacher_token_NK, teacher_logprob_NK: what was given (teachers/types.py); the others are None.
    routes_NMK: the experts that the sampler chose for the state at position_N (rollout/routes.py); None where a rollout has no record.
    is_inspected, is_compared: whether the likeliest tokens at its worst ones, and figures of every sixteenth, are wanted (opd/likeliest.py).
    waiting: the rollouts' signals while their hidden states are in the pool's store; `with_hidden` brings them.
    """

    rollouts: tuple[Rollout, ...]
    tokens_BL: torch.Tensor
    real_BL: torch.Tensor
    position_N: torch.Tensor
    target_N: torch.Tensor
    mask_N: torch.Tensor
    weight_N: torch.Tensor
    rollout_N: torch.Tensor
    sampled_logprob_N: torch.Tensor
    position_ids_BL: torch.Tensor | None = None
    teacher: str | None = None
    signal: SignalKind | None = None
    teacher_hidden_ND: torch.Tensor | None = None
    teacher_token_NK: torch.Tensor | None = None
    teacher_logprob_NK: torch.Tensor | None = None
    routes_NMK: torch.Tensor | None = None
    advantage_N: torch.Tensor | None = None
    waiting: tuple[TeacherSignal, ...] = ()
    is_filler: bool = False
    is_inspected: bool = False
    is_compared: bool = False

    @property
    def is_sampled(self) -> bool:
        """Whether the loss is one on the student's own completions; else they are examples."""
        return self.signal is not None or self.advantage_N is not None

    @property
    def counted_BL(self) -> torch.Tensor:
        """real_BL without the rows (not packed ones) whose rollout has no token in the loss."""
        tokens_B = torch.zeros(len(self.tokens_BL), device=self.mask_N.device).index_add_(0, self.rollout_N, self.mask_N.float())
        return self.real_BL & (tokens_B > 0)[:, None]

    def to(self, device: torch.device) -> "MicroBatch":
        moved = {name: getattr(self, name).to(device) for name in _TENSORS if getattr(self, name) is not None}
        return replace(self, **moved)


_TENSORS = (
    "tokens_BL", "real_BL", "position_ids_BL", "position_N", "target_N", "mask_N", "weight_N", "rollout_N", "sampled_logprob_N",
    "teacher_hidden_ND", "teacher_token_NK", "teacher_logprob_NK", "routes_NMK", "advantage_N",
)  # fmt: skip


def require_packing(family: str) -> None:
    """Raises ValueError for a family whose attention would see other documents in a packed row."""
    if family not in PACKING_FAMILIES:
        raise ValueError(
            f"batch.packing=true is not available for {family}, whose attention would see the other documents of the row "
            f"(on DeepSeek-V4 the logits change by 0.20); it is for {', '.join(PACKING_FAMILIES)}: set batch.packing=false"
        )


def distillation_batches(scored: list[ScoredRollout], token_weight: dict[str, float], cfg: BatchConfig, least: int = 0) -> list[MicroBatch]:
    """Micro-batches of one rank, each with one teacher and `least` positions or more in a row; `token_weight` is w_d / N_d per domain. Every rank calls it."""
    return _same_number_on_every_rank(teacher_batches(scored, token_weight, cfg, least))


def teacher_batches(scored: list[ScoredRollout], token_weight: dict[str, float], cfg: BatchConfig, least: int = 0) -> list[MicroBatch]:
    """As `distillation_batches`, for this rank alone: the number of micro-batches may differ between ranks."""
    by_teacher: dict[str, list[ScoredRollout]] = {}
    for item in scored:
        by_teacher.setdefault(item.signal.teacher, []).append(item)
    batches = []
    for teacher, items in by_teacher.items():
        for group in _groups([item.rollout for item in items], cfg):
            batch = _micro_batch([items[i].rollout for i in group], token_weight, cfg.packing, least)
            batches.append(replace(batch, teacher=teacher, **_signals([items[i].signal for i in group])))
    return batches


def _signals(signals: list[TeacherSignal]) -> dict[str, Any]:
    """The teacher's fields of a micro-batch, from those of its rollouts."""
    (kind,) = {signal.kind for signal in signals}
    if kind is None:
        return {"is_filler": True}
    if kind is SignalKind.hidden_states:
        if any(signal.stored is not None for signal in signals):
            return {"signal": kind, "waiting": tuple(signals)}
        return {"signal": kind, "teacher_hidden_ND": torch.cat([signal.hidden_TD for signal in signals])}
    tokens, logprobs = torch.cat([signal.token_TK for signal in signals]), torch.cat([signal.logprob_TK for signal in signals])
    return {"signal": kind, "teacher_token_NK": tokens, "teacher_logprob_NK": logprobs}


def with_hidden(batch: MicroBatch, teachers: TeacherPool, keep: bool = False) -> MicroBatch:
    """The micro-batch with its teacher's hidden states, taken from the pool's store, where they then are no more unless kept; a filler's are 0."""
    if not batch.waiting:
        return batch
    if batch.is_filler:
        stored = batch.waiting[0].stored
        hidden_ND = torch.zeros(len(batch.target_N), stored.shape[1], dtype=stored.dtype)
    else:
        hidden_ND = torch.cat([teachers.hidden(signal, rollout, keep) for signal, rollout in zip(batch.waiting, batch.rollouts, strict=True)])
    return replace(batch, teacher_hidden_ND=hidden_ND, waiting=())


def forward_batches(scored: list[ScoredRollout], teachers: TeacherPool, device: torch.device) -> Iterator[MicroBatch]:
    """This rank's micro-batches for looking, not for training: every token weighs 1, as large as the teachers' forwards, each with what its teacher gave."""
    whole = BatchConfig(max_tokens_per_micro_batch=teachers.cfg.max_tokens_per_forward)
    for batch in teacher_batches(scored, {item.rollout.prompt.domain: 1.0 for item in scored}, whole):
        yield with_hidden(batch, teachers).to(device)


def supervised_batches(examples: list[Rollout], token_weight: dict[str, float], cfg: BatchConfig, least: int = 0) -> list[MicroBatch]:
    """Micro-batches of one rank for training on the examples' completion tokens, with `least` positions or more in a row. Every rank calls it."""
    groups = _groups(examples, cfg)
    return _same_number_on_every_rank([_micro_batch([examples[i] for i in group], token_weight, cfg.packing, least) for group in groups])


def _groups(rollouts: list[Rollout], cfg: BatchConfig) -> list[list[int]]:
    """Indices of the rollouts of each micro-batch; a packed one has no padding, so its tokens are a sum."""
    lengths = [sequence_length(rollout) for rollout in rollouts]
    if not cfg.packing:
        return group_by_length(lengths, cfg.max_tokens_per_micro_batch)
    groups: list[list[int]] = [[]]
    for index, length in enumerate(lengths):
        if groups[-1] and sum(lengths[i] for i in groups[-1]) + length > cfg.max_tokens_per_micro_batch:
            groups.append([])
        groups[-1].append(index)
    return groups


def _micro_batch(rollouts: list[Rollout], token_weight: dict[str, float], packing: bool, least: int) -> MicroBatch:
    lengths = [sequence_length(rollout) for rollout in rollouts]
    if packing:
        tokens_BL = torch.cat([pad_right([rollout])[0] for rollout in rollouts])[None]
        position_ids_BL = torch.cat([torch.arange(length) for length in lengths])[None]
        real_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
        starts = [sum(lengths[:row]) for row in range(len(rollouts))]
    else:
        tokens_BL, position_ids_BL = pad_right(rollouts, least), None
        real_BL = torch.arange(tokens_BL.shape[1])[None, :] < torch.tensor(lengths)[:, None]
        starts = [row * tokens_BL.shape[1] for row in range(len(rollouts))]
    mask_N = torch.cat([rollout.completion_mask_T for rollout in rollouts])
    row_weight_N = torch.cat([torch.full((len(r.completion_T),), token_weight[r.prompt.domain]) for r in rollouts])
    spans = [(start + first, start + last) for start, (first, last) in zip(starts, map(completion_span, rollouts), strict=True)]
    return MicroBatch(
        rollouts=tuple(rollouts),
        tokens_BL=tokens_BL,
        real_BL=real_BL,
        position_ids_BL=position_ids_BL,
        position_N=torch.cat([torch.arange(first, last) for first, last in spans]),
        target_N=torch.cat([rollout.completion_T for rollout in rollouts]),
        mask_N=mask_N,
        weight_N=row_weight_N * mask_N,
        rollout_N=torch.cat([torch.full((len(rollout.completion_T),), row) for row, rollout in enumerate(rollouts)]),
        sampled_logprob_N=torch.cat([rollout.logprob_T for rollout in rollouts]),
        routes_NMK=None if any(rollout.routes_TMK is None for rollout in rollouts) else torch.cat([rollout.routes_TMK for rollout in rollouts]),
    )


def _same_number_on_every_rank(batches: list[MicroBatch]) -> list[MicroBatch]:
    if not batches:
        raise ValueError("a rank has no rollout in this step: use at least one prompt per rank")
    wanted = int(reduce_max(torch.tensor(len(batches)), Group.data))
    filler = replace(batches[-1], weight_N=torch.zeros_like(batches[-1].weight_N), is_filler=True)
    return batches + [filler] * (wanted - len(batches))
