"""One optimizer step from scored rollouts (or supervised examples).

    loss = sum_d w_d (1 / N_d) sum_{t in d} loss_t

N_d counts the tokens of domain d in the whole step over all ranks, and the weights of the domains present are divided by
their sum, so that neither micro-batching nor grouping by teacher nor the number of ranks changes the loss. Token-share weights are a
different normalisation (a domain's length would enter its weight) and are never mixed with this one.

N: completion tokens of a micro-batch.
"""

import torch

from opd.batch import MicroBatch, distillation_batches, supervised_batches, with_hidden
from opd.config import DistillConfig, RunConfig
from opd.distributed import Group, num_ranks, reduce_sum
from opd.engine import Engine
from opd.gradient_share import gradient_shares
from opd.metrics import DomainTotals, add_losses, loss_metrics, teacher_loss_metrics
from opd.mismatch import mask_mismatched
from opd.quant_config import ExpertFormat
from opd.route_replay import require_routes
from opd.throughput import score_work, update_work
from rollout.config import schedule_value
from rollout.replay import rollout_key
from rollout.types import Rollout
from teachers.config import SignalKind
from teachers.pool import TeacherPool
from teachers.types import ScoredRollout


def update(engine: Engine, teachers: TeacherPool, scored: list[ScoredRollout], cfg: DistillConfig) -> dict[str, float]:
    """Distil one step's scored rollouts (this rank's) into the student; returns the step's metrics."""
    require_routes([item.rollout for item in scored], cfg.student.replay_routes, len(engine.recorder.routers))
    scored, masked = mask_mismatched(engine, teachers.recovered(scored), cfg)
    weights, metrics = domain_weights([item.rollout for item in scored], cfg, engine.policy_step)
    batches = distillation_batches(scored, weights, cfg.batch)
    metrics |= _train(engine, batches, cfg, teachers)
    return metrics | masked | score_work(scored, teachers) | teachers.metrics()


def supervised_update(engine: Engine, examples: list[Rollout], cfg: RunConfig) -> dict[str, float]:
    """Train on the examples' completions (this rank's); returns the step's metrics."""
    weights, metrics = domain_weights(examples, cfg, engine.policy_step)
    batches = supervised_batches(examples, weights, cfg.batch)
    return metrics | _train(engine, batches, cfg, None)


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


def _train(engine: Engine, batches: list[MicroBatch], cfg: RunConfig, teachers: TeacherPool | None) -> dict[str, float]:
    totals = DomainTotals(list(cfg.domains))
    metrics = {}
    if engine.recorder.routers and cfg.student.router_probe_every and engine.policy_step % cfg.student.router_probe_every == 0:
        metrics = engine.probe_routing(batches[0])
    if engine.is_quantization_due():
        rollouts = [rollout for batch in batches if not batch.is_filler for rollout in batch.rollouts]
        metrics |= measure_quantization(engine, rollouts or [*batches[0].rollouts], cfg)  # a rank whose teachers are dropped takes part with nothing
    every = cfg.teachers.gradient_share_every if teachers is not None and engine.zero_stage < 3 else 0
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
        batch = batch.to(engine.device)
        scale = 0.0 if batch.is_filler else balance_scale
        loss, losses = engine.loss(batch, head, number == len(batches) - 1, scale)
        engine.backward(loss)
        finite.append(losses.loss_N.isfinite())
        add_losses(totals, batch, losses)
    _require_finite(batches, finite)
    metrics |= engine.step()
    engine.recorder.sum_ranks()
    if cfg.student.router_bias_speed:
        engine.recorder.update_bias(cfg.student.router_bias_speed)
    metrics |= engine.recorder.metrics() | loss_metrics(totals, is_distillation=teachers is not None)
    metrics |= update_work(batches, engine.model, cfg, teachers)
    if teachers is not None:
        metrics |= teacher_loss_metrics(totals, {teachers.label(name): teachers.domains_of(name) for name in teachers.configs})
    return metrics


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


def _require_finite(batches: list[MicroBatch], finite: list[torch.Tensor]) -> None:
    """Raises ValueError with domain and request of the step's first loss that is not finite; one look at the losses a step."""
    if torch.stack([finite_N.all() for finite_N in finite]).all():
        return
    number = next(number for number, finite_N in enumerate(finite) if not finite_N.all())
    token = int((~finite[number]).nonzero()[0, 0])
    prompt = batches[number].rollouts[int(batches[number].rollout_N[token])].prompt
    raise ValueError(f"the loss is not finite on request {prompt.request} of domain {prompt.domain} (row {prompt.row})")
