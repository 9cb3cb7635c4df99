"""Rollouts as rows of token ids: their lengths, where their completions are predicted, padding on the right.

B: rows. L: padded positions.
"""

import torch

from rollout.types import Rollout


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
