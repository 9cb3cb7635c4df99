"""Scored rollouts (or supervised examples) -> micro-batches, ordered by teacher, the same number on every rank.

Rows are padded on the right and never on the left or packed: DeepSeek-V4's compressed attention pools tokens across whatever
stands in its windows. Masks come from lengths, never from token ids, since the padding id may equal the end-of-sequence id.
Every rank runs the same number of forwards, because a partitioned model communicates in each: ranks that have fewer
micro-batches repeat their last one with weight 0.

B: rows. L: padded positions. N: completion tokens of the micro-batch, flattened. D: teacher's hidden size.
"""

from dataclasses import dataclass, replace

import torch

from opd.distributed import Group, reduce_max
from rollout.types import Rollout
from teachers.teacher import completion_span, group_by_length, pad_right, sequence_length
from teachers.types import ScoredRollout

PACKING_REFUSED = (
    "batch.packing is not available for {family}: its attention would see other documents in the row "
    "(on DeepSeek-V4 the logits change by 0.20); set batch.packing=false"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What one forward and backward needs.

    tokens_BL: ids, right-padded. real_BL: False on padding.
    position_N: index into the flattened [B * L] hidden states of the state that predicts each completion token.
    target_N: the completion tokens. mask_N: whether a token enters the loss.
    weight_N: float32, w_d / N_d on tokens of the loss and 0 elsewhere, so that the step's loss is sum(weight * divergence).
    rollout_N: index into `rollouts` of each token.
    teacher: whose head belongs to teacher_hidden_ND; None (both) for supervised examples.
    """

    rollouts: tuple[Rollout, ...]
    tokens_BL: torch.Tensor
    real_BL: torch.Tensor
    position_N: torch.Tensor
    target_N: torch.Tensor
    mask_N: torch.Tensor
    weight_N: torch.Tensor
    rollout_N: torch.Tensor
    teacher: str | None = None
    teacher_hidden_ND: torch.Tensor | None = None
    is_filler: bool = False

    def to(self, device: torch.device) -> "MicroBatch":
        moved = {name: getattr(self, name).to(device) for name in _TENSORS if getattr(self, name) is not None}
        return replace(self, **moved)


_TENSORS = ("tokens_BL", "real_BL", "position_N", "target_N", "mask_N", "weight_N", "rollout_N", "teacher_hidden_ND")


def distillation_batches(scored: list[ScoredRollout], token_weight: dict[str, float], max_tokens: int) -> list[MicroBatch]:
    """Micro-batches of one rank, each with one teacher; `token_weight` is w_d / N_d per domain. Every rank calls it."""
    return _same_number_on_every_rank(teacher_batches(scored, token_weight, max_tokens))


def teacher_batches(scored: list[ScoredRollout], token_weight: dict[str, float], max_tokens: int) -> list[MicroBatch]:
    """As `distillation_batches`, for this rank alone: the number of micro-batches may differ between ranks."""
    by_teacher: dict[str, list[ScoredRollout]] = {}
    for item in scored:
        by_teacher.setdefault(item.signal.teacher, []).append(item)
    batches = []
    for teacher, items in by_teacher.items():
        for group in group_by_length([sequence_length(item.rollout) for item in items], max_tokens):
            batch = _micro_batch([items[i].rollout for i in group], token_weight)
            hidden_ND = torch.cat([items[i].signal.hidden_TD for i in group])
            batches.append(replace(batch, teacher=teacher, teacher_hidden_ND=hidden_ND))
    return batches


def supervised_batches(examples: list[Rollout], token_weight: dict[str, float], max_tokens: int) -> list[MicroBatch]:
    """Micro-batches of one rank for training on the examples' completion tokens."""
    groups = group_by_length([sequence_length(example) for example in examples], max_tokens)
    return _same_number_on_every_rank([_micro_batch([examples[i] for i in group], token_weight) for group in groups])


def _micro_batch(rollouts: list[Rollout], token_weight: dict[str, float]) -> MicroBatch:
    tokens_BL = pad_right(rollouts)
    length = tokens_BL.shape[1]
    lengths_B = torch.tensor([sequence_length(rollout) for rollout in rollouts])
    spans = [completion_span(rollout) for rollout in rollouts]
    mask_N = torch.cat([rollout.completion_mask_T for rollout in rollouts])
    row_weight_N = torch.cat([torch.full((len(r.completion_T),), token_weight[r.prompt.domain]) for r in rollouts])
    return MicroBatch(
        rollouts=tuple(rollouts),
        tokens_BL=tokens_BL,
        real_BL=torch.arange(length)[None, :] < lengths_B[:, None],
        position_N=torch.cat([torch.arange(row * length + start, row * length + stop) for row, (start, stop) in enumerate(spans)]),
        target_N=torch.cat([rollout.completion_T for rollout in rollouts]),
        mask_N=mask_N,
        weight_N=row_weight_N * mask_N,
        rollout_N=torch.cat([torch.full((len(rollout.completion_T),), row) for row, rollout in enumerate(rollouts)]),
    )


def _same_number_on_every_rank(batches: list[MicroBatch]) -> list[MicroBatch]:
    if not batches:
        raise ValueError("a rank has no rollout in this step: use at least one prompt per rank")
    wanted = int(reduce_max(torch.tensor(len(batches)), Group.data))
    filler = replace(batches[-1], weight_N=torch.zeros_like(batches[-1].weight_N), is_filler=True)
    return batches + [filler] * (wanted - len(batches))
