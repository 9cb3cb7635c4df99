"""What the trained student takes on one rank under DeepSpeed, part by part, from counts alone.

P: trained parameters. F: frozen ones. b: bytes of a weight (4 or 2). N: ranks. M: bytes of the optimizer's moments per trained parameter: 8 with AdamW; with
Muon 4 for the matrices that it takes.

    part                ZeRO 0      1                       2                   3
    weights             b (P + F)   b (P + F)               b (P + F)           b (P + F) / N, and the small ones whole
    float32 masters     -           4 P / N                 4 P / N             4 P / N, but none in float32: they are the weights
    moments             M P         M P / N                 M P / N             M P / N
    gradients           4 P         4 P                     4 P / N, twice with 4 P / N, always there
                                                            several micro-batches
    reduction           -           4 P + 4 P / N           a bucket            a bucket, always there, and copies of it in the backward
    gathered            -           -                       -                   b times the live parameters, where N > 1

In bfloat16 at stage 1 the gradients (float32, whole) are there from the start and no copy is made for the reduction: that is another optimizer of DeepSpeed's.
A bucket is deepspeed.zero_optimization.reduce_bucket_size numbers: on a GPU all of it, on a CPU what is written of it, P at most. Live parameters at stage 3:
the largest module, or max_live_parameters, whichever is more, and all at most.

At stage 3 a bucket's gradients are reduced from a second piece, in the order of the parameters (DeepSpeed's reduce_scatter_coalesced), of which gloo makes a
third; where one bucket holds them all, that is when the last activation is gone.

The update itself needs, besides, the gradient in one piece (all stages but 0; at stages 1 and 2 beside the share that it is made of) and AdamW's
intermediate (a denominator for each number: two on a CPU, where they are made one after the other), for one of DeepSpeed's groups at a time.
optim.update_ratio_every holds a copy of the masters over it, and takes differences in float64: 16 bytes for each of opd/optim.py's NUMBERS_AT_A_TIME.

On a CPU in bfloat16 oneDNN keeps a kernel for each number of rows that a product has had (an expert's change with every step), 1024 at most:
KERNEL_BYTES, which was measured as what goes with ONEDNN_PRIMITIVE_CACHE_CAPACITY=0. float32 products go elsewhere and keep nothing.

These are DeepSpeed 0.19's allocations, read from its source. tests/opd/test_plan_measured.py holds them to what processes took, on one rank of a CPU with
AdamW: stages 1 and 2 in float32 and stage 3 in bfloat16. Stage 0, Muon, offloading, several ranks and a GPU were never measured.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from opd.config import OptimConfig, OptimizerKind
from opd.optim import NUMBERS_AT_A_TIME, parameter_groups
from opd.plan_config import DeviceKind
from rollout.experts import EXPERT_WEIGHTS, find_experts

GIB = 1 << 30

BUCKET, LIVE, SUB_GROUP, SMALL = 500_000_000, 1_000_000_000, 1_000_000_000, 100_000
"""DeepSpeed's defaults, in numbers: reduce_bucket_size, stage3_max_live_parameters, sub_group_size, stage3_param_persistence_threshold."""

PACKED_BYTES = 0.5 + 1 / 32
"""Of a weight in MXFP4: half a byte, and its share of the block's scale."""


KERNEL_BYTES = 160 << 20
"""Of oneDNN's kernels for bfloat16 products on a CPU."""


class Phase(Enum):
    """What a step of a run goes through; the parts of one phase are in memory together."""

    start = "start"
    rollout = "rollout"
    score = "score"
    backward = "backward"
    update = "update"


