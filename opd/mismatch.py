"""Sequence masking: rollouts that the student as it trains would not have sampled are left out of the loss.

What the loss averages over the next token is exact under the present student, so no ratio p_trainer / p_sampler belongs on a token. Only the states that
were visited are the sampler's, and their ratio is a product over the whole prefix, which explodes. Hence whole sequences: one whose mean mismatch
per token (opd/metrics.py) exceeds rollout.max_mismatch is masked, as DeepSeek-V3.2 masks sequences by their mean log-ratio (arXiv:2512.02556).

The mismatch has to be known before the loss, whose weights divide by the tokens that are left: one forward more without a gradient, made only where the
setting is given. A masked rollout stays in its micro-batch with weight 0, so that every rank makes the forwards it would have made.

N: completion tokens of a micro-batch, flattened.
"""

import math
from dataclasses import replace

import torch

from opd.batch import supervised_batches
from opd.config import BatchConfig, DistillConfig
from opd.distributed import Group, reduce_max
from opd.engine import Engine
from opd.metrics import DomainTotals, mismatch
from rollout.replay import rollout_key
from rollout.types import Rollout
from teachers.types import ScoredRollout


def mask_mismatched(engine: Engine, scored: list[ScoredRollout], cfg: DistillConfig) -> tuple[list[ScoredRollout], dict[str, float]]:
    """(this rank's rollouts, no token of those above rollout.max_mismatch in the loss; share of each domain's rollouts that was masked).

    Every rank calls it. Raises ValueError where every rollout of the step is masked.
    """
    limit = cfg.rollout.max_mismatch
    if limit is None:
        return scored, {}
    found = sequence_mismatch(engine, [item.rollout for item in scored], cfg.batch)
    totals, result = DomainTotals(list(cfg.domains)), []
    for item, value in zip(scored, found, strict=True):
        if value is not None:
            totals.add(item.rollout.prompt.domain, rollouts=1, masked=value > limit)
        result.append(_masked(item) if value is not None and value > limit else item)
    sums_of = totals.reduced(("rollouts", "masked"))
    smallest = -float(reduce_max(torch.tensor(max([-value for value in found if value is not None], default=-math.inf), dtype=torch.float64), Group.data))
    if smallest > limit and math.isfinite(smallest):
        raise ValueError(
            f"every rollout of step {engine.policy_step} is masked, the least mismatch being {smallest:.3g}: raise rollout.max_mismatch={limit:g}, "
            "or sample with the weights that train"
        )
    return result, {f"domain/{domain}/masked": sums["masked"] / sums["rollouts"] for domain, sums in sums_of.items() if sums["rollouts"]}


def sequence_mismatch(engine: Engine, rollouts: list[Rollout], cfg: BatchConfig) -> list[float | None]:
    """Mean mismatch per token of the loss of each of this rank's rollouts, None of those that have no such token; every rank calls it."""
    found: dict[tuple[int, int], float | None] = {}
    for batch in supervised_batches(rollouts, {rollout.prompt.domain: 1.0 for rollout in rollouts}, cfg):
        batch = batch.to(engine.device)
        value_N = mismatch((engine.target_logprob(batch) - batch.sampled_logprob_N).double())
        for number, rollout in enumerate(batch.rollouts):
            own_N = value_N[(batch.rollout_N == number) & batch.mask_N]
            found[rollout_key(rollout)] = float(own_N.mean()) if len(own_N) else None
    return [found[rollout_key(rollout)] for rollout in rollouts]


def _masked(item: ScoredRollout) -> ScoredRollout:
    return replace(item, rollout=replace(item.rollout, completion_mask_T=torch.zeros_like(item.rollout.completion_mask_T)))
