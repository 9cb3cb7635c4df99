"""Typed settings of a domain and of how teachers are held. A domain is prompts, a teacher, a weight and perhaps a grader."""

from dataclasses import dataclass, field
from typing import Any

from rollout.config import GraderKind, HeldOutConfig, ModelConfig, PromptsConfig


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
    """How the pool holds teachers.

    max_resident: teachers kept in memory; the least recently used one makes room.
    max_tokens_per_forward: padded tokens of one scoring forward.
    """

    max_resident: int = 1
    max_tokens_per_forward: int = 16384