RUNNING = (Phase.rollout, Phase.score, Phase.backward, Phase.update)
ALL = (Phase.start, *RUNNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Memory with one purpose. num_bytes: on one rank. phases: when it is there. on_host: in the machine's memory, not the device's.

    remedy: what makes it less.
    """

    name: str
    num_bytes: float
    phases: tuple[Phase, ...]
    on_host: bool = False
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentCounts:
    """Numbers in a student. trained, frozen: parameters. muon: of the trained ones, those that Muon takes. experts: in routed experts' matrices.
    largest_group: the most parameters of one optimizer group. largest_module: of one module's own. small: in parameters that ZeRO-3 leaves whole.
    buffers: bytes.
    """

    trained: int
    frozen: int
    muon: int
    experts: int
    largest_group: int
    largest_module: int
    largest_parameter: int
    small: int
    buffers: int

    @property
    def parameters(self) -> int:
        return self.trained + self.frozen


def count_student(model: PreTrainedModel, cfg: OptimConfig, small: int = SMALL) -> StudentCounts:
    """The counts of a model, whose weights need not be there; what must not train is frozen already."""
    groups = parameter_groups(model, cfg)
    parameters = list(model.parameters())
    return StudentCounts(
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        frozen=sum(parameter.numel() for parameter in parameters if not parameter.requires_grad),
        muon=sum(parameter.numel() for group in groups if group.use_muon for parameter in group.parameters),
        experts=sum(getattr(module, weight).numel() for module in find_experts(model).values() for weight in EXPERT_WEIGHTS),
        largest_group=max(sum(parameter.numel() for parameter in group.parameters) for group in groups),
        largest_module=max(_own_numbers(module) for module in model.modules()),
        largest_parameter=max(parameter.numel() for parameter in parameters),
        small=sum(parameter.numel() for parameter in parameters if parameter.numel() < small),
        buffers=sum(buffer.nbytes for buffer in model.buffers()),
    )


def _own_numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class Zero:
    """How the student is held. weight_bytes: b. num_ranks: N. settings: deepspeed.zero_optimization. several: micro-batches of a step on a rank."""

    stage: int
    weight_bytes: int
    num_ranks: int
    device: DeviceKind
    settings: dict[str, Any]
    several: bool = True

    @property
    def share(self) -> int:
        """Ranks among which the optimizer's state is divided."""
        return self.num_ranks if self.stage else 1

    @property
    def is_bf16_stage1(self) -> bool:
        return self.stage == 1 and self.weight_bytes == 2

    def offloads(self, what: str) -> bool:
        """Whether DeepSpeed keeps `optimizer` or `param` in host memory."""
        return (self.settings.get(f"offload_{what}") or {}).get("device", "none") != "none"

    def number(self, default: int, *names: str) -> int:
        """A size that DeepSpeed's schema knows under one of some names."""
        return int(next((self.settings[name] for name in names if name in self.settings), default))

    def bucket(self, counts: StudentCounts) -> float:
        """Bytes of the buffer in which gradients are gathered to be reduced."""
        numbers = self.number(BUCKET, "reduce_bucket_size")
        width = self.weight_bytes if self.stage == 2 else 4
        buffers = 2 if self.stage in (1, 2) and self.settings.get("overlap_comm") else 1
        return width * (buffers * numbers if self.device is DeviceKind.cuda else min(numbers, counts.trained))


def student_parts(counts: StudentCounts, zero: Zero, cfg: OptimConfig) -> list[Part]:
    """Weights, masters, moments, gradients, reduction, gathered weights and the update of the module's table."""
    moments = optimizer_bytes(counts, cfg) / zero.share
    is_offloaded, name = zero.offloads("optimizer"), "deepspeed.zero_optimization"
    fewer = f"raise plan.ranks or {name}.stage, or set {name}.offload_optimizer.device=cpu"
    has_masters = zero.stage in (1, 2) or (zero.stage == 3 and zero.weight_bytes == 2)
    parts = [
        _weights(counts, zero),
        Part(name="float32 masters", num_bytes=4 * counts.trained / zero.share * has_masters, phases=ALL, on_host=is_offloaded, remedy=fewer),
        Part(name="optimizer moments", num_bytes=moments, phases=RUNNING, on_host=is_offloaded, remedy=fewer),
        *_gradients(counts, zero, fewer),
        Part(name="update", num_bytes=_update(counts, zero, cfg), phases=(Phase.update,), on_host=is_offloaded, remedy="set optim.update_ratio_every=0"),
    ]
    if zero.device is DeviceKind.cpu and zero.weight_bytes == 2:
        parts.append(Part(name="oneDNN's kernels", num_bytes=KERNEL_BYTES, phases=(Phase.backward, Phase.update)))
    if zero.stage == 3 and zero.num_ranks > 1:
        live = min(counts.parameters, max(counts.largest_module, zero.number(LIVE, "max_live_parameters", "stage3_max_live_parameters")))
        remedy = f"lower {name}.stage3_max_live_parameters; a module is gathered whole"
        parts.append(Part(name="gathered weights", num_bytes=zero.weight_bytes * live, phases=(Phase.backward,), remedy=remedy))
    return [part for part in parts if part.num_bytes]


def optimizer_bytes(counts: StudentCounts, cfg: OptimConfig) -> int:
    """Of the moments, over all ranks."""
    muon = counts.muon if cfg.kind is OptimizerKind.muon else 0
    return 8 * (counts.trained - muon) + 4 * muon


def start_part(counts: StudentCounts, zero: Zero) -> Part:
    """The student whole on the device, before DeepSpeed divides it; stages 1 and 2 put what is trained into one piece beside it."""
    twice = counts.trained if zero.stage in (1, 2) else 0
    alone = zero.weight_bytes * (counts.parameters + twice) + counts.buffers - _weights(counts, zero).num_bytes
    return Part(name="student before it is divided", num_bytes=max(0.0, alone), phases=(Phase.start,), remedy="take a device that holds the student whole")


def checkpoint_bytes(counts: StudentCounts, zero: Zero, cfg: OptimConfig) -> int:
    """Of one checkpoint on disk: weights (at stage 3 those that do not train: the others are the masters), masters and moments of all ranks."""
    masters = 4 * counts.trained if zero.stage else 0
    weights = zero.weight_bytes * (counts.frozen if zero.stage == 3 else counts.parameters)
    return weights + counts.buffers + masters + optimizer_bytes(counts, cfg)


def _weights(counts: StudentCounts, zero: Zero) -> Part:
    numbers = counts.parameters
    if zero.stage == 3:
        numbers = counts.small + (counts.parameters - counts.small) / zero.num_ranks
    remedy = "raise deepspeed.zero_optimization.stage to 3" if zero.stage < 3 else "raise plan.ranks"
    on_host = zero.stage == 3 and zero.offloads("param")
    return Part(name="student weights", num_bytes=zero.weight_bytes * numbers + counts.buffers, phases=ALL, on_host=on_host, remedy=remedy)


def _gradients(counts: StudentCounts, zero: Zero, remedy: str) -> list[Part]:
    whole, share, bucket = 4 * counts.trained, 4 * counts.trained / zero.share, zero.bucket(counts)
    smaller = "lower deepspeed.zero_optimization.reduce_bucket_size"
    if zero.stage == 0:
        return [Part(name="gradients", num_bytes=whole, phases=(Phase.backward, Phase.update), remedy=remedy)]
    if zero.is_bf16_stage1:
        return [Part(name="gradients", num_bytes=whole, phases=ALL, remedy=remedy)]
    if zero.stage == 1:
        beside = max(0.0, bucket - whole) + share if zero.device is DeviceKind.cuda else share
        reduction = Part(name="reduction", num_bytes=beside, phases=(Phase.backward,), remedy=smaller)
        return [Part(name="gradients", num_bytes=whole, phases=(Phase.backward,), remedy=remedy), reduction]
    if zero.stage == 2:
        copies = 2 if zero.several and zero.weight_bytes == 4 else 1
        gradients = Part(name="gradients", num_bytes=copies * share, phases=(Phase.backward,), on_host=zero.offloads("optimizer"), remedy=remedy)
        return [gradients, Part(name="reduction", num_bytes=bucket, phases=(Phase.backward,), remedy=smaller)]
    gradients = Part(name="gradients", num_bytes=share, phases=ALL, on_host=zero.offloads("optimizer"), remedy=remedy)
    is_cuda = zero.device is DeviceKind.cuda
    copies = (1 if is_cuda else 2) * 4 * min(zero.number(BUCKET, "reduce_bucket_size"), counts.trained)
    reduction = Part(name="reduction", num_bytes=bucket, phases=ALL if is_cuda else (Phase.backward, Phase.update), remedy=smaller)
    return [gradients, reduction, Part(name="reduction's copies", num_bytes=copies, phases=(Phase.backward,), remedy=smaller)]


def _update(counts: StudentCounts, zero: Zero, cfg: OptimConfig) -> float:
    """Of the optimizer's step, besides what is there anyway (at stages 1 and 2 without that: the gradient in the optimizer's own form)."""
    ratio = 4 * counts.trained / zero.share if cfg.update_ratio_every else 0
    group = counts.largest_group / zero.share if zero.stage else counts.largest_parameter
    group = min(group, zero.number(SUB_GROUP, "sub_group_size", "stage3_sub_group_size")) if zero.stage == 3 else group
    between = 4 * group * (2 if zero.device is DeviceKind.cpu else 1)
    measuring = 16 * min(group, NUMBERS_AT_A_TIME) if cfg.update_ratio_every else 0
    if zero.stage == 0 or zero.is_bf16_stage1:
        return ratio + max(between, measuring)
    flat = 4 * group
    partition = 4 * counts.trained / zero.share if zero.stage < 3 else 0
    return ratio + max(partition + flat + between, measuring)
