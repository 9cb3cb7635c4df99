"""TeacherPool: domain -> teacher. Rollouts are grouped by teacher, so that each is fetched once per step, however many there are.

Domains whose teachers are the same checkpoint share one teacher. At most `max_resident` are in memory; a step that meets more
loads the others from disk in turn, once each, since their heads stay in host memory for the loss. Loading is verified
(rollout/model.py), and tokenizer and vocabulary are compared with the student's at start-up, before any compute is spent.
"""

from collections import OrderedDict
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from rollout.config import ModelConfig
from rollout.model import load_model
from rollout.types import Rollout
from teachers.compatibility import check_teacher
from teachers.config import DomainConfig, SignalKind, TeachersConfig
from teachers.teacher import Teacher
from teachers.types import OutputHead, ScoredRollout


class TeacherPool:
    """All teachers of a run; `score` gives every rollout the signal of its domain's teacher."""

    def __init__(self, domains: dict[str, DomainConfig], cfg: TeachersConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device):
        """Checks every teacher (teachers/compatibility.py). Raises ValueError with the domain's name where one does not fit."""
        self.cfg, self.device, self.vocab_size = cfg, device, len(tokenizer)
        if cfg.signal is SignalKind.top_k and cfg.top_k >= len(tokenizer):
            raise ValueError(f"teachers.top_k={cfg.top_k} leaves no tail in a vocabulary of {len(tokenizer)}: lower it, or use teachers.signal=hidden_states")
        self.teacher_of = {name: _identity(domain.teacher) for name, domain in domains.items()}
        self.configs: dict[str, tuple[str, ModelConfig]] = {}
        for name, domain in domains.items():
            self.configs.setdefault(self.teacher_of[name], (name, domain.teacher))
        self.resident: OrderedDict[str, Teacher] = OrderedDict()
        self.host_heads: dict[str, OutputHead] = {}
        self.device_head: tuple[str, OutputHead] | None = None
        self.num_loads = self.loads_told = 0
        self.context = {teacher: check_teacher(name, teacher_cfg, tokenizer) for teacher, (name, teacher_cfg) in self.configs.items()}

    def require_context(self, longest: dict[str, int]) -> None:
        """Raises ValueError where a domain's longest sequence (prompt and completion, in tokens) exceeds its teacher's context."""
        for domain, length in longest.items():
            positions = self.context[self.teacher_of[domain]]
            if length > positions:
                raise ValueError(
                    f"the teacher of {domain} reads {positions} positions and the domain's longest rollout can have {length}: "
                    "lower rollout.max_new_tokens, or drop long prompts"
                )

    def score(self, rollouts: list[Rollout], kind: SignalKind | None = None) -> list[ScoredRollout]:
        """The rollouts with their teachers' signals (None: teachers.signal of the config), in the same order.

        Raises ValueError for a rollout of an unknown domain, and for a teacher whose signal is not finite.
        """
        by_teacher: dict[str, list[int]] = {}
        for index, rollout in enumerate(rollouts):
            if rollout.prompt.domain not in self.teacher_of:
                raise ValueError(f"a rollout belongs to domain {rollout.prompt.domain!r}, which has no teacher in this run")
            by_teacher.setdefault(self.teacher_of[rollout.prompt.domain], []).append(index)
        scored: list[ScoredRollout | None] = [None] * len(rollouts)
        for teacher, indices in sorted(by_teacher.items(), key=lambda item: item[0] not in self.resident):
            scorer = self.get(teacher)
            hidden = scorer.hidden([rollouts[i] for i in indices], self.cfg.max_tokens_per_forward)
            for index, hidden_TD in zip(indices, hidden, strict=True):
                if not hidden_TD.isfinite().all():
                    raise ValueError(f"the teacher of {rollouts[index].prompt.domain} gave NaN or infinity on request {rollouts[index].prompt.request}")
                signal = scorer.signal(rollouts[index], hidden_TD, kind or self.cfg.signal, self.cfg.top_k, self.vocab_size)
                scored[index] = ScoredRollout(rollout=rollouts[index], signal=signal)
        return scored

    def loads_since_asked(self) -> int:
        """Teachers loaded from disk since this was last asked."""
        loads, self.loads_told = self.num_loads - self.loads_told, self.num_loads
        return loads

    def head(self, teacher: str) -> OutputHead:
        """The head of a teacher, on the device; one is there at a time, so ask for them teacher by teacher."""
        if self.device_head is None or self.device_head[0] != teacher:
            if teacher not in self.host_heads:
                self.get(teacher)
            head = self.host_heads[teacher]
            self.device_head = (teacher, replace(head, weight_VD=head.weight_VD.to(self.device)))
        return self.device_head[1]

    def get(self, teacher: str) -> Teacher:
        """A teacher by its name in the pool, loaded if it is not resident."""
        if teacher in self.resident:
            self.resident.move_to_end(teacher)
            return self.resident[teacher]
        while len(self.resident) >= max(1, self.cfg.max_resident):
            self.resident.popitem(last=False)
        domain, cfg = self.configs[teacher]
        self.resident[teacher] = Teacher(teacher, load_model(cfg, f"teacher of {domain}", self.device))
        head = self.resident[teacher].head
        self.host_heads[teacher] = replace(head, weight_VD=head.weight_VD.cpu())
        self.num_loads += 1
        return self.resident[teacher]


def _identity(cfg: ModelConfig) -> str:
    """Two domains share a teacher when everything that decides its numbers is the same."""
    return "|".join(str(part) for part in (cfg.model, cfg.revision, cfg.dtype.value, cfg.attention and cfg.attention.value, cfg.experts and cfg.experts.value))
