"""`opd plan`: the memory that a distillation takes on each rank, part by part, before anything is allocated; and what does not fit.

Everything follows from the models' configs and the run's settings: no weight is read, no process group made, and 1.6 T parameters are planned on a laptop.
The student under DeepSpeed: opd/memory.py. What forwards, backwards and caches take: traced on models without weights (opd/plan_models.py). Teachers: as
teachers/placement.py will place them. The loss: the buffers of opd/tiles.py, which are, with C the rows of a tile, N completion tokens, V vocabulary
and D hidden size, 2 * 4 C V (both models' logits), 4 N D and 4 V D (the gradients by hidden states and head), and the teacher's N states.

A part is there in some phases of a step; the peak is that of the phase with the largest sum. Lengths are the worst case: every prompt
plan.prompt_tokens, every completion rollout.max_new_tokens. Whatever is shared in a machine's memory is listed apart, for plan.ranks_per_node ranks.

The answer to "does it fit" is the exit code: 0, or 2 with a sentence for each phase that does not, as `opd check` refuses, so that a
batch script can ask before it queues.
"""

import math

import psutil
import torch

from opd.config import PlanCommandConfig
from opd.console import print_table
from opd.deepspeed_settings import deepspeed_settings
from opd.memory import ALL, BUCKET, GIB, PACKED_BYTES, RUNNING, Part, Phase, StudentCounts, Zero, checkpoint_bytes, count_student, start_part, student_parts
from opd.plan_config import DeviceKind
from opd.plan_models import planned_student, planned_teachers
from opd.quant_config import ExpertFormat
from opd.student import prepare_training
from opd.tiles import TILE_ELEMENTS
from opd.zero3 import GATHERED_BYTES
from rollout.config import SamplerKind
from rollout.model import torch_dtype
from rollout.weights import WORDS_AT_A_TIME
from teachers.config import SignalKind
from teachers.placement import PlacementPlan, plan_placement


