"""Optimizer steps of the quickstart's distillation with FP4 experts and without, in turns: the loop's own parts, on a new student.

The student of conf/student/deepseek_v4_tiny.yaml, built twice from one seed, learns from one teacher a domain (new models of the same architecture, in a
temporary folder) under the settings of conf/experiment/quickstart.yaml. Weights differ between the two from the first update on, and with them how long
answers are; so no token ends a completion here, and both sample, score and train on the same number of tokens.

A step in `quant.measure_every` also measures what quantisation costs (opd/update.py), and the same steps measure the update-to-weight ratio. They are
kept apart, and weighed by how many there are.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from opd.bench import timed
from opd.bench_config import QatBenchConfig
from opd.config import DistillConfig
from opd.engine import Engine
from opd.rollouts import build_stream
from opd.student import build_student, copy_for_sampling, load_student_tokenizer, seed_everything
from opd.update import update
from rollout.experts import EXPERT_WEIGHTS, find_experts, find_packed, packed_weight
from rollout.model import save_model
from rollout.stream import RolloutStream
from teachers.pool import TeacherPool

QUANTS = ("none", "mxfp4_experts")
"""Options of the group `quant`; the second is compared with the first."""

PHASES = ("rollout", "score", "update")
STEP = "step"
"""Name of their sum."""

Seconds = dict[str, dict[str, list[float]]]
"""By option of quant and by phase: seconds of each step."""


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """Medians and minimum in seconds over the steps that do not measure and those that do; None where there was none."""

    num_plain: int
    plain: float | None
    least: float | None
    num_measuring: int
    measuring: float | None
    expected: float | None
    """Of any step: plain and measuring in proportion."""


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """Bytes of a sampler's model and of the routed experts in it, and how many weights these have."""

    model: int
    experts: int
    num_expert_weights: int


@dataclass(frozen=True, slots=True)
class _Variant:
    cfg: DistillConfig
    stream: RolloutStream
    engine: Engine


def step_config(cfg: QatBenchConfig, quant: str) -> DistillConfig:
    """The quickstart's distillation, but for its models and what it logs."""
    from opd.composition import load_config

    models = ["student=deepseek_v4_tiny", "student.model=null"]
    return load_config("distill", ["experiment=quickstart", *models, "logger=none", f"seed={cfg.seed}", *cfg.overrides, f"quant={quant}"])


def sampler_memory(cfg: QatBenchConfig) -> dict[str, ModelMemory]:
    """Memory of the sampler's model by option of quant."""
    found = {}
    for quant in QUANTS:
        settings = step_config(cfg, quant)
        student = build_student(settings.student, load_student_tokenizer(settings.student), settings.quant)
        model = copy_for_sampling(student, torch.device("cpu"), settings.quant)
        full = [getattr(module, weight) for module in find_experts(model).values() for weight in EXPERT_WEIGHTS]
        packed = [packed_weight(module, weight) for module, weight in find_packed(model).values()]
        found[quant] = ModelMemory(
            model=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
            experts=sum(tensor.nbytes for tensor in full) + sum(weight.num_bytes for weight in packed),
            num_expert_weights=sum(tensor.numel() for tensor in full) + sum(2 * weight.codes.numel() for weight in packed),
        )
    return found


def measure_steps(cfg: QatBenchConfig, device: torch.device, folder: Path, tell: Callable[[int], None]) -> tuple[Seconds, int]:
    """(seconds of all steps, the first one included; completion tokens of a step). Teachers are saved under `folder`."""
    teachers, variants = _build(cfg, device, folder)
    seconds: Seconds = {quant: {phase: [] for phase in (*PHASES, STEP)} for quant in variants}
    sampled = set()
    for step in range(cfg.steps + 1):
        tell(step)
        for quant, variant in variants.items():
            sampled.add(_step(step, variant, teachers, seconds[quant]))
    assert len(sampled) == 1, f"the steps differ in their number of tokens: {sorted(sampled)}"
    return seconds, sampled.pop()


def phase_time(seconds: list[float], measure_every: int) -> PhaseTime:
    """What the steps of one phase took; the first is not counted."""
    measuring = [taken for step, taken in enumerate(seconds) if step and measure_every and step % measure_every == 0]
    plain = [taken for step, taken in enumerate(seconds) if step and not (measure_every and step % measure_every == 0)]
    usual, seldom = (statistics.median(part) if part else None for part in (plain, measuring))
    share = 1 / measure_every if measure_every else 0.0
    parts = [(weight, median) for weight, median in ((1 - share, usual), (share, seldom)) if weight]
    expected = None if any(median is None for _, median in parts) else sum(weight * median for weight, median in parts)
    return PhaseTime(len(plain), usual, min(plain, default=None), len(measuring), seldom, expected)


def _build(cfg: QatBenchConfig, device: torch.device, folder: Path) -> tuple[TeacherPool, dict[str, _Variant]]:
    settings = {quant: step_config(cfg, quant) for quant in QUANTS}
    first = settings[QUANTS[0]]
    tokenizer = load_student_tokenizer(first.student)
    for number, name in enumerate(first.domains, start=1):
        seed_everything(cfg.seed + number)
        teacher = build_student(first.student, tokenizer)
        save_model(folder / name, teacher, tokenizer, teacher.state_dict())
        for each in settings.values():
            each.domains[name].teacher.model = str(folder / name)
    teachers = TeacherPool(first.domains, first.teachers, tokenizer, device)
    variants = {}
    for quant, each in settings.items():
        seed_everything(cfg.seed)
        student = build_student(each.student, tokenizer, each.quant)
        stream = build_stream(each, student, tokenizer, device)
        stream.sampler.policy = replace(stream.sampler.policy, end_tokens=())
        variants[quant] = _Variant(each, stream, Engine(student, len(tokenizer), each, device))
    return teachers, variants


def _step(step: int, variant: _Variant, teachers: TeacherPool, seconds: dict[str, list[float]]) -> int:
    """One step; returns how many tokens were sampled."""
    device = variant.engine.device.type
    rollouts, rollout = timed(lambda: variant.stream.next(step, variant.engine), device)
    scored, score = timed(lambda: teachers.score(rollouts), device)
    _, updating = timed(lambda: update(variant.engine, teachers, scored, variant.cfg), device)
    for phase, taken in zip((*PHASES, STEP), (rollout, score, updating, rollout + score + updating), strict=True):
        seconds[phase].append(taken)
    return sum(len(each.completion_T) for each in rollouts)
