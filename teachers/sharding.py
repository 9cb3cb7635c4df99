"""Teachers whose weights are divided among the ranks by torch's FSDP2, for those that are too large for one device.

Of each weight of the backbone a rank holds some rows (its first dimension: whole experts of [E, 2I, D]), and reads those alone from the files, into the buffers
of the residency; FSDP2 takes them from there as they are. A forward gathers the embedding, then one layer after another, from all ranks, and lets go of each
when it has run. What FSDP2 leaves alone, buffers and weights without rows, is whole on every rank.

Every rank therefore runs the same teachers, in one order, with the same number of forwards: one that has fewer rollouts runs forwards of one token. That
a reading failed on one rank is known to all before a forward begins (teachers/pool.py); a forward that fails on one rank ends the run: the others wait in it.

The head is not sharded. The update asks for heads in another order on each rank, where nobody may wait for another rank; and as it is read alone, at
most two are in memory. A rank with 1 / n of the backbone reads the head besides: of a model with separate embedding and head of h each, s in all,
(s - h) / n + h bytes. For DeepSeek-V4-Flash h is 0.2 % of s; where it is a fifth, as in models that are small for their vocabulary, sharding saves less.

A skeleton is a model with FSDP2 around its layers, and without memory. Teachers of one architecture take turns in one, so that streams and the memory of
gathered layers, which torch keeps for each, do not grow with the number of teachers. Rows of a weight that divides unevenly are copied once more by FSDP2 on
the ranks that have fewer, as it wants them padded.

B: rows. L: positions. V: vocabulary. D: hidden size.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from rollout.model import apply_settings, backbone_of, head_of, logit_transform, verify_transform
from rollout.padding import group_by_length, sequence_length
from rollout.ranks import Ranks
from rollout.types import Rollout
from teachers.checkpoint_reader import unique_weights
from teachers.placement import GB
from teachers.residency import Layout, Weights, size_of
from teachers.sources import TeacherSource
from teachers.teacher import Teacher
from teachers.types import OutputHead

OLDEST_TORCH = (2, 13)
"""Has FSDPModule.reset_iter_state, without which forwards that no backward follows leave more and more behind."""


class SharedForwardError(BaseException):
    """A forward that all ranks share failed on this one. No Exception: what is caught and tried again would leave the others waiting."""


class Skeleton:
    """A model with FSDP2 around its layers, in which teachers of one architecture take turns.

    owner: whose rows are in it. largest_unit: bytes of the layer (or embedding) that takes most when it is gathered.
    """

    def __init__(self, model: PreTrainedModel, mesh: DeviceMesh, role: str):
        """Takes an `empty_model`, which it changes. Raises ValueError for a family whose layers are not known, or with weights beside backbone and head."""
        self.model, self.mesh, self.owner = model, mesh, None
        body, names = backbone_of(model), {id(tensor): name for name, tensor in unique_weights(model).items()}
        self.name_of = {name: names[id(tensor)] for name, tensor in body.state_dict(keep_vars=True).items()}
        layers = [module for module in body.modules() if type(module).__name__ in model._no_split_modules]
        if not layers or {*names.values()} - {*self.name_of.values(), names[id(head_of(model).weight)]}:
            raise ValueError(f"the {role} ({model.config.model_type}) is of a family that cannot be sharded: set teachers.placement=replicated")
        units = (*layers, body.get_input_embeddings())
        self.largest_unit = max(sum(parameter.nbytes for parameter in unit.parameters()) for unit in units)
        scalars = {parameter for parameter in body.parameters() if not parameter.ndim}
        for module in (*units, body):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
        self.empty = body.state_dict()

    def layout(self) -> tuple[Layout, dict[str, int]]:
        """(what this rank holds of each weight of the backbone, the first row of it)."""
        layout, first_row = {}, {}
        for name, tensor in self.empty.items():
            weight, is_sharded = self.name_of[name], isinstance(tensor, DTensor)
            layout[weight] = ((tensor.to_local() if is_sharded else tensor).shape, tensor.dtype)
            first_row[weight] = min(self.mesh.get_local_rank() * self._most_rows(tensor), len(tensor)) if is_sharded else 0
        return layout, first_row

    def hold(self, owner: str, weights: Weights) -> None:
        """Take these rows as the model's, if they are not there already."""
        if self.owner != owner:
            self._load({name: self._as_shard(tensor, weights[self.name_of[name]]) for name, tensor in self.empty.items()})
            self.owner = owner

    def release(self, owner: str) -> None:
        """Let go of an owner's rows, whose memory will be overwritten; a forward without any would give NaN."""
        if self.owner == owner:
            self._load({name: self._nothing(tensor) for name, tensor in self.empty.items()})
            self.owner = None

    def _load(self, state: dict[str, torch.Tensor]) -> None:
        backbone_of(self.model).load_state_dict(state, assign=True)

    def _as_shard(self, tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, DTensor):
            return rows
        return DTensor.from_local(rows, self.mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())

    def _nothing(self, tensor: torch.Tensor) -> torch.Tensor:
        """One NaN, seen as often as a padded shard has elements."""
        if not isinstance(tensor, DTensor):
            return tensor
        element = torch.full((), torch.nan, dtype=tensor.dtype, device=self.mesh.device_type)
        return self._as_shard(tensor, element.expand(self._most_rows(tensor), *tensor.shape[1:]))

    def _most_rows(self, tensor: torch.Tensor) -> int:
        """Rows of the first ranks; the last ones may have fewer, or none."""
        return -(-len(tensor) // self.mesh.size())


class ShardedTeacher(Teacher):
    """A teacher in a skeleton. Every rank calls `hidden`, with whatever rollouts it has; signals are then taken by each rank alone."""

    def __init__(self, source: TeacherSource, skeleton: Skeleton, read_head: Callable[[], torch.Tensor], ranks: Ranks):
        self.name, self.source, self.skeleton, self.read_head, self.ranks = source.name, source, skeleton, read_head, ranks
        self.adapters = self.adapter = None
        self.model = skeleton.model
        self.transform = logit_transform(self.model.config, source.role)
        self.weights: Weights | None = None
        self.first_head: torch.Tensor | None = None
        self.is_verified = False

    def attach(self, weights: Weights) -> None:
        """Take these rows from the next forward on; for the first one the head is read as well, with which the model is verified."""
        self.weights = weights
        if not self.is_verified:
            self.first_head = self.read_head()

    def detach(self) -> None:
        self.weights = None
        self.skeleton.release(self.name)

    @property
    def head(self) -> OutputHead:
        return OutputHead(weight_VD=self.read_head(), transform=self.transform)

    @torch.no_grad()
    def hidden(self, rollouts: list[Rollout], max_tokens: int) -> list[torch.Tensor]:
        """As `Teacher.hidden`, for this rank's rollouts; every rank calls it. Raises SharedForwardError, and ValueError on all ranks for an unknown family."""
        own = len(group_by_length([sequence_length(rollout) for rollout in rollouts], max_tokens))
        wanted = max(self.ranks.gather(own))
        with self._shared_forwards():
            self.skeleton.hold(self.name, self.weights)
            problem = self._verify()
        if problem is not None:
            raise problem
        with self._shared_forwards():
            result = super().hidden(rollouts, max_tokens)
            for _ in range(wanted - own):
                backbone_of(self.model)(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.model.device), use_cache=False)
            backbone_of(self.model).reset_iter_state()  # it keeps a record of layers for a backward that never comes
        return result

    @contextmanager
    def _shared_forwards(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise SharedForwardError(f"the {self.source.role} ({self.source.cfg.model}) failed in a forward that all ranks share, so the run ends") from error

    def _verify(self) -> ValueError | None:
        """What is wrong with the model's logits, which is the same on all ranks; looked at once."""
        if self.is_verified:
            return None
        head, empty = head_of(self.model), head_of(self.model).weight
        head.weight = nn.Parameter(self.first_head, requires_grad=False)
        try:
            verify_transform(self.model, self.source.cfg, self.source.role)
        except ValueError as error:
            return error
        finally:
            head.weight, self.first_head = empty, None
        self.is_verified = True
        return None


@dataclass(slots=True)
class Shards:
    """The sharded teachers of this rank, and the skeletons that they take turns in."""

    ranks: Ranks
    device: torch.device
    mesh: DeviceMesh | None = None
    skeletons: dict[str, Skeleton] = field(default_factory=dict)

    def add(self, model: PreTrainedModel, source: TeacherSource, read_head: Callable[[], torch.Tensor]) -> tuple[ShardedTeacher, TeacherSource]:
        """A teacher sharded over the ranks, and what this rank reads of it; every rank calls it, in the same order.

        Raises ValueError where the checkpoint cannot be read in parts, for an older torch, and what `apply_settings` and `Skeleton` raise.
        """
        if source.mapped is None:
            raise ValueError(
                f"the {source.role} ({source.cfg.model}) is quantised, or stored in a way that only transformers can read, so it cannot be sharded: "
                "set teachers.placement=replicated, or export it unquantised"
            )
        if torch.__version__ < OLDEST_TORCH:
            raise ValueError(f"sharded teachers need torch {'.'.join(map(str, OLDEST_TORCH))} or later: set teachers.placement=replicated, or update torch")
        self.mesh = self.mesh or init_device_mesh(self.device.type, (self.ranks.count,))
        key = _architecture(model, source)
        if key not in self.skeletons:
            self.skeletons[key] = Skeleton(apply_settings(model, source.cfg, source.role), self.mesh, source.role)
        skeleton = self.skeletons[key]
        layout, first_row = skeleton.layout()
        logging.getLogger(__name__).info(
            "rank %d holds %.3g of the %.3g GB of the %s, and gathers %.3g GB of it at a time", self.mesh.get_local_rank(), size_of(layout) / GB,
            size_of(source.layout) / GB, source.role, skeleton.largest_unit / GB,
        )  # fmt: skip
        return ShardedTeacher(source, skeleton, read_head, self.ranks), replace(source, layout=layout, first_row=first_row, checksums={})


def _architecture(model: PreTrainedModel, source: TeacherSource) -> str:
    """What two teachers have in common that can use one skeleton."""
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    settings = [str(setting) for setting in (source.cfg.dtype, source.cfg.attention, source.cfg.experts)]
    return json.dumps([config, settings], sort_keys=True, default=str)
