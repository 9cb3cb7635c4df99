"""Rollouts as rows of token ids: their lengths, where their completions are predicted, padding on the right.

B: rows. L: padded positions.
"""

import torch

from rollout.types import Rollout

FORWARD_COST = 1024
"""Positions that a model computes in the time which one more forward takes beside its positions. Of small students on a CPU, where 512 to 2048 make no
difference that can be measured; the larger it is, the fewer and the more padded the forwards are."""


def sequence_length(rollout: Rollout) -> int:
    return len(rollout.prompt.tokens) + len(rollout.completion_T)


def completion_span(rollout: Rollout) -> tuple[int, int]:
    """Positions whose hidden states predict the completion: from the prompt's last token to the last but one of all."""
    start = len(rollout.prompt.tokens) - 1
    return start, start + len(rollout.completion_T)


def pad_right(rollouts: list[Rollout], least: int = 0) -> torch.Tensor:
    """Token ids [B, L], L at least `least`, padded on the right with 0. A causal model never looks at what follows, so the value does not matter."""
    longest = max(least, *(sequence_length(rollout) for rollout in rollouts))
    tokens_BL = torch.zeros(len(rollouts), longest, dtype=torch.int64)
    for row, rollout in enumerate(rollouts):
        prompt = torch.tensor(rollout.prompt.tokens)
        tokens_BL[row, : len(prompt)] = prompt
        tokens_BL[row, len(prompt) : sequence_length(rollout)] = rollout.completion_T
    return tokens_BL


def group_by_length(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices in groups of similar length, such that rows times longest is at most `max_tokens` (or one row), and padding and forwards cost least."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    least, begin_of = [0], []  # of the shortest rows: their least cost, and where their last group begins
    for end, index in enumerate(order, start=1):
        longest = lengths[index]
        most = max(1, max_tokens // max(1, longest))
        cost, begin = min((least[begin] + (end - begin) * longest, begin) for begin in range(max(0, end - most), end))
        least.append(cost + FORWARD_COST)
        begin_of.append(begin)
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[begin_of[end - 1] : end])
        end = begin_of[end - 1]
    return groups[::-1]
