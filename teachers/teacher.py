"""One frozen teacher: token sequences -> last hidden states at the completion positions.

Hidden states, not logits, are what is kept: for DeepSeek-V4 they are eighteen to thirty times smaller than the distribution they
stand for (arXiv:2606.19348, 5.2.2), and the teacher's head gives the logits back exactly, tile by tile, inside the loss.

B: rows. L: padded positions. D: hidden size. T: completion tokens.
"""

import torch
from transformers import PreTrainedModel

from rollout.model import backbone_of, head_of
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


def sequence_length(rollout: Rollout) -> int:
    return len(rollout.prompt.tokens) + len(rollout.completion_T)


def completion_span(rollout: Rollout) -> tuple[int, int]:
    """Positions whose hidden states predict the completion: from the prompt's last token to the last but one of all."""
    start = len(rollout.prompt.tokens) - 1
    return start, start + len(rollout.completion_T)


def pad_right(rollouts: list[Rollout]) -> torch.Tensor:
    """Token ids [B, L], padded on the right with 0. A causal model never looks at what follows, so the value does not matter."""
    longest = max(sequence_length(rollout) for rollout in rollouts)
    tokens_BL = torch.zeros(len(rollouts), longest, dtype=torch.int64)
    for row, rollout in enumerate(rollouts):
        prompt = torch.tensor(rollout.prompt.tokens)
        tokens_BL[row, : len(prompt)] = prompt
        tokens_BL[row, len(prompt) : sequence_length(rollout)] = rollout.completion_T
    return tokens_BL


def group_by_length(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices in groups of similar length, such that rows times longest is at most `max_tokens` (or one row)."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if groups and lengths[index] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
