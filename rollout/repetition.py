"""Loops: a completion that says the same thing over and over until it is cut off.

On-policy distillation is prone to them: once something has been said twice a teacher, too, expects it a third time, so that reverse KL rewards going on
(arXiv:2604.08527). A loop is a stretch of tokens with a period: from its second copy on each token equals the one `period` tokens before, and the
stretch is at least

    length(period) = max(COPIES x period, SHORTEST)

tokens long, which never exceeds WINDOW. Copies have to follow each other: a phrase that returns within other text, as names and brackets do, is none.
A loop is recognised at the token that makes the stretch so long, its third copy's last unless copies are short. Not seen are copies that differ in a counter
or a word, and periods above LONGEST_PERIOD; such answers show in the truncated share and in their length.

With `rollout.mask_loops` the tokens after that one leave the loss, while those before stay: of a degenerate answer, too, each prefix has a teacher's
opinion that is worth something, until the loop makes it say the same. Masks follow from the tokens alone. Replay files keep those of before, so that
saved rollouts can be trained on with and without.

Recognition compares the completion with itself moved by each period and counts matches in a row: O(T x LONGEST_PERIOD) in numpy, no loop over tokens.

T: tokens of one completion. P: periods.
"""

from dataclasses import replace

import numpy as np
import torch

from rollout.types import Rollout

WINDOW = 64
"""Tokens within which a loop has to show: with more of them a refrain of a text would be a loop."""

COPIES = 3
"""Two in a row are common in sound text ("very, very"; a restated line); three are not."""

SHORTEST = 16
"""Tokens of a loop at least. Sound answers hold short runs: digits of 1000000, six closing brackets, a rule of dashes, the |---|---| of a small table."""

LONGEST_PERIOD = WINDOW // COPIES


def loop_end(completion_T: torch.Tensor) -> int | None:
    """Number of tokens up to and with the one at which the first loop is recognised; None where there is no loop."""
    if len(completion_T) < SHORTEST:
        return None
    tokens_T = completion_T.numpy()
    position_T, period_P1 = np.arange(len(tokens_T)), np.arange(1, LONGEST_PERIOD + 1)[:, None]
    is_same_PT = (position_T >= period_P1) & (tokens_T[np.maximum(position_T - period_P1, 0)] == tokens_T)
    last_other_PT = np.maximum.accumulate(np.where(is_same_PT, -1, position_T), axis=1)
    length_PT = position_T - last_other_PT + period_P1  # of the stretch that ends here; its first copy has nothing before it to equal
    is_loop_T = (is_same_PT & (length_PT >= np.maximum(COPIES * period_P1, SHORTEST))).any(axis=0)
    return int(is_loop_T.argmax()) + 1 if is_loop_T.any() else None


def mask_loops(rollouts: list[Rollout]) -> list[Rollout]:
    """The rollouts, no token after the recognition of a loop in the loss."""
    return [_masked(rollout, end) if (end := loop_end(rollout.completion_T)) is not None else rollout for rollout in rollouts]


def _masked(rollout: Rollout, end: int) -> Rollout:
    mask_T = rollout.completion_mask_T.clone()
    mask_T[end:] = False
    return replace(rollout, completion_mask_T=mask_T)
