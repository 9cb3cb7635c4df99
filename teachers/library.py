"""TeacherLibrary: the local teachers of a run, whose weights come into memory when they are asked for and leave when others need the room.

A model without memory stands for each teacher from the start; what moves are its weights (teachers/residency.py). Heads move by themselves: the update needs
one after another when the teachers they belong to have long made room, and one and the next are there at a time.
"""

from dataclasses import dataclass, field

import torch

from rollout.config import ModelConfig
from rollout.model import prepare_model
from teachers.placement import PlacementPlan
from teachers.residency import LoadFigures, Residency, Weights, size_of
from teachers.sources import TeacherSource, head_name, open_source
from teachers.teacher import Teacher
from teachers.types import OutputHead


@dataclass(slots=True)
class Entry:
    """A teacher, its weights' source, and its head's; `kept_head` is the head in host memory where it cannot be read alone."""

    teacher: Teacher
    source: TeacherSource
    head: TeacherSource
    is_verified: bool = False
    kept_head: torch.Tensor | None = None


@dataclass(slots=True)
class TeacherLibrary:
    """Local teachers by name."""

    device: torch.device
    entries: dict[str, Entry] = field(default_factory=dict)
    weights: Residency | None = None
    heads: Residency | None = None

    def add(self, name: str, cfg: ModelConfig, role: str) -> None:
        """Take in a teacher; reads its config and the headers of its files. Raises ValueError, with its role, where they are not right."""
        model, source = open_source(name, cfg, role)
        self.entries[name] = Entry(Teacher(name, model), source, source.only(head_name(model)))

    def sizes(self) -> dict[str, int]:
        """Bytes of each teacher's weights in memory."""
        return {name: size_of(entry.source.layout) for name, entry in self.entries.items()}

    def place(self, plan: PlacementPlan, timeout: float) -> None:
        """Decide on the memory for weights, once all teachers are in."""
        self.weights = Residency(plan.capacity, self.device, timeout, on_evict=lambda name: self.entries[name].teacher.detach())
        self.heads = Residency(2, self.device, timeout)

    def open(self, name: str, keep: set[str] = frozenset()) -> Teacher:
        """A teacher with its weights; those of `keep` stay if they can. Raises what reading raises, and what `prepare_model` does of a first reading."""
        entry = self.entries[name]
        weights, reading = self.weights.fetch(entry.source, keep)
        if reading is not None:
            self._attach(entry, weights)
        return entry.teacher

    def prefetch(self, name: str, keep: set[str]) -> None:
        self.weights.prefetch(self.entries[name].source, keep)

    def head(self, name: str, upcoming: str | None = None) -> OutputHead:
        """The head of a teacher on the device, valid until another teacher is asked for; `upcoming` is the next whose head will be."""
        entry = self.entries[name]
        if name in self.weights or (entry.source.mapped is None and entry.kept_head is None):
            weight = self.open(name).head.weight_VD
        elif entry.kept_head is not None:
            weight = entry.kept_head.to(self.device)
        else:
            weight = next(iter(self.heads.fetch(entry.head)[0].values()))
        if upcoming is not None and upcoming not in self.weights and self.entries[upcoming].kept_head is None:
            self.heads.prefetch(self.entries[upcoming].head, {name})
        return OutputHead(weight_VD=weight, transform=entry.teacher.transform)

    def discard(self, name: str) -> None:
        """Forget a teacher's weights, so that they are read again when it is asked for."""
        self.weights.discard(name)
        self.heads.discard(name)
        self.entries[name].kept_head = None

    def figures(self) -> dict[str, LoadFigures]:
        """What reading each teacher and its head was and cost since this was last asked."""
        total: dict[str, LoadFigures] = {}
        for residency in (self.weights, self.heads):
            for name, figures in residency.take_figures().items():
                total.setdefault(name, LoadFigures()).add(figures)
        return total

    def _attach(self, entry: Entry, weights: Weights) -> None:
        entry.teacher.attach(weights)
        if not entry.is_verified:
            prepare_model(entry.teacher.model, entry.source.cfg, entry.source.role)
            entry.is_verified = True
        if entry.source.mapped is None:
            entry.kept_head = entry.teacher.head.weight_VD.detach().to("cpu", copy=True)
