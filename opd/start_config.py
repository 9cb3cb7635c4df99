"""Typed settings of what comes before a distillation's first step: the check of the teachers' signal, and the warm-up."""

from dataclasses import dataclass
from enum import Enum


class OnBadSignal(Enum):
    """What a teacher whose signal is not sound leads to: refuse the run; warn and go on; off does not look."""

    refuse = "refuse"
    warn = "warn"
    off = "off"


class WarmupKind(Enum):
    """none: distil from the first step on. sft: train on the teachers' own answers before."""

    none = "none"
    sft = "sft"


@dataclass(slots=True)
class CheckConfig:
    """The check of each teacher's signal on the initial student (opd/signal_check.py).

    signal: what a signal that is not sound leads to.
    prompts: prompts of each domain that the student answers for it (held-out ones where the run evaluates), and right answers that are scored.
    teacher_answers: training prompts of each domain that its teacher answers too, as rollouts are sampled, so that the length of the student's answers can
        be held against its own (domain/D/length_ratio). Each teacher is loaded and decodes once for it; 0 asks none, and a warm-up asks anyway.
    """

    signal: OnBadSignal = OnBadSignal.refuse
    prompts: int = 32
    teacher_answers: int = 0


@dataclass(slots=True)
class WarmupConfig:
    """Supervised training before the first step (opd/warmup.py), on answers that each teacher samples to its domain's training prompts.

    kind: whether there is one.
    domains: the domains that need it; null takes all.
    prompts: prompts that each of their teachers answers.
    steps: updates; their learning rate runs the whole schedule of `optim`, which then begins anew.
    examples_per_step: answers of one update, over all ranks and domains; null takes rollout.prompts_per_step.
    """

    kind: WarmupKind = WarmupKind.none
    domains: list[str] | None = None
    prompts: int = 512
    steps: int = 50
    examples_per_step: int | None = None

    def covers(self, domain: str) -> bool:
        """Whether a domain is warmed up."""
        return self.kind is WarmupKind.sft and (self.domains is None or domain in self.domains)
