"""One optimizer step from scored rollouts (or supervised examples).

    loss = sum_d w_d (1 / N_d) sum_{t in d} loss_t

N_d counts the tokens of domain d in the whole step over all ranks, and the weights of the domains present are divided by
their sum, so that neither micro-batching nor grouping by teacher nor the number of ranks changes the loss. Token-share weights are a
different normalisation (a domain's length would enter its weight) and are never mixed with this one.

A step with a loss or gradient that is not finite is skipped as a whole, on all ranks together, since the gradient that they sum is then not finite: a
loss that is not finite spoils the last backward even where its own gradient is finite. optim.max_skipped_steps says how many may be in a row.

N: completion tokens of a micro-batch.
"""

import logging
import math
from dataclasses import replace

import torch

from opd.batch import MicroBatch, distillation_batches, supervised_batches, with_hidden
from opd.config import DistillConfig, RunConfig
from opd.distributed import Group, gather_objects, is_main, num_ranks, reduce_sum
from opd.engine import Engine
from opd.gradient_share import gradient_shares
from opd.metrics import DomainTotals, Scores, add_compared, add_losses, loss_metrics, teacher_loss_metrics
from opd.mismatch import mask_mismatched
from opd.quant_config import ExpertFormat
from opd.route_replay import require_routes
from opd.samples import Samples
from opd.throughput import score_work, update_work
from rollout.config import schedule_value
from rollout.replay import rollout_key
from rollout.types import Rollout
from teachers.config import SignalKind
from teachers.pool import TeacherPool
from teachers.types import ScoredRollout

MOST_NAMED = 3
"""Rollouts that a message names."""

LOG = logging.getLogger(__name__)


def update(
    engine: Engine, teachers: TeacherPool, scored: list[ScoredRollout], cfg: DistillConfig, samples: Samples | None = None, scores: Scores | None = None
) -> dict[str, float]:
    """Distil one step's scored rollouts (this rank's) into the student; returns the step's metrics. samples: what keeps a few of them, where it is due.
    scores: of the graders, for metrics alone.
    """
    require_routes([item.rollout for item in scored], cfg.student.replay_routes, len(engine.recorder.routers))
    scored, masked = mask_mismatched(engine, teachers.recovered(scored), cfg)
    weights, metrics = domain_weights([item.rollout for item in scored], cfg, engine.policy_step)
    batches = distillation_batches(scored, weights, cfg.batch, engine.least_length)
    step = engine.policy_step + 1
    kept = samples if samples is not None and samples.is_due(step) else None
    metrics |= train(engine, batches, cfg, teachers, kept, scores)
    if kept is not None:
        kept.write(step)
    return metrics | masked | score_work(scored, teachers) | teachers.metrics()


def supervised_update(engine: Engine, examples: list[Rollout], cfg: RunConfig) -> dict[str, float]:
    """Train on the examples' completions (this rank's); returns the step's metrics."""
    weights, metrics = domain_weights(examples, cfg, engine.policy_step)
    batches = supervised_batches(examples, weights, cfg.batch, engine.least_length)
    return metrics | train(engine, batches, cfg, None)


def domain_weights(rollouts: list[Rollout], cfg: RunConfig, step: int) -> tuple[dict[str, float], dict[str, float]]:
    """(weight of one token per domain: w_d / N_d, metrics of asked and realised weights).

    Raises ValueError where no domain of the step has a token with weight.
    """
    names = list(cfg.domains)
    own = torch.tensor([sum(r.num_loss_tokens for r in rollouts if r.prompt.domain == name) for name in names], dtype=torch.float64)
    tokens = dict(zip(names, reduce_sum(own, Group.data).tolist(), strict=True))
    asked = {name: schedule_value(cfg.domains[name].loss_weight, step, f"domains.{name}.loss_weight") for name in names}
    total = sum(asked[name] for name in names if tokens[name])
    if total == 0:
        raise ValueError(f"no domain of step {step} has both completion tokens and a loss_weight above 0")
    realised = {name: asked[name] / total if tokens[name] else 0.0 for name in names}
    metrics = {f"domain/{name}/loss_weight": realised[name] for name in names}
    metrics |= {f"domain/{name}/loss_weight_asked": asked[name] / sum(asked.values()) for name in names}
    return {name: realised[name] / tokens[name] if tokens[name] else 0.0 for name in names}, metrics


