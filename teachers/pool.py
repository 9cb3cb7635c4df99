"""TeacherPool: domain -> teacher. Rollouts are grouped by teacher, so that each is brought in once per step, however many there are.

Domains whose teachers are the same checkpoint share one. Those in memory score first, while the next is read (teachers/library.py); hidden states
wait for the update in a store (teachers/hidden_store.py), so that memory follows the step's tokens and the largest teacher, not the number of
teachers or the vocabulary. A teacher that a server holds (teachers/remote.py) has no weights and no head here.

A teacher that raises, takes too long, or gives NaN or the wrong length is read again from disk and scores again; when that fails too the run stops
with its name or, with teachers.on_failure=drop, goes on without its domains on all ranks. Never is a signal made up.

Ranks score on their own, except with a teacher that is sharded over them (teachers/sharding.py): all go through the same ones in one order, also
a rank that has no rollouts for it, and what fails on one has failed on all.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from rollout.errors import first_sentence
from rollout.model import torch_dtype
from rollout.ranks import OneRank, Ranks
from rollout.types import Rollout
from teachers.compatibility import check_teacher
from teachers.config import DomainConfig, OnFailure, SignalKind, TeacherConfig, TeachersConfig
from teachers.figures import ScoringFigures, TeacherFigures, teacher_metrics
from teachers.hidden_store import HiddenLostError, HiddenStore
from teachers.library import TeacherLibrary
from teachers.manifest import TeacherManifest, teacher_identity
from teachers.placement import free_memory, plan_placement
from teachers.ranks import on_all
from teachers.remote import RemoteTeacher
from teachers.teacher import Teacher
from teachers.types import OutputHead, ScoredRollout, TeacherFailure, TeacherSignal

Result = TypeVar("Result")


class TeacherPool:
    """All teachers of a run; `score` gives every rollout the signal of its domain's teacher."""

    def __init__(
        self,
        domains: dict[str, DomainConfig],
        cfg: TeachersConfig,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        ranks: Ranks | None = None,
        dropped: dict[str, str] | None = None,
    ):
        """Checks every teacher (teachers/compatibility.py), reads the headers of its files, and decides where weights will be; loads nothing.

        dropped: domains that the run goes on without already, with the reasons; their teachers are not looked at, since they may be broken still.
        Every rank calls it. Raises ValueError with the domain's name where a teacher does not fit.
        """
        self.dropped = dict(dropped or {})
        self.cfg, self.device, self.vocab_size, self.ranks = cfg, device, len(tokenizer), ranks or OneRank()
        self.domains, self.manifest = domains, TeacherManifest(cfg.probe_tolerance)
        if cfg.signal is SignalKind.top_k and cfg.top_k >= len(tokenizer):
            raise ValueError(f"teachers.top_k={cfg.top_k} leaves no tail in a vocabulary of {len(tokenizer)}: lower it, or use teachers.signal=hidden_states")
        self.teacher_of = {name: _identity(domain.teacher) for name, domain in domains.items()}
        self.configs: dict[str, tuple[str, TeacherConfig]] = {}
        for name, domain in domains.items():
            if name not in self.dropped:
                self.configs.setdefault(self.teacher_of[name], (name, domain.teacher))
        rendered = {self.teacher_of[name] for name, domain in domains.items() if not domain.prompts.raw and not cfg.allow_other_template}
        self.context: dict[str, int] = {}
        self.library, self.remote = TeacherLibrary(device), {}
        for teacher, (name, teacher_cfg) in self.configs.items():
            if teacher_cfg.server is not None:
                self.remote[teacher] = RemoteTeacher(teacher, name, teacher_cfg, cfg, tokenizer)
                self.context[teacher] = self.remote[teacher].context
            else:
                self.context[teacher] = check_teacher(name, teacher_cfg, tokenizer, teacher in rendered)
                self.library.add(teacher, _base_identity(teacher_cfg), teacher_cfg, f"teacher of {name}")
        free = min(self.ranks.gather(free_memory(device, self.ranks.local_count)))  # one plan on all ranks
        self.plan = plan_placement(self.library.sizes(), cfg, free, self.ranks.count)
        self.library.place(self.plan, cfg.load_timeout_seconds, self.ranks)
        self.store = HiddenStore(cfg.hidden_memory_gb, cfg.hidden_folder, self.ranks.local_count)
        self.scoring: dict[str, ScoringFigures] = {}

    @property
    def num_loads(self) -> int:
        """Readings of whole teachers so far."""
        return self.library.weights.num_loads

    def require_context(self, longest: dict[str, int]) -> None:
        """Raises ValueError where a domain's longest sequence (prompt and completion, in tokens) exceeds its teacher's context."""
        for domain, length in longest.items():
            positions = self.context.get(self.teacher_of[domain])
            if positions is not None and length > positions:
                raise ValueError(
                    f"the teacher of {domain} reads {positions} positions and the domain's longest rollout can have {length}: "
                    "lower rollout.max_new_tokens, or drop long prompts"
                )

    def identities(self) -> dict[str, dict[str, Any]]:
        """Domain -> what its teacher is, as JSON (teachers/manifest.py), but for the domains that were dropped from the start.

        Raises ValueError where a teacher's files are cut off or not there.
        """
        found = {
            teacher: self.remote[teacher].identity() if teacher in self.remote else teacher_identity(cfg, f"teacher of {name}")
            for teacher, (name, cfg) in self.configs.items()
        }
        return {name: found[teacher] for name, teacher in self.teacher_of.items() if teacher in found}

    def score(self, rollouts: list[Rollout], kind: SignalKind | None = None) -> list[ScoredRollout]:
        """The rollouts with their teachers' signals (None: teachers.signal of the config), in the same order; without those of dropped domains.

        Every rank calls it. Raises ValueError for a rollout of an unknown domain, and TeacherFailure where a teacher fails twice.
        """
        by_teacher: dict[str, list[int]] = {}
        for index, rollout in enumerate(rollouts):
            if rollout.prompt.domain not in self.teacher_of:
                raise ValueError(f"a rollout belongs to domain {rollout.prompt.domain!r}, which has no teacher in this run")
            if rollout.prompt.domain not in self.dropped:
                by_teacher.setdefault(self.teacher_of[rollout.prompt.domain], []).append(index)
        scored: list[ScoredRollout | None] = [None] * len(rollouts)
        failed: dict[str, str] = {}
        local = self._order([teacher for teacher in by_teacher if teacher not in self.remote])
        order = local + [teacher for teacher in by_teacher if teacher in self.remote]
        for position, teacher in enumerate(order):
            indices, later = by_teacher.get(teacher, []), local[position + 1 :]
            try:
                signals = self._signals(teacher, [rollouts[i] for i in indices], kind or self.cfg.signal, later)
            except TeacherFailure as error:
                if self.cfg.on_failure is OnFailure.stop:
                    raise
                failed[teacher] = str(error)
                continue
            for index, signal in zip(indices, signals, strict=True):
                scored[index] = ScoredRollout(rollout=rollouts[index], signal=signal)
        if self.cfg.on_failure is OnFailure.drop:
            self._drop(failed, max((rollout.policy_step for rollout in rollouts), default=0) + 1)
        return self._without_dropped(rollouts, scored)

    def recovered(self, scored: list[ScoredRollout]) -> list[ScoredRollout]:
        """The same, those of sharded teachers scored again whose hidden states are lost or damaged in the store; every rank calls it, before the update.

        Others are scored again when they are asked for, which a rank can do alone. With teachers.on_failure=drop, without the domains of teachers whose
        heads cannot be read any more: in the update, where one weight depends on all domains, it is too late to go on without one.
        """
        lost: dict[str, list[int]] = {}
        for index, item in enumerate(scored):
            if item.signal.stored is not None and self.library.is_sharded(item.signal.teacher) and not self._is_intact(item):
                lost.setdefault(item.signal.teacher, []).append(index)
        result = list(scored)
        for teacher in self._order(list(lost)):
            indices = lost.get(teacher, [])
            signals = self._signals(teacher, [scored[i].rollout for i in indices], SignalKind.hidden_states, [])
            for index, signal in zip(indices, signals, strict=True):
                result[index] = replace(scored[index], signal=signal)
        return self._with_heads(result) if self.cfg.on_failure is OnFailure.drop else result

    def hidden(self, signal: TeacherSignal, rollout: Rollout, keep: bool = False) -> torch.Tensor:
        """hidden_TD of a signal, taken from the store or only looked at; the teacher scores the rollout again where it is lost or damaged there.

        Raises TeacherFailure where that is so and the teacher is sharded: the other ranks are elsewhere (`recovered`).
        """
        if signal.stored is None:
            return signal.hidden_TD
        try:
            hidden_TD = self.store.look(signal.stored)
        except HiddenLostError as error:
            if self.library.is_sharded(signal.teacher):
                raise TeacherFailure(f"{error}, and {self._who(signal.teacher)} is sharded, so no rank can score by itself: resume the run") from error
            logging.getLogger(__name__).warning("%s: request %d is scored again", error, rollout.prompt.request)
            hidden_TD = self._twice(signal.teacher, lambda: self._try_hidden(signal.teacher, [rollout]))[0].to(signal.stored.dtype)
        if not keep:
            self.store.drop(signal.stored)
        return hidden_TD

    def is_remote(self, domain: str) -> bool:
        """Whether a server holds the teacher of a domain: then there are neither hidden states nor a head of it here."""
        return self.teacher_of[domain] in self.remote

    def head(self, teacher: str, upcoming: str | None = None) -> OutputHead:
        """The head of a teacher on the device, valid until another is asked for; `upcoming` is the next, which is read meanwhile."""
        return self._twice(teacher, lambda: self.library.head(teacher, upcoming if self.cfg.prefetch else None))

    def get(self, teacher: str) -> Teacher:
        """A teacher by its name in the pool, its weights in memory. Raises ValueError for one that is sharded."""
        self.require_whole([teacher])
        return self._twice(teacher, lambda: self.library.open(teacher))

    def require_whole(self, teachers: Iterable[str]) -> None:
        """Raises ValueError where one of the teachers is sharded over the ranks, so that none can sample from it."""
        for teacher in teachers:
            if self.library.is_sharded(teacher):
                raise ValueError(f"{self._who(teacher)} is sharded over the ranks and cannot be sampled from: set teachers.placement=replicated")

    def domains_of(self, teacher: str) -> list[str]:
        """The domains that a teacher scores."""
        return [domain for domain, name in self.teacher_of.items() if name == teacher]

    def label(self, teacher: str) -> str:
        """What metrics call a teacher."""
        return "+".join(self.domains_of(teacher))

    def metrics(self) -> dict[str, float]:
        """Figures of teachers since this was last asked, over all ranks (names: teachers/figures.py); every rank calls it."""
        own = {name: TeacherFigures(scoring=self.scoring.get(name), loading=loading) for name, loading in self.library.figures().items()}
        own |= {name: TeacherFigures(scoring=scoring) for name, scoring in self.scoring.items() if name not in own}
        self.scoring = {}
        everywhere = self.ranks.gather(own)
        return teacher_metrics({self.label(name): [rank.get(name, TeacherFigures()) for rank in everywhere] for name in self.configs})

    def _signals(self, teacher: str, rollouts: list[Rollout], kind: SignalKind, later: list[str]) -> list[TeacherSignal]:
        """A teacher's signals of some rollouts, their hidden states in the store; the first of `later` is read meanwhile."""
        if teacher in self.remote:
            begun = time.monotonic()
            signals = self.remote[teacher].score(rollouts, kind, self.cfg.top_k, self.vocab_size)
            self.scoring.setdefault(teacher, ScoringFigures()).seconds += time.monotonic() - begun
            return signals
        attempt = partial(self._try_signals, teacher, rollouts, kind, later)
        signals = self._twice(teacher, partial(on_all, self.ranks, attempt) if self.library.is_sharded(teacher) else attempt)
        figures = self.scoring.setdefault(teacher, ScoringFigures())
        if kind is not SignalKind.hidden_states or not signals:
            return signals
        dtype = torch_dtype(self.cfg.hidden_dtype) if self.cfg.hidden_dtype is not None else signals[0].hidden_TD.dtype
        if dtype != signals[0].hidden_TD.dtype:
            figures.rounding_kl += self.library.open(teacher).rounding_kl(signals[0].hidden_TD, dtype, self.vocab_size)
            figures.rounded_tokens += len(signals[0].hidden_TD)
        return [replace(signal, hidden_TD=None, stored=self.store.put(signal.hidden_TD.to(dtype))) for signal in signals]

    def _try_signals(self, teacher: str, rollouts: list[Rollout], kind: SignalKind, later: list[str]) -> list[TeacherSignal]:
        hidden = self._try_hidden(teacher, rollouts, later)
        scorer = self.library.open(teacher)
        return [scorer.signal(rollout, hidden_TD, kind, self.cfg.top_k, self.vocab_size) for rollout, hidden_TD in zip(rollouts, hidden, strict=True)]

    def _try_hidden(self, teacher: str, rollouts: list[Rollout], later: list[str] = ()) -> list[torch.Tensor]:
        """hidden_TD of each rollout; the first of `later` is read meanwhile. Raises whatever the teacher raises, and where it gives something else."""
        scorer = self._open(teacher, later)
        begun = time.monotonic()
        hidden = scorer.hidden(rollouts, self.cfg.max_tokens_per_forward)
        for rollout, hidden_TD in zip(rollouts, hidden, strict=True):
            if len(hidden_TD) != len(rollout.completion_T):
                raise TeacherFailure(f"it gave {len(hidden_TD)} hidden states for {len(rollout.completion_T)} tokens of request {rollout.prompt.request}")
            if not hidden_TD.isfinite().all():
                raise TeacherFailure(f"it gave NaN or infinity on request {rollout.prompt.request}")
        self.scoring.setdefault(teacher, ScoringFigures()).seconds += time.monotonic() - begun
        return hidden

    def _twice(self, teacher: str, attempt: Callable[[], Result]) -> Result:
        """What an attempt gives or, where it raises, a second one with the teacher read anew. Raises TeacherFailure."""
        who = self._who(teacher)
        try:
            return attempt()
        except Exception as error:  # whatever a teacher raises
            logging.getLogger(__name__).warning("%s failed and is read again: %s", who, first_sentence(error))
            self.library.discard(teacher)
        try:
            return attempt()
        except Exception as error:
            self.library.discard(teacher)
            raise TeacherFailure(f"{who} failed twice: {first_sentence(error)}") from error

    def _open(self, teacher: str, later: list[str]) -> Teacher:
        """A teacher with its weights, the first of `later` on its way; a sharded one has them on all ranks, or this raises on all."""

        def attempt() -> Teacher:
            scorer = self.library.open(teacher, keep=set(later))
            if later and self.cfg.prefetch:
                self.library.prefetch(later[0], keep={teacher, *later})
            return scorer

        return on_all(self.ranks, attempt) if self.library.is_sharded(teacher) else attempt()

    def _order(self, wanted: list[str]) -> list[str]:
        """Local teachers in the order in which they score, those in memory first. With the sharded ones that any rank needs, in the same order on all ranks."""
        is_here = {teacher: self.library.is_here(teacher) for teacher in wanted}
        sharded = [teacher for teacher in self.configs if self.library.is_sharded(teacher)]
        if sharded:
            states = self.ranks.gather({teacher: (teacher in wanted, self.library.is_here(teacher)) for teacher in sharded})
            needed = [teacher for teacher in sharded if any(state[teacher][0] for state in states)]
            is_here |= {teacher: all(state[teacher][1] for state in states) for teacher in needed}
        return sorted(is_here, key=lambda teacher: (not is_here[teacher], self.library.base_of[teacher]))

    def _is_intact(self, item: ScoredRollout) -> bool:
        """Whether stored hidden states are as they were written; forgets them where they are not."""
        try:
            self.store.look(item.signal.stored)
        except HiddenLostError as error:
            logging.getLogger(__name__).warning("%s: request %d is scored again", error, item.rollout.prompt.request)
            self.store.drop(item.signal.stored)
            return False
        return True

    def _who(self, teacher: str) -> str:
        return f"the teacher of {' and '.join(self.domains_of(teacher))} ({self.configs[teacher][1].model})"

    def _drop(self, failed: dict[str, str], step: int) -> None:
        """Go on without the domains of teachers that failed on any rank, from a step on. Raises TeacherFailure where none would be left."""
        for own in self.ranks.gather(failed):
            for teacher, reason in own.items():
                for domain in self.domains_of(teacher):
                    if domain not in self.dropped:
                        self.dropped[domain] = reason
                        self.manifest.record_failure(domain, step, reason)
                        logging.getLogger(__name__).warning("the run goes on without domain %s from step %d on: %s", domain, step, reason)
        if len(self.dropped) == len(self.teacher_of):
            raise TeacherFailure(f"no domain is left: {next(iter(self.dropped.values()))}")

    def _with_heads(self, scored: list[ScoredRollout]) -> list[ScoredRollout]:
        """What was scored by teachers whose heads can be read, on all ranks; the other teachers' domains are dropped."""
        failed: dict[str, str] = {}
        for teacher in dict.fromkeys(item.signal.teacher for item in scored if item.signal.kind is SignalKind.hidden_states):
            try:
                self.head(teacher)
            except TeacherFailure as error:
                failed[teacher] = str(error)
        self._drop(failed, max((item.rollout.policy_step for item in scored), default=0) + 1)
        return self._without_dropped([item.rollout for item in scored], scored)

    def _without_dropped(self, rollouts: list[Rollout], scored: list[ScoredRollout | None]) -> list[ScoredRollout]:
        """What was scored of domains that are not dropped; on a rank that has nothing else, one rollout whose tokens do not count."""
        kept = []
        for item in scored:
            if item is not None and item.rollout.prompt.domain not in self.dropped:
                kept.append(item)
            elif item is not None and item.signal.stored is not None:
                self.store.drop(item.signal.stored)
        if kept or not rollouts or not self.dropped:
            return kept
        rollout = replace(rollouts[0], completion_mask_T=torch.zeros_like(rollouts[0].completion_mask_T))
        return [ScoredRollout(rollout=rollout, signal=TeacherSignal(teacher=self.teacher_of[rollout.prompt.domain], kind=None))]


def _identity(cfg: TeacherConfig) -> str:
    """Two domains share a teacher when everything that decides its numbers is the same."""
    if cfg.server is not None:
        return f"{cfg.server}|{cfg.model}"
    return "|".join(str(part) for part in (_base_identity(cfg), *((cfg.adapter, cfg.adapter_revision) if cfg.adapter is not None else ())))


def _base_identity(cfg: TeacherConfig) -> str:
    """Two teachers share a model in memory when they differ in their adapters alone."""
    model = str(Path(cfg.model).resolve()) if cfg.model is not None and Path(cfg.model).is_dir() else cfg.model
    return "|".join(str(part) for part in (model, cfg.revision, cfg.dtype.value, cfg.attention and cfg.attention.value, cfg.experts and cfg.experts.value))
