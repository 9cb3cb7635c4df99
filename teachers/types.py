"""What scoring returns.

T: completion tokens of one rollout. D: the teacher's hidden size. V: vocabulary. K: tokens named per position.
"""

from dataclasses import dataclass

import torch

from rollout.types import IDENTITY, LogitTransform, Rollout
from teachers.config import SignalKind
from teachers.hidden_store import StoredHidden


class TeacherFailure(ValueError):  # noqa: N818 - the word of the field
    """A teacher gave no signal, or one that cannot be right; the message names it and says what happened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSignal:
    """What a teacher gives for every completion token; row t is about completion token t.

    teacher: name in the pool.
    kind: what is given; the other fields are None. None is nothing: the rollout's tokens do not count.
    hidden_TD: last hidden states after the final norm, in the teacher's dtype; the teacher's head belongs to them.
    stored: the same, waiting in the pool's store (teachers/hidden_store.py); of the two one is None.
    token_TK, logprob_TK: tokens and their float32 log-probabilities at temperature 1: the K likeliest, or (K = 1) the sampled one.
    """

    teacher: str
    kind: SignalKind | None = SignalKind.hidden_states
    hidden_TD: torch.Tensor | None = None
    stored: StoredHidden | None = None
    token_TK: torch.Tensor | None = None
    logprob_TK: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputHead:
    """What turns hidden states into logits: the head's weight, and the family's scale and soft cap."""

    weight_VD: torch.Tensor
    transform: LogitTransform = IDENTITY


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout:
    """A rollout with the signal of its domain's teacher."""

    rollout: Rollout
    signal: TeacherSignal
