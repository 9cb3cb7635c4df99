"""What a step did and how fast, over all ranks: the figures that tell where its time goes. Names: opd/metrics.py.

Work is counted where it is done (`rollout_work`, `update_work`), as sums over the ranks; the tracker, which has the clocks, divides (`phase_metrics`).

    throughput/PHASE_tokens_per_second_per_device = work/PHASE_tokens / seconds/PHASE / ranks
    throughput/PHASE_mfu = work/PHASE_flops / seconds/PHASE / (sum over the ranks of the measured matrix rate)
    throughput/mfu = the same with the FLOPs and seconds of all phases that have both

seconds/PHASE is that of the slowest rank, for which the others wait. The matrix rate is measured on each device at the start, in the dtype of the student
(opd/flops.py), so that 1 means that the whole phase was one large matrix product.

    PHASE     work/PHASE_tokens                                  work/PHASE_flops
    rollout   tokens drawn; those taken from a log are not       each prompt read once, each token drawn (not of a server)
    score     positions of prompt and completion, no padding     the teachers' forward over each sequence; their logits unless they give hidden states
    update    the same                                           3 x the student's forward, 4 x with student.gradient_checkpointing, which runs it
                                                                 twice; per completion token 3 x the student's logits and 1 x the teacher's

With rollout.staleness=1 seconds/rollout is the waiting for what was sampled beside the last update, and the rate follows from that.

Work of a teacher on a server is its server's and counts no FLOPs here; nor does what runs beside the step (probes of routing and quantisation, evaluation).

balance/PHASE is the slowest rank's seconds over the mean, each rank by its own clock from where it began the phase; nothing is waited for to measure it. A
phase in which the ranks wait for each other hides the imbalance and shows near 1: scoring with a sharded teacher or teachers.on_failure=drop, and the
update always, whose backward reduces gradients; with ZeRO-3 the beginning of the rollouts too. What one rank lost earlier then stands in the others'
seconds/update. balance/update_positions (padded positions of the busiest rank over the mean) says what the update's clock cannot.
"""

import resource
from collections.abc import Iterable
from dataclasses import asdict

import torch
from transformers import PreTrainedModel

from opd.batch import MicroBatch
from opd.config import RunConfig
from opd.distributed import Group, num_ranks, reduce_max, reduce_sum
from opd.flops import ModelFlops, measured_matmul_rate, model_flops
from rollout.config import SamplerKind
from rollout.padding import group_by_length, sequence_length
from rollout.stream import RolloutStream
from rollout.types import Rollout
from teachers.config import SignalKind
from teachers.pool import TeacherPool
from teachers.types import ScoredRollout

PHASES = ("rollout", "score", "update")
"""Phases of a step whose work is counted."""

GB = 1e9

UNKNOWN = float("nan")
"""FLOPs of a family that cannot be counted (opd/flops.py); a sum over ranks that holds it is unknown on all, and left out."""


def rollout_work(rollouts: list[Rollout], stream: RolloutStream) -> dict[str, float]:
    """What sampling this step's rollouts (this rank's) took; nothing where they were replayed. Every rank calls it, before it samples anything else."""
    if stream.cfg.replay is not None:
        return {}
    own = {"work/rollout_tokens": float(sum(len(rollout.completion_T) for rollout in rollouts))}
    figures = stream.figures
    if figures is not None:
        own["work/rollout_tokens"] = float(figures.sampled)
        own["work/rollout_flops"] = _rollout_flops(rollouts, stream.sampler.model)
        own |= asdict(figures)
    sums = _summed(own)
    result = {name: value for name, value in sums.items() if name.startswith("work/")}
    if sums.get("slots"):
        result["rollout/occupancy"] = sums["sampled"] / sums["slots"]
        result["rollout/prompt_feed"] = sums["fed"] / sums["slots"]
        result["rollout/log_share"] = sums["log_seconds"] / sums["decode_seconds"]
    if stream.cfg.sampler is SamplerKind.service:
        result["rollout/processes_replaced"] = sums["replaced"]
    return result | {"seconds/weight_sync": float(reduce_max(torch.tensor(stream.sync_seconds, dtype=torch.float64), Group.data))}


def score_work(scored: list[ScoredRollout], teachers: TeacherPool) -> dict[str, float]:
    """What scoring these rollouts (this rank's) took; every rank calls it."""
    by_teacher: dict[str, list[ScoredRollout]] = {}
    for item in scored:
        if item.signal.kind is not None:
            by_teacher.setdefault(item.signal.teacher, []).append(item)
    tokens = positions = real = flops = 0.0
    for teacher, items in by_teacher.items():
        lengths = [sequence_length(item.rollout) for item in items]
        tokens += sum(lengths)
        if teacher in teachers.remote:
            continue
        groups = group_by_length(lengths, teachers.cfg.max_tokens_per_forward)
        positions, real = positions + sum(len(group) * max(lengths[i] for i in group) for group in groups), real + sum(lengths)
        model = model_flops(teachers.library.teachers[teacher].model)
        with_logits = [len(item.rollout.completion_T) for item in items if item.signal.kind is not SignalKind.hidden_states]
        flops += _sequence_flops(model, lengths) + _logit_flops(model, sum(with_logits))
    sums = _summed({"work/score_tokens": tokens, "work/score_flops": flops, "positions": positions, "real": real})
    return _padding("batch/score_padding", sums)


