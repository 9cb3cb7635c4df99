"""One frozen teacher: token sequences -> last hidden states at the completion positions.

Hidden states, not logits, are what is kept: for DeepSeek-V4 they are eighteen to thirty times smaller than the distribution they
stand for (arXiv:2606.19348, 5.2.2), and the teacher's head gives the logits back exactly, tile by tile, inside the loss.

D: hidden size. V: vocabulary. T: completion tokens.
"""

import torch
from transformers import PreTrainedModel

from rollout.model import backbone_of, head_of
from rollout.padding import completion_span, group_by_length, pad_right, sequence_length
from rollout.types import Rollout


class Teacher:
    """A frozen model that scores rollouts."""

    def __init__(self, name: str, model: PreTrainedModel):
        self.name = name
        self.model = model.eval().requires_grad_(False)

    @property
    def head_VD(self) -> torch.Tensor:
        """The output projection, [V, D]."""
        return head_of(self.model).weight

    @torch.no_grad()
    def hidden(self, rollouts: list[Rollout], max_tokens: int) -> list[torch.Tensor]:
        """hidden_TD of each rollout, in order; forwards hold at most `max_tokens` padded tokens (one rollout at least)."""
        result: list[torch.Tensor | None] = [None] * len(rollouts)
        for group in group_by_length([sequence_length(rollout) for rollout in rollouts], max_tokens):
            hidden_BLD = backbone_of(self.model)(input_ids=pad_right([rollouts[i] for i in group]).to(self.model.device), use_cache=False)[0]
            for row, index in enumerate(group):
                start, stop = completion_span(rollouts[index])
                result[index] = hidden_BLD[row, start:stop].clone()
        return result
