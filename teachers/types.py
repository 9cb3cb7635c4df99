"""What scoring returns.

T: completion tokens of one rollout. D: the teacher's hidden size.
"""

from dataclasses import dataclass

import torch

from rollout.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSignal:
    """A teacher's whole distribution at every completion token, as the hidden states its head turns into logits.

    teacher: name in the pool, whose head belongs to these states.
    hidden_TD: last hidden states after the final norm, in the teacher's dtype; row t predicts completion token t.
    """

    teacher: str
    hidden_TD: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout:
    """A rollout with the signal of its domain's teacher."""

    rollout: Rollout
    signal: TeacherSignal
