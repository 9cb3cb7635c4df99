"""TeacherLibrary: the local teachers of a run, whose weights come into memory when they are asked for and leave when others need the room.

A model without memory stands for each checkpoint from the start; what moves are its weights (teachers/residency.py). Teachers that differ in an adapter share
one. Heads move by themselves: the update needs one after another when the teachers they belong to have long made room, and one and the next are there
at a time.
"""

from dataclasses import dataclass, field

import torch

from rollout.model import prepare_model
from rollout.ranks import Ranks
from teachers.adapters import Adapter, AdapterSlot, check_adapter
from teachers.config import TeacherConfig
from teachers.placement import PlacementPlan
from teachers.residency import LoadFigures, Residency, Weights, size_of
from teachers.sharding import Shards
from teachers.sources import TeacherSource, head_name, open_source
from teachers.teacher import Teacher
from teachers.types import OutputHead


@dataclass(slots=True)
class Base:
    """A checkpoint that one or several teachers are made of.

    model: without memory until weights are attached. source, head: where those, and the head's alone, are read from.
    adapters: the model's place for an adapter. kept_head: in host memory, where it cannot be read alone.
    is_sharded: over the ranks; each then reads its rows and, alone, the head.
    """

    model: Teacher
    source: TeacherSource
    head: TeacherSource
    adapters: AdapterSlot
    is_verified: bool = False
    kept_head: torch.Tensor | None = None
    is_sharded: bool = False


@dataclass(slots=True)
class TeacherLibrary:
    """Local teachers by name."""

    device: torch.device
    teachers: dict[str, Teacher] = field(default_factory=dict)
    bases: dict[str, Base] = field(default_factory=dict)
    base_of: dict[str, str] = field(default_factory=dict)
    weights: Residency | None = None
    heads: Residency | None = None

    def add(self, name: str, base: str, cfg: TeacherConfig, role: str) -> None:
        """Take in a teacher made of the checkpoint that is called `base`; reads its config and the headers of its files.

        Raises ValueError, with its role, where they are not right.
        """
        if base not in self.bases:
            model, source = open_source(base, cfg, role)
            for buffer in model.buffers():  # those that no checkpoint holds stay from now on
                buffer.data = buffer.data.to(self.device)
            slot = AdapterSlot(model)
            self.bases[base] = Base(Teacher(base, model, slot), source, source.only(head_name(model)), slot)
        adapter = None
        if cfg.adapter is not None:
            adapter = Adapter(cfg.adapter, cfg.adapter_revision, role)
            check_adapter(adapter)
        self.base_of[name] = base
        self.teachers[name] = Teacher(name, self.bases[base].model.model, self.bases[base].adapters, adapter)

    def sizes(self) -> dict[str, int]:
        """Bytes of each checkpoint's weights in memory."""
        return {name: size_of(base.source.layout) for name, base in self.bases.items()}

    def place(self, plan: PlacementPlan, timeout: float, ranks: Ranks) -> None:
        """Decide on the memory for weights, once all teachers are in; every rank calls it. Raises ValueError for a teacher that cannot be sharded."""
        self.weights = Residency(plan.capacity, self.device, timeout, on_evict=lambda name: self.bases[name].model.detach())
        self.heads = Residency(2, self.device, timeout)
        shards = Shards(ranks, self.device)
        for name in sorted(plan.sharded):
            self._shard(name, shards)

    def is_sharded(self, name: str) -> bool:
        """Whether a teacher's weights are divided among the ranks; a server's are not."""
        return name in self.base_of and self.bases[self.base_of[name]].is_sharded

    def is_here(self, name: str) -> bool:
        """Whether a teacher's weights are in memory, or on their way."""
        return self.base_of[name] in self.weights

    def open(self, name: str, keep: set[str] = frozenset()) -> Teacher:
        """A teacher with its weights; those of `keep` stay if they can. Raises what reading raises, and what `prepare_model` does of a first reading."""
        base = self.bases[self.base_of[name]]
        weights, reading = self.weights.fetch(base.source, self._bases_of(keep))
        if reading is not None:
            self._attach(base, weights)
        self.teachers[name].activate()
        return self.teachers[name]

    def prefetch(self, name: str, keep: set[str]) -> None:
        """Begin to read a teacher's weights, if there is memory that those of `keep` do not need."""
        self.weights.prefetch(self.bases[self.base_of[name]].source, self._bases_of(keep))

    def head(self, name: str, upcoming: str | None = None) -> OutputHead:
        """The head of a teacher on the device, valid until another teacher is asked for; `upcoming` is the next whose head will be."""
        base = self.bases[self.base_of[name]]
        if self._has_head(name) or (base.source.mapped is None and base.kept_head is None):
            weight = self.open(name).head.weight_VD
        elif base.kept_head is not None:
            weight = base.kept_head.to(self.device)
        else:
            weight = self._read_head(base)
        if upcoming is not None and not self._has_head(upcoming) and self.bases[self.base_of[upcoming]].kept_head is None:
            self.heads.prefetch(self.bases[self.base_of[upcoming]].head, {self.base_of[name]})
        return OutputHead(weight_VD=weight, transform=self.teachers[name].transform)

    def discard(self, name: str) -> None:
        """Forget a teacher's weights, so that they are read again when it is asked for."""
        self.weights.discard(self.base_of[name])
        self.heads.discard(self.base_of[name])
        self.bases[self.base_of[name]].kept_head = None
        self.bases[self.base_of[name]].adapters.present = None

    def figures(self) -> dict[str, LoadFigures]:
        """What reading each checkpoint and its head was and cost since this was last asked, under the first of the teachers that share it."""
        first, total = {base: name for name, base in reversed(self.base_of.items())}, {}
        for residency in (self.weights, self.heads):
            for base, figures in residency.take_figures().items():
                total.setdefault(first[base], LoadFigures()).add(figures)
        return total

    def _has_head(self, name: str) -> bool:
        """Whether a teacher's head is in memory with its other weights."""
        return self.is_here(name) and not self.is_sharded(name)

    def _read_head(self, base: Base) -> torch.Tensor:
        return next(iter(self.heads.fetch(base.head)[0].values()))

    def _shard(self, name: str, shards: Shards) -> None:
        base, users = self.bases[name], [teacher for teacher, used in self.base_of.items() if used == name]
        if any(self.teachers[teacher].adapter is not None for teacher in users):
            raise ValueError(f"the {base.source.role} has an adapter, and a sharded base takes none: set teachers.placement=replicated, or merge the adapter")
        base.model, base.source = shards.add(base.model.model, base.source, lambda: self._read_head(base))
        base.is_sharded = base.is_verified = True  # it verifies itself, in a forward that all ranks share
        for teacher in users:
            self.teachers[teacher] = base.model

    def _bases_of(self, names: set[str]) -> set[str]:
        return {self.base_of[name] for name in names}

    def _attach(self, base: Base, weights: Weights) -> None:
        base.model.attach(weights)
        if not base.is_verified:
            prepare_model(base.model.model, base.source.cfg, base.source.role)
            base.is_verified = True
        if base.source.mapped is None:
            base.kept_head = base.model.head.weight_VD.detach().to("cpu", copy=True)
