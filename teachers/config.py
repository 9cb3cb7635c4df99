"""Typed settings of a domain and of how teachers are held. A domain is prompts, a teacher, a weight and perhaps a grader."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rollout.config import GraderKind, HeldOutConfig, ModelConfig, PromptsConfig


class SignalKind(Enum):
    """What a teacher gives for each completion token.

    hidden_states: its whole distribution, as the states that its head turns into logits.
    top_k: its likeliest tokens with their log-probabilities; all others count as one outcome, the tail.
    sampled_token: the log-probability of the token that was sampled.
    """

    hidden_states = "hidden_states"
    top_k = "top_k"
    sampled_token = "sampled_token"


@dataclass(slots=True)
class DomainConfig:
    """One domain; its name is its key under `domains`.

    teacher: the frozen specialist that scores this domain's rollouts.
    prompts: what the student answers.
    held_out: prompts for evaluation.
    grader: how a completion is compared with the reference answer; null where it cannot be.
    loss_weight: w_d of the objective (number or schedule); the weights of the domains present in a step are divided by their sum.
    """

    teacher: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    grader: GraderKind | None = None
    loss_weight: Any = 1.0


@dataclass(slots=True)
class TeachersConfig:
    """How the pool holds teachers, and what they give.

    max_resident: teachers kept in memory; the least recently used one makes room.
    max_tokens_per_forward: padded tokens of one scoring forward.
    signal: what a teacher gives for each token; what is less than hidden_states is for comparison with systems whose teachers have no more.
    top_k: number of tokens of signal=top_k.
    """

    max_resident: int = 1
    max_tokens_per_forward: int = 16384
    signal: SignalKind = SignalKind.hidden_states
    top_k: int = 64