def update_work(batches: list[MicroBatch], student: PreTrainedModel, cfg: RunConfig, teachers: TeacherPool | None) -> dict[str, float]:
    """What training on these micro-batches (this rank's) takes; every rank calls it."""
    passes = 4 if cfg.student.gradient_checkpointing else 3
    model, flops, tokens, own_positions = model_flops(student), 0.0, 0.0, 0.0
    named = {batch.teacher for batch in batches if batch.signal is SignalKind.hidden_states}
    models = {teacher: model_flops(teachers.library.teachers[teacher].model) for teacher in named}
    for batch in batches:
        if batch.is_filler:
            continue
        tokens, own_positions = tokens + float(batch.real_BL.sum()), own_positions + batch.tokens_BL.numel()
        flops += passes * _sequence_flops(model, map(sequence_length, batch.rollouts)) + 3 * _logit_flops(model, len(batch.target_N))
        if batch.signal is SignalKind.hidden_states:
            flops += _logit_flops(models[batch.teacher], len(batch.target_N))
    positions = float(sum(batch.tokens_BL.numel() for batch in batches))
    sums = _summed({"work/update_tokens": tokens, "work/update_flops": flops, "positions": positions, "real": tokens, "own": own_positions})
    busiest = float(reduce_max(torch.tensor(own_positions, dtype=torch.float64), Group.data))
    return _padding("batch/padding", sums) | {"balance/update_positions": busiest * num_ranks(Group.data) / sums["own"]}


def phase_metrics(metrics: dict[str, float], seconds: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """Rates and balance of a step from its metrics so far, which hold its work, and this rank's seconds per phase; every rank calls it.

    dtype: of the student, in which the device's matrix rate is taken.
    """
    has_flops = any(f"work/{phase}_flops" in metrics for phase in PHASES)
    rate = measured_matmul_rate(dtype, present_device()) if has_flops else 0.0
    own = torch.tensor([*seconds.values(), rate], dtype=torch.float64)
    slowest = dict(zip(seconds, reduce_max(own, Group.data).tolist(), strict=False))
    *totals, rate = reduce_sum(own, Group.data).tolist()
    ranks, result = num_ranks(Group.data), {f"seconds/{phase}": value for phase, value in slowest.items()}
    result |= {f"balance/{phase}": slowest[phase] * ranks / total for phase, total in zip(seconds, totals, strict=True)}
    flops = {phase: metrics[f"work/{phase}_flops"] for phase in PHASES if phase in seconds and f"work/{phase}_flops" in metrics}
    for phase in PHASES:
        if phase in seconds and f"work/{phase}_tokens" in metrics:
            result[f"throughput/{phase}_tokens_per_second_per_device"] = metrics[f"work/{phase}_tokens"] / slowest[phase] / ranks
        if phase in flops:
            result[f"throughput/{phase}_mfu"] = flops[phase] / slowest[phase] / rate
    if flops:
        result["throughput/mfu"] = sum(flops.values()) / sum(slowest[phase] for phase in flops) / rate
        result["throughput/matmul_tflops_per_device"] = rate / ranks / 1e12
    return result


def memory_metrics() -> dict[str, float]:
    """Peak memory of the rank that needed most: resident since its start, and on a GPU since this was last asked. Every rank calls it."""
    peaks = {"memory/peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB}
    if torch.cuda.is_available():
        peaks["memory/peak_gpu_gb"] = torch.cuda.max_memory_allocated() / GB
        torch.cuda.reset_peak_memory_stats()
    largest = reduce_max(torch.tensor(list(peaks.values()), dtype=torch.float64), Group.data)
    return dict(zip(peaks, largest.tolist(), strict=True))


def present_device() -> torch.device:
    """Where this rank computes (opd/distributed.py has chosen which of several GPUs)."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _summed(own: dict[str, float]) -> dict[str, float]:
    """Sums over the ranks, without those that are unknown and FLOPs that are none; every rank passes the same names."""
    sums = reduce_sum(torch.tensor(list(own.values()), dtype=torch.float64), Group.data).tolist()
    return {name: value for name, value in zip(own, sums, strict=True) if not name.endswith("_flops") or value > 0}


def _padding(name: str, sums: dict[str, float]) -> dict[str, float]:
    """The work among some sums, and the share of their positions that was padding, under this name."""
    share = {name: 1 - sums["real"] / sums["positions"]} if sums["positions"] else {}
    return {key: value for key, value in sums.items() if key.startswith("work/")} | share


def _rollout_flops(rollouts: list[Rollout], student: PreTrainedModel) -> float:
    model = model_flops(student)
    if model is None:
        return UNKNOWN
    prompts = {rollout.prompt.request: len(rollout.prompt.tokens) for rollout in rollouts}
    drawn = sum(model.completion(len(rollout.prompt.tokens), len(rollout.completion_T)) for rollout in rollouts)
    return _sequence_flops(model, prompts.values()) + drawn


def _sequence_flops(model: ModelFlops | None, lengths: Iterable[int]) -> float:
    return UNKNOWN if model is None else sum(model.sequence(length) for length in lengths)


def _logit_flops(model: ModelFlops | None, tokens: int) -> float:
    return UNKNOWN if model is None else model.logits * tokens