def train(
    engine: Engine,
    batches: list[MicroBatch],
    cfg: RunConfig,
    teachers: TeacherPool | None,
    samples: Samples | None = None,
    scores: Scores | None = None,
) -> dict[str, float]:
    """One optimizer update from the step's micro-batches (this rank's); returns its metrics. teachers: whose hidden states and heads they need, if any.
    samples: where the losses of the tokens go too. scores: of the rollouts' graders, for metrics alone.
    """
    distils = isinstance(cfg, DistillConfig) and teachers is not None
    totals = DomainTotals(list(cfg.domains))
    metrics = {}
    if engine.recorder.routers and cfg.student.router_probe_every and engine.policy_step % cfg.student.router_probe_every == 0:
        metrics = engine.probe_routing(batches[0])
    if engine.is_quantization_due():
        rollouts = [rollout for batch in batches if not batch.is_filler for rollout in batch.rollouts]
        metrics |= measure_quantization(engine, rollouts or [*batches[0].rollouts], cfg)  # a rank whose teachers are dropped takes part with nothing
    every = cfg.teachers.gradient_share_every if distils and engine.zero_stage < 3 else 0
    if every and engine.policy_step % every == 0:
        metrics |= gradient_shares(engine, batches, teachers)
    engine.recorder.start_step()
    own_sequences = sum(rollout.num_loss_tokens > 0 for batch in batches if not batch.is_filler for rollout in batch.rollouts)
    balance_scale = 1.0 / float(reduce_sum(torch.tensor(float(own_sequences)), Group.data))
    finite: list[torch.Tensor] = []
    for number, batch in enumerate(batches):
        head = None
        if batch.signal is SignalKind.hidden_states:
            batch = with_hidden(batch, teachers)
            head = teachers.head(batch.teacher, _next_teacher(batches, number))
        is_real = not batch.is_filler
        batch = replace(batch.to(engine.device), is_inspected=samples is not None and is_real, is_compared=distils and is_real)
        scale = 0.0 if batch.is_filler else balance_scale
        is_last = number == len(batches) - 1
        loss, losses = engine.loss(batch, head, is_last, scale)
        finite.append(losses.loss_N.isfinite())
        engine.backward(_spoiled_unless_finite(loss, finite) if is_last else loss)
        add_losses(totals, batch, losses)
        add_compared(totals, batch, losses, scores or {})
        if samples is not None:
            samples.add(batch, losses)
    metrics |= engine.step()
    is_skipped = engine.skipped_in_a_row > 0
    if is_skipped:
        _judge_skipped(engine, batches, finite, cfg.optim.max_skipped_steps)
    engine.recorder.sum_ranks()
    if cfg.student.router_bias_speed and not is_skipped:
        engine.recorder.update_bias(cfg.student.router_bias_speed)
    metrics |= engine.recorder.metrics() | loss_metrics(totals, is_distillation=distils)
    metrics |= update_work(batches, engine.model, cfg, teachers)
    if distils:
        metrics |= teacher_loss_metrics(totals, {teachers.label(name): teachers.domains_of(name) for name in teachers.configs})
    return {name: value for name, value in metrics.items() if math.isfinite(value)} if is_skipped else metrics


def _next_teacher(batches: list[MicroBatch], number: int) -> str | None:
    """The teacher whose head is needed after that of a micro-batch."""
    return next((batch.teacher for batch in batches[number:] if batch.teacher != batches[number].teacher and batch.signal is SignalKind.hidden_states), None)


def measure_quantization(engine: Engine, rollouts: list[Rollout], cfg: RunConfig) -> dict[str, float]:
    """What quantisation changes, over a few rollouts of each domain (names: opd/metrics.py); every rank calls it."""
    ordered, totals = sorted(rollouts, key=rollout_key), DomainTotals(list(cfg.domains))
    share = -(-cfg.quant.measure_rollouts // num_ranks(Group.data))
    chosen: list[Rollout] = []
    for name in cfg.domains:
        chosen += [rollout for rollout in ordered if rollout.prompt.domain == name][:share]
    matches = torch.zeros(2, dtype=torch.float64)
    for batch in supervised_batches(chosen, dict.fromkeys(cfg.domains, 1.0), cfg.batch):
        batch = batch.to(engine.device)
        if cfg.quant.indexer:
            matches += engine.indexer_matches(batch) * (not batch.is_filler)
        if cfg.quant.experts is not ExpertFormat.none:
            _add_kl(totals, batch, engine.expert_kl(batch))
    sums_of = totals.reduced(("kl", "tokens"))
    metrics = {f"quant/{domain}/kl_per_token": sums["kl"] / sums["tokens"] for domain, sums in sums_of.items() if sums["tokens"]}
    matched, total = reduce_sum(matches, Group.data).tolist()
    return metrics | ({"quant/indexer_recall": matched / total} if total else {})


def _add_kl(totals: DomainTotals, batch: MicroBatch, kl_N: torch.Tensor) -> None:
    for number, rollout in enumerate(batch.rollouts) if not batch.is_filler else ():
        mask_N = batch.mask_N & (batch.rollout_N == number)
        totals.add(rollout.prompt.domain, kl=float(kl_N[mask_N].double().sum()), tokens=int(mask_N.sum()))


def _spoiled_unless_finite(loss: torch.Tensor, finite: list[torch.Tensor]) -> torch.Tensor:
    """The last micro-batch's loss, NaN where a loss of this rank's step is not finite: so is then the gradient of all ranks, whatever it was before."""
    is_finite = torch.stack([finite_N.all() for finite_N in finite]).all()
    return loss * torch.where(is_finite, 1.0, math.nan)


def _judge_skipped(engine: Engine, batches: list[MicroBatch], finite: list[torch.Tensor], most: int) -> None:
    """Say whose loss was not finite in the step that was just skipped; every rank calls it. Raises ValueError after more than `most` in a row."""
    own = []
    for batch, finite_N in zip(batches, finite, strict=True):
        numbers = batch.rollout_N[~finite_N].unique().tolist() if not batch.is_filler else []
        own += [(prompt.request, prompt.domain, prompt.row) for prompt in (batch.rollouts[number].prompt for number in numbers)]
    found = sorted({place for places in gather_objects(own, Group.data) for place in places})
    step = engine.policy_step
    if found:
        places = ", ".join(f"request {request} of domain {domain} (row {row})" for request, domain, row in found[:MOST_NAMED])
        more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        problem = f"the loss of step {step} is not finite on {places}{more}"
    else:
        problem = f"the gradient of step {step} is not finite, though every loss is"
    if engine.skipped_in_a_row > most:
        before = f", after {engine.skipped_in_a_row - 1} before it that were skipped" if most else ""
        ways = "look at these rollouts, let optim.max_skipped_steps pass more such steps, or branch_from a checkpoint before with a lower optim.lr"
        raise ValueError(f"{problem}{before}: {ways}")
    if is_main():
        LOG.warning("%s: its update is skipped (%d of at most %d in a row)", problem, engine.skipped_in_a_row, most)