class Plan:
    """The parts of a job's memory.

    parts: on each rank. counts, zero: the student, and how it is held. notes: sentences to print. problems: sentences on what does not fit.
    """

    def __init__(self, cfg: PlanCommandConfig):
        """Raises ValueError for a student or teacher that cannot be read."""
        self.cfg, self.notes, self.problems = cfg, [], []
        cfg.plan.ranks = cfg.plan.ranks or cfg.launch.processes
        self.student = planned_student(cfg.student)
        model = self.student.build()
        prepare_training(model, cfg.student)
        deepspeed_settings(cfg, torch_dtype(cfg.student.dtype))  # refuses what the run would refuse
        self.counts: StudentCounts = count_student(model, cfg.optim)
        zero = cfg.deepspeed.get("zero_optimization", {})
        self.length = cfg.plan.prompt_tokens + cfg.rollout.max_new_tokens
        self.rollouts = math.ceil(cfg.rollout.prompts_per_step / cfg.plan.ranks) * cfg.rollout.completions_per_prompt
        self.rows = min(self.rollouts, max(1, cfg.batch.max_tokens_per_micro_batch // self.length))
        self.zero = Zero(
            stage=zero.get("stage", 0), weight_bytes=self.student.weight_bytes, num_ranks=cfg.plan.ranks, device=cfg.plan.device, settings=zero,
            several=self.rollouts > self.rows,
        )  # fmt: skip
        self.teachers = planned_teachers(cfg, self.student)
        self.parts = student_parts(self.counts, self.zero, cfg.optim)
        self.parts += [start_part(self.counts, self.zero), *_expert_parts(self), *_sampler_parts(self), *_teacher_parts(self), *_training_parts(self)]
        self.parts += [part for part in _host_parts(self) if part.num_bytes]
        self._judge()
        self._judge_wholeness()

    def phase_bytes(self, phase: Phase, on_host: bool = False) -> float:
        """Of one rank in one phase."""
        return sum(part.num_bytes for part in self.parts if phase in part.phases and part.on_host is on_host)

    def peak(self, on_host: bool = False) -> float:
        """Of one rank."""
        return max(self.phase_bytes(phase, on_host) for phase in ALL)

    @property
    def whole_student(self) -> int:
        """Bytes of the student before DeepSpeed divides it."""
        return self.zero.weight_bytes * self.counts.parameters + self.counts.buffers

    def alone(self, phase: Phase) -> float:
        """Of one rank in one phase, what is there in that phase alone."""
        return sum(part.num_bytes for part in self.parts if part.phases == (phase,) and not part.on_host)

    def of(self, name: str) -> float:
        """Bytes of the parts of a name on one rank; 0 where there is none."""
        return sum(part.num_bytes for part in self.parts if part.name == name)

    def _judge(self) -> None:
        """Sentences on the phases that exceed the device or the machine."""
        own = self.cfg.plan
        limits = [(False, device_bytes(self.cfg), 1, "each rank")]
        if own.host_memory_gib is not None:
            limits.append((True, own.host_memory_gib * GIB, min(own.ranks, own.ranks_per_node), "each machine's host memory"))
        for on_host, limit, times, where in limits:
            for phase in ALL:
                total = times * self.phase_bytes(phase, on_host)
                if total > limit:
                    largest = max((part for part in self.parts if phase in part.phases and part.on_host is on_host), key=lambda part: part.num_bytes)
                    words = f"{phase.value} takes {_gib(total)} GiB of {where}, which has {_gib(limit)}"
                    self.problems.append(f"{words}: the most is {largest.name} with {_gib(times * largest.num_bytes)}; {largest.remedy}")

    def _judge_wholeness(self) -> None:
        """A sentence on a student that no number of ranks makes fit, since each rank builds it whole and samples from a whole copy."""
        limit, copy = device_bytes(self.cfg), self.of("sampler weights")
        if max(self.whole_student, copy) > limit:
            words = f"no number of ranks and no ZeRO stage makes it fit in {_gib(limit)} GiB: every rank builds the student whole "
            words += f"({_gib(self.whole_student)} GiB) and samples from a whole copy ({_gib(copy)}), so building it divided (deepspeed.zero.Init) "
            words += "and a sampler that is divided or on devices"
            self.problems.append(f"{words} of its own would have to come first")


def plan(cfg: PlanCommandConfig) -> None:
    """Print the memory of a job. Raises ValueError with what does not fit."""
    made = Plan(cfg)
    own = cfg.plan
    rows = [[part.name, _gib(part.num_bytes), _gib(part.num_bytes * own.ranks), _when(part)] for part in made.parts if not part.on_host]
    rows += [[f"in {phase.value}", _gib(made.phase_bytes(phase)), _gib(made.phase_bytes(phase) * own.ranks), ""] for phase in ALL]
    counts, zero = made.counts, made.zero
    size = f"{counts.parameters / 1e9:.4g} B parameters, {counts.trained / 1e9:.4g} B trained"
    title = f"memory in GiB of each of {own.ranks} ranks ({own.device.value}): {size}, ZeRO {zero.stage}, {cfg.student.dtype.value}"
    print_table(title, ["part", "per rank", "all ranks", "when"], rows, "\n".join(made.notes))
    times = min(own.ranks, own.ranks_per_node)
    host = [[part.name, _gib(part.num_bytes), _gib(part.num_bytes * times), _when(part)] for part in made.parts if part.on_host]
    disk = checkpoint_bytes(counts, zero, cfg.optim)
    caption = f"disk: {_gib(disk)} GiB for a checkpoint, {_gib(disk * (cfg.checkpoint.keep + 1))} for the {cfg.checkpoint.keep} that stay and the next; "
    caption += f"{_gib(zero.weight_bytes * counts.parameters + counts.buffers)} for the trained model"
    print_table(f"host memory in GiB, {times} ranks on a machine", ["part", "per rank", "machine", "when"], host, caption)
    limit = device_bytes(cfg)
    print(f"peak: {_gib(made.peak())} GiB of {_gib(limit)} on each rank")
    if made.problems:
        raise ValueError("it does not fit: " + "; ".join(made.problems))


def device_bytes(cfg: PlanCommandConfig) -> float:
    """Memory of a rank's device."""
    if cfg.plan.memory_gib is not None:
        return cfg.plan.memory_gib * GIB
    if cfg.plan.device is DeviceKind.cuda and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    return psutil.virtual_memory().total / min(cfg.plan.ranks, cfg.plan.ranks_per_node)


def _expert_parts(made: Plan) -> list[Part]:
    """The FP4 values that the trainer keeps beside the weights below ZeRO-3 (opd/qat.py)."""
    if made.cfg.quant.experts is ExpertFormat.none or made.zero.stage == 3:
        return []
    remedy = "raise deepspeed.zero_optimization.stage to 3, where nothing is kept"
    return [Part(name="FP4 values of the experts", num_bytes=made.zero.weight_bytes * made.counts.experts, phases=RUNNING, remedy=remedy)]


def _sampler_parts(made: Plan) -> list[Part]:
    """The sampler's own copy of the student, and a cohort's cache and forward."""
    cfg, counts, width = made.cfg, made.counts, made.zero.weight_bytes
    is_packed = cfg.quant.experts is ExpertFormat.mxfp4
    weights = width * counts.parameters + counts.buffers - (width - PACKED_BYTES) * counts.experts * is_packed
    smaller = "pack its experts with quant=mxfp4_experts" if not is_packed else "it holds the student whole on each rank"
    parts = [Part(name="sampler weights", num_bytes=weights, phases=ALL, remedy=smaller)]
    if made.zero.stage == 3 and made.zero.num_ranks > 1:
        gathered = min(width * counts.parameters, max(GATHERED_BYTES, width * counts.largest_parameter))
        parts.append(Part(name="weights gathered for the sampler", num_bytes=gathered, phases=(Phase.rollout,)))
    if cfg.rollout.sampler is SamplerKind.service:
        made.notes.append("the processes of rollout.sampler=service are not counted: each holds a copy of the student, a cache and a forward of its own")
    if cfg.rollout.sampler is not SamplerKind.local or cfg.rollout.replay is not None:
        return parts
    decoding = made.student.frozen().decoding(cfg)
    layers = made.student.config.get_text_config().num_hidden_layers
    decoded = width * counts.experts / layers * is_packed
    narrower = "lower rollout.decode_width or rollout.max_new_tokens"
    hashing = 16 * WORDS_AT_A_TIME - decoding.cache  # of the weights, before the cache is there
    working = max(decoding.prefill - decoding.cache + decoded, decoding.step + decoded, hashing)
    parts.append(Part(name="sampler cache", num_bytes=decoding.cache, phases=(Phase.rollout,), remedy=narrower))
    parts.append(Part(name="sampler forward", num_bytes=max(0.0, working), phases=(Phase.rollout,), remedy=narrower))
    return parts


def _teacher_parts(made: Plan) -> list[Part]:
    """Teachers where placement puts them, their heads in the update, and a scoring forward."""
    if not made.teachers:
        return []
    cfg = made.cfg
    sizes = {name: teacher.num_bytes for name, teacher in made.teachers.items()}
    placement = _placement(made, sizes)
    held = [size / (cfg.plan.ranks if name in placement.sharded else 1) for name, size in sizes.items()]
    parts = [Part(
        name="teachers", num_bytes=sum(sorted(held)[-placement.capacity :]), phases=(Phase.score, Phase.backward, Phase.update, Phase.rollout),
        remedy="set teachers.placement=sharded, teachers.max_resident=1 or teachers.prefetch=false",
    )]  # fmt: skip
    name = max(sizes, key=sizes.get)
    largest = made.teachers[name]
    if cfg.teachers.signal is SignalKind.hidden_states and (placement.sharded or placement.max_resident < len(sizes)):
        head = largest.vocab_size * largest.hidden_size * largest.weight_bytes
        parts.append(Part(name="teachers' heads", num_bytes=min(2, len(sizes)) * head, phases=(Phase.backward, Phase.update, Phase.rollout, Phase.score)))
    if placement.sharded:
        layers = largest.config.get_text_config().num_hidden_layers
        parts.append(Part(name="a teacher's layer gathered", num_bytes=sizes[name] / layers, phases=(Phase.score,)))
    rows = min(made.rollouts, max(1, cfg.teachers.max_tokens_per_forward // made.length))
    states = made.rollouts * cfg.rollout.max_new_tokens * largest.hidden_size * largest.weight_bytes
    fewer = "lower teachers.max_tokens_per_forward"
    parts.append(Part(name="scoring forward", num_bytes=largest.scoring(rows, made.length), phases=(Phase.score,), remedy=fewer))
    parts.append(Part(name="scored hidden states", num_bytes=states, phases=(Phase.score,), remedy="lower rollout.prompts_per_step, or raise plan.ranks"))
    return parts


def _placement(made: Plan, sizes: dict[str, int]) -> PlacementPlan:
    """As the pool will place them, on a device that is still empty; where they do not fit, in as much as they take."""
    cfg = made.cfg
    try:
        found = plan_placement(sizes, cfg.teachers, int(device_bytes(cfg)), cfg.plan.ranks)
    except ValueError as error:
        made.problems.append(str(error))
        found = PlacementPlan(sharded=frozenset(sizes if cfg.plan.ranks > 1 else ()), max_resident=1, capacity=1, description=f"teachers: {error}")
    made.notes.append(found.description)
    return found


def _training_parts(made: Plan) -> list[Part]:
    """Activations and the loss of the largest micro-batch; what they take at the moment when gradients and they together take most."""
    cfg, zero, student = made.cfg, made.zero, made.student
    traced = student.training(made.rows, made.length)
    tokens = made.rows * cfg.rollout.max_new_tokens
    width = max((teacher.hidden_size * teacher.weight_bytes for teacher in made.teachers.values()), default=0)
    tile = min(tokens, max(1, TILE_ELEMENTS[cfg.plan.device.value] // student.vocab_size))
    loss = 4 * (2 * tile * student.vocab_size + tokens * student.hidden_size + student.vocab_size * student.hidden_size) + tokens * width
    smaller = "lower batch.max_tokens_per_micro_batch" + ("" if cfg.student.gradient_checkpointing else ", or set student.gradient_checkpointing=true")
    backward = max(traced.forward, traced.kept + loss, traced.backward)
    if not zero.several and zero.stage in (0, 1) and not zero.is_bf16_stage1:  # gradients come while activations go
        backward = max(traced.forward, traced.kept + loss, traced.backward_with_gradients) - made.of("gradients")
    made.notes.append(f"micro-batch: {made.rows} x {made.length} tokens; {made.rollouts} rollouts of a rank in a step")
    if zero.stage == 1:  # gradients are reduced when the last activation is gone
        backward -= made.of("reduction")
    if zero.stage == 3 and zero.number(BUCKET, "reduce_bucket_size") >= made.counts.trained:  # likewise
        backward -= made.of("reduction's copies")
    parts = [Part(name="activations and loss", num_bytes=max(0.0, backward), phases=(Phase.backward,), remedy=smaller)]
    if cfg.teachers.gradient_share_every and zero.stage < 3:
        several = made.rollouts > made.rows * max(1, len(made.teachers))
        gradient = zero.weight_bytes * made.counts.trained
        shares = max(traced.kept + loss, traced.backward_with_gradients) + several * gradient
        beside = max(shares, 3 * gradient * several) - sum(part.num_bytes for part in [*made.parts, *parts] if part.phases == (Phase.backward,))
        parts.append(Part(name="gradient shares", num_bytes=max(0.0, beside), phases=(Phase.backward,), remedy="set teachers.gradient_share_every=0"))
    return [part for part in parts if part.num_bytes]


def _host_parts(made: Plan) -> list[Part]:
    """What a rank has in its machine's memory beside its device's."""
    cfg, counts, width = made.cfg, made.counts, made.zero.weight_bytes
    whole = width * counts.parameters + counts.buffers
    parts = []
    if cfg.plan.device is DeviceKind.cuda:
        parts.append(Part(name="student while it is built", num_bytes=whole, phases=(Phase.start,), on_host=True, remedy="lower plan.ranks_per_node"))
        remedy = "set teachers.max_resident=1"
        parts.append(Part(name="pinned memory of teachers", num_bytes=made.of("teachers"), phases=RUNNING, on_host=True, remedy=remedy))
    if made.teachers and cfg.teachers.signal is SignalKind.hidden_states:
        width = max(t.hidden_size * (torch_dtype(cfg.teachers.hidden_dtype or t.settings.dtype).itemsize) for t in made.teachers.values())
        stored = made.rollouts * cfg.rollout.max_new_tokens * width
        memory = stored if cfg.teachers.hidden_memory_gb is None else min(stored, cfg.teachers.hidden_memory_gb * 1e9)
        remedy = "set teachers.hidden_memory_gb and hidden_folder"
        parts.append(Part(name="hidden store", num_bytes=memory, phases=(Phase.score, Phase.backward), on_host=True, remedy=remedy))
    if cfg.checkpoint.asynchronous:
        saved = checkpoint_bytes(counts, made.zero, cfg.optim) / cfg.plan.ranks
        remedy = "set checkpoint.asynchronous=false"
        parts.append(Part(name="checkpoint that is being written", num_bytes=saved, phases=RUNNING, on_host=True, remedy=remedy))
    remedy = "every rank holds the trained model whole when it is written"
    parts.append(Part(name="trained model when it is written", num_bytes=whole, phases=(Phase.update,), on_host=True, remedy=remedy))
    return parts


def _when(part: Part) -> str:
    return "always" if part.phases == ALL else "running" if set(part.phases) == set(RUNNING) else ", ".join(phase.value for phase in part.phases)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.3g}" if num_bytes < 1000 * GIB else f"{num_bytes / GIB:,.0f}"
