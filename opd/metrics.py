"""Figures of a step, per domain and over all ranks; the names written to metrics.jsonl and W&B.

`metrics.jsonl` (schema version 1): one JSON object per line, {"schema": 1, "step": number of updates done, NAME: number, ...}.
Step 0 holds what was measured before training. Names:

    domain/D/kl_per_token, kl_per_sequence    nats; sums over tokens (sequences) of the step, divided by their number; the divergence that the
                      run's loss settings name, from a sampled token an estimate; evaluation/D/kl_* is always the exact reverse KL
    domain/D/loss_per_token                   the same place in supervised training: negative log-likelihood; in GRPO its surrogate, near 0 whatever is learnt
    domain/D/student_entropy, teacher_entropy nats per token; the teacher's where it gives its whole distribution
    domain/D/student_tail, teacher_tail       probability outside the teacher's top-k (teachers.signal=top_k), mean per token
    domain/D/capped                           share of tokens on which loss.cap acts, where there is one; in GRPO the clip of the ratio
    domain/D/reference_kl                     KL(student || the model that GRPO began with) per token, nats, with grpo.kl
    domain/D/reward, zero_variance            of GRPO: mean score of the rollouts less what their length costs; share of the groups whose rewards are equal,
                      from which nothing is learnt
    domain/D/length_penalty                   mean of what length costs, where it does (grpo.length_penalty)
    grpo/reward, zero_variance                the same over all domains
    domain/D/overlap                          share of the student's 16 likeliest tokens that are among the teacher's 16 likeliest, mean over every
                      sixteenth token of the loss (opd/likeliest.py); where the teacher gives its whole distribution, or a top-k of 16 or more
    domain/D/log_ratio_right, log_ratio_wrong mean |log p_student - log p_teacher| of the sampled token, nats at temperature 1, over the same tokens
                      of the rollouts that were graded 1, and of those graded less; not with a top-k
    domain/D/mismatch_kl, mismatch_p99, mismatch_max           KL(sampler || trainer) of the same student, nats: mean over the tokens of r - 1 - log r
                      with r = p_trainer / p_sampler of the sampled token, which is unbiased and never negative; the 99th percentile of |log r| (of n tokens
                      number floor(n / 100) + 1 from the largest), and the largest. Not with
                      temperature 0, top_p, top_k or min_p (SamplingConfig.comparable_temperature). With staleness 0 the weights are the same and
                      this is numerics alone; with 1 it contains one update, and with rollout.replay all that lies between the two students
    domain/D/masked                           share of the step's rollouts left out of the loss (rollout.max_mismatch, where it is given)
    domain/D/completion_length, truncated     tokens per completion; share that hit the limit
    domain/D/looped                           share of completions with a loop (rollout/repetition.py)
    domain/D/loop_masked_tokens               share of completion tokens after the recognition of a loop, left out of the loss (rollout.mask_loops)
    domain/D/length_ratio                     completion_length over the teacher's: warmup/D/teacher_length, or check/D/teacher_length, where there is one
    domain/D/accuracy                         mean score of the step's rollouts, where the domain has a grader
    domain/D/prompt_share, token_share, loss_share          realised in this step
    domain/D/prompt_share_asked, loss_weight_asked, loss_weight    asked for; and w_d after division by those present
    step/loss, step/completion_tokens, step/rollouts
    step/differs      1 from the first step on whose rollouts differ from the compared run's (rollout.compare)
    data/D/rows, data/D/dropped               rows in use, and left out (record of step 0, as all of data/)
    data/D/dropped_too_long, dropped_held_out those left out for their length, and for their overlap with held-out prompts
    data/D/duplicates_within, duplicates_across    rows equal to an earlier one of the domain, and to one of another domain
    check/D/kl_per_token, overlap, student_entropy, teacher_entropy, teacher_logprob, truncated, accuracy, answer_logprob, answer_logprob_student,
                      answer_gain (with _low, _high), self_kl, shift_change, gradient_norm      of the initial student, before a warm-up
                      (record of step 0): opd/signal_figures.py says what each is
    check/D/reference_length, teacher_length  tokens of the data's reference answers, and of answers that the teacher gave (the same record and file)
    warmup/D/truncated, accuracy, teacher_length, first_loss, last_loss       of the teacher's answers; loss per token at the first and last update (the same)
    warmup/steps, tokens, seconds             of the warm-up: updates, completion tokens trained on, with the sampling of the answers (the same)
    alarms/active                             episodes of alarms that are not over (opd/alarms.py), over all alarms and domains
    optim/lr, grad_norm, clipped, update_to_weight (muon: muon_lr in place of grad_norm and clipped)
    optim/skipped_steps                       of the run so far, with optim.max_skipped_steps; what is not finite in such a step is not there
    router/agreement                          share of the recorded choices (token of the loss, layer, expert) that the trainer's router makes too, where
                      routes are recorded (rollout.record_routes); hash-routed layers count and always agree
    router/layer_LL/load_entropy, load_entropy_change, dead_experts, routed_as_at_start
    quant/D/kl_per_token                      KL(student with unquantised experts || student), on some rollouts of the step
    quant/indexer_recall                      share of the entries that the unquantised indexer would keep among those the FP4 one keeps (queries with a choice)
    quant/flipped, quant/scale_spread         share of FP4 values that the update changed; largest spread of scale exponents in a 128 x 128 block
    seconds/PHASE     of the rank that took longest: rollout, score (grading too), update (data and update of supervised training)
    seconds/weight_sync                       of the rollout's: the sampler taking over the trainer's weights
    seconds/step (evaluation included), throughput/completion_tokens_per_second
    throughput/rollout_tokens_per_second_per_device, score_tokens_per_second_per_device, update_tokens_per_second_per_device       opd/throughput.py
    throughput/rollout_mfu, score_mfu, update_mfu, mfu        share of the devices' measured matrix rate that the FLOPs of a phase are, and of all three
    throughput/matmul_tflops_per_device       the rate that was measured
    work/rollout_tokens, rollout_flops, score_tokens, score_flops, update_tokens, update_flops   what these were computed from, over all ranks
    batch/padding, score_padding              share of the update's (the teachers') positions that were padding, or micro-batches without weight
    balance/PHASE     slowest rank's seconds over the mean; near 1 in a phase whose ranks wait for each other
    balance/update_positions                  busiest rank's padded positions over the mean, which the update's clock hides
    rollout/occupancy, prompt_feed, log_share tokens drawn, and tokens of prompts or of the log fed, per row and decode step; log's share of decode seconds.
                      They and work/rollout_tokens leave out what was drawn before an interruption
    rollout/processes_replaced                sampler processes that died or hung (rollout.sampler=service)
    memory/peak_rss_gb, peak_gpu_gb           of the rank that needed most: since its start, and on a GPU since the record before (GB: 1e9 bytes)
    teacher/T/seconds, loads, bytes_loaded, load_seconds, load_hidden, rounding_kl          teachers/figures.py; T: its domains joined by +
    teacher/T/kl_per_token, entropy, token_share          as of domains, over all domains of the teacher; of the tokens of the loss
    teacher/T/gradient_share                  of the norms of the teachers' gradients: opd/gradient_share.py
    conflict/T/U/gradient_cosine              of two teachers' gradients by all trained parameters; below 0 they pull against each other (the same file)
    system/teacher_loads                      readings of teachers and heads from disk in this step, over all ranks; like seconds, not the same after a resume
    evaluation/D/truncated, accuracy, accuracy_low, accuracy_high, greedy, kl_per_token, kl_per_sequence (with _low, _high)
    evaluation/D/perturbed, perturbed_low, perturbed_high       accuracy where an environment replaces tokens (domains.D.perturbation)

Means are always sums over the whole step divided by counts over the whole step, never means of means.

N: completion tokens of a micro-batch, flattened. R: those of them that are compared. B: its rollouts. S: figures summed.
"""

from collections.abc import Mapping

import torch
from transformers import PreTrainedTokenizerBase

from opd.batch import MicroBatch
from opd.config import DistillConfig, SpecializeConfig
from opd.distributed import Group, gather_objects, reduce_max, reduce_sum
from opd.throughput import rollout_work
from opd.tiles import TokenLosses
from rollout.grading import grade_rollout
from rollout.prompts import PromptMixture
from rollout.repetition import loop_end
from rollout.replay import rollout_key
from rollout.stream import RolloutStream
from rollout.types import Rollout
from teachers.config import DomainConfig

SCHEMA = 1


class DomainTotals:
    """Sums per domain on this rank, by name; `reduced` adds up the ranks."""

    def __init__(self, domains: list[str]):
        self.totals: dict[str, dict[str, float]] = {domain: {} for domain in domains}
        self.maxima: dict[str, float] = {}
        self.values: dict[str, list[torch.Tensor]] = {domain: [] for domain in domains}

    def add(self, domain: str, **values: float) -> None:
        sums = self.totals[domain]
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + float(value)

    def add_maximum(self, domain: str, value: float) -> None:
        """Keep the largest of a domain's values; they are not negative."""
        self.maxima[domain] = max(self.maxima.get(domain, 0.0), value)

    def reduced_maxima(self) -> dict[str, float]:
        """The largest value of each domain over all ranks, 0 where there was none; every rank has to call it."""
        own = torch.tensor([self.maxima.get(domain, 0.0) for domain in self.totals], dtype=torch.float64)
        return dict(zip(self.totals, reduce_max(own, Group.data).tolist(), strict=True))

    def add_values(self, domain: str, value_N: torch.Tensor) -> None:
        """Keep some of a domain's values, of which a percentile is wanted."""
        self.values[domain].append(value_N.double().cpu())

    def reduced_percentile(self) -> dict[str, float]:
        """The exact 99th percentile of each domain's values over all ranks, 0 where there was none; every rank has to call it.

        Of n values it is number floor(n / 100) + 1 from the largest, so ranks tell each other no more of theirs than that.
        """
        own = {domain: torch.cat(values) if values else torch.zeros(0, dtype=torch.float64) for domain, values in self.values.items()}
        counts = reduce_sum(torch.tensor([len(value_N) for value_N in own.values()], dtype=torch.float64), Group.data).tolist()
        places = {domain: int(count) // 100 + 1 for domain, count in zip(own, counts, strict=True)}
        largest = {domain: value_N.topk(min(places[domain], len(value_N))).values for domain, value_N in own.items()}
        parts = gather_objects(largest, Group.data)
        everything = {domain: torch.cat([part[domain] for part in parts]) for domain in own}
        return {domain: float(value_N.topk(places[domain]).values[-1]) if len(value_N) else 0.0 for domain, value_N in everything.items()}

    def names(self) -> set[str]:
        """What any rank has added for any domain, since a rank may have had fillers alone; every rank has to call it."""
        return set().union(*gather_objects({name for sums in self.totals.values() for name in sums}, Group.data))

    def reduced(self, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
        """Sums over all ranks of the given names; every rank passes the same names."""
        own = [[sums.get(name, 0.0) for name in names] for sums in self.totals.values()]
        everything = reduce_sum(torch.tensor(own, dtype=torch.float64), Group.data).tolist()
        return {domain: dict(zip(names, row, strict=True)) for domain, row in zip(self.totals, everything, strict=True)}


ROLLOUT_SUMS = ("rollouts", "completion_tokens", "truncated", "looped", "after_loop", "graded", "score")
OPTIONAL_SUMS = ("student_entropy", "teacher_entropy", "student_tail", "teacher_tail", "capped", "reference_kl")
LOSS_SUMS = ("tokens", "sequences", "loss", "weighted_loss", "mismatch_kl", *OPTIONAL_SUMS)
COMPARED_SUMS = ("overlap_tokens", "overlap", "right_tokens", "right_ratio", "wrong_tokens", "wrong_ratio")


Scores = Mapping[tuple[int, int], float]
"""What graders gave rollouts, by `rollout.replay.rollout_key`."""


def grades(rollouts: list[Rollout], domains: dict[str, DomainConfig], tokenizer: PreTrainedTokenizerBase) -> Scores:
    """The scores of this rank's rollouts whose domain has a grader."""
    graders = {name: domain.grader for name, domain in domains.items() if domain.grader is not None}
    graded = [rollout for rollout in rollouts if rollout.prompt.domain in graders]
    return {rollout_key(rollout): grade_rollout(graders[rollout.prompt.domain], rollout, tokenizer) for rollout in graded}


def rollout_totals(
    rollouts: list[Rollout], domains: dict[str, DomainConfig], tokenizer: PreTrainedTokenizerBase, scores: Scores | None = None
) -> dict[str, dict[str, float]]:
    """Counts, lengths and grades of a step's rollouts, per domain over all ranks; `scores` where they are graded already."""
    totals = DomainTotals(list(domains))
    scores = grades(rollouts, domains, tokenizer) if scores is None else scores
    for rollout in rollouts:
        domain, grader = rollout.prompt.domain, domains[rollout.prompt.domain].grader
        length, end = len(rollout.completion_T), loop_end(rollout.completion_T)
        totals.add(domain, rollouts=1, completion_tokens=length, truncated=not rollout.finished)
        totals.add(domain, looped=end is not None, after_loop=0 if end is None else length - end)
        if grader is not None:
            totals.add(domain, graded=1, score=scores[rollout_key(rollout)])
    return totals.reduced(ROLLOUT_SUMS)


def add_losses(totals: DomainTotals, batch: MicroBatch, losses: TokenLosses) -> None:
    """Add one micro-batch's per-token losses to its domains' sums. Fillers count for nothing.

    A figure that a loss does not have is not added, and `loss_metrics` leaves it out.
    """
    if batch.is_filler:
        return
    mask_N = batch.mask_N.double()
    columns = {"tokens": mask_N, "loss": losses.loss_N * mask_N, "weighted_loss": losses.loss_N * batch.weight_N}
    for name in OPTIONAL_SUMS:
        figure_N = getattr(losses, f"{name}_N")
        if figure_N is not None:
            columns[name] = figure_N * mask_N
    if losses.target_logprob_N is not None:
        log_ratio_N = (losses.target_logprob_N - batch.sampled_logprob_N).double() * mask_N
        columns["mismatch_kl"] = mismatch(log_ratio_N)
        _add_ratios(totals, batch, log_ratio_N.abs())
    per_token_NS = torch.stack([column.double() for column in columns.values()], dim=1)
    per_rollout = torch.zeros(len(batch.rollouts), len(columns), dtype=torch.float64, device=mask_N.device).index_add_(0, batch.rollout_N, per_token_NS)
    for rollout, sums in zip(batch.rollouts, per_rollout.tolist(), strict=True):
        totals.add(rollout.prompt.domain, sequences=rollout.num_loss_tokens > 0, **dict(zip(columns, sums, strict=True)))


def mismatch(log_ratio_N: torch.Tensor) -> torch.Tensor:
    """r - 1 - log r of log r = log p_trainer - log p_sampler: its mean over the sampler's tokens is KL(sampler || trainer), and it is never negative."""
    return torch.expm1(log_ratio_N) - log_ratio_N


def add_compared(totals: DomainTotals, batch: MicroBatch, losses: TokenLosses, scores: Scores) -> None:
    """Add what was found at every sixteenth token (opd/likeliest.py), where it was asked for; scores: of the rollouts that have a grade."""
    found = losses.compared
    if batch.is_filler or found is None:
        return
    ones_R = torch.ones(len(found.row_R), dtype=torch.float64, device=found.row_R.device)
    columns = [ones_R, ones_R if found.overlap_R is None else found.overlap_R, ones_R if found.log_ratio_R is None else found.log_ratio_R.abs()]
    per_rollout = torch.zeros(len(batch.rollouts), 3, dtype=torch.float64, device=ones_R.device)
    per_rollout.index_add_(0, batch.rollout_N[found.row_R], torch.stack(columns, dim=1))
    for rollout, (tokens, overlap, ratio) in zip(batch.rollouts, per_rollout.tolist(), strict=True):
        domain, score = rollout.prompt.domain, scores.get(rollout_key(rollout))
        if found.overlap_R is not None:
            totals.add(domain, overlap_tokens=tokens, overlap=overlap)
        if found.log_ratio_R is not None and score is not None:
            kind = "right" if score >= 1 else "wrong"
            totals.add(domain, **{f"{kind}_tokens": tokens, f"{kind}_ratio": ratio})


def _add_ratios(totals: DomainTotals, batch: MicroBatch, value_N: torch.Tensor) -> None:
    """Add what the largest and the 99th percentile of a step are taken from. value_N: 0 outside the loss."""
    domains = [rollout.prompt.domain for rollout in batch.rollouts]
    for domain in sorted(set(domains)):
        is_own_B = torch.tensor([own == domain for own in domains], device=value_N.device)
        totals.add_values(domain, value_N[is_own_B[batch.rollout_N] & batch.mask_N])
    largest = torch.zeros(len(batch.rollouts), dtype=value_N.dtype, device=value_N.device).scatter_reduce_(0, batch.rollout_N, value_N, "amax")
    for rollout, value in zip(batch.rollouts, largest.tolist(), strict=True):
        totals.add_maximum(rollout.prompt.domain, value)


def data_metrics(prompts: PromptMixture) -> dict[str, float]:
    """Rows that each domain has, rows left out by reason, and rows that repeat others."""
    result = {}
    for name, domain in prompts.domains.items():
        result |= {f"data/{name}/rows": float(domain.num_rows), f"data/{name}/dropped": float(domain.num_dropped)}
        result |= {f"data/{name}/dropped_{reason}": float(count) for reason, count in domain.dropped.items()}
        result[f"data/{name}/duplicates_within"] = float(domain.overlap.duplicates_within)
        result[f"data/{name}/duplicates_across"] = float(domain.overlap.duplicates_across)
    return result


def rollout_metrics(
    rollouts: list[Rollout], stream: RolloutStream, cfg: DistillConfig | SpecializeConfig, tokenizer: PreTrainedTokenizerBase, scores: Scores | None = None
) -> dict[str, float]:
    """Metrics of a step's rollouts over all ranks; a domain without rollouts in the step has shares 0 and no means. scores: where they are graded already."""
    totals = rollout_totals(rollouts, cfg.domains, tokenizer, scores)
    prompts = sum(sums["rollouts"] for sums in totals.values())
    tokens = sum(sums["completion_tokens"] for sums in totals.values())
    result = {"step/rollouts": prompts, "step/completion_tokens": tokens}
    result |= {f"domain/{domain}/prompt_share_asked": share for domain, share in stream.asked_shares.items()}
    if cfg.rollout.compare is not None:
        result["step/differs"] = float(stream.difference is not None)
    for domain, sums in totals.items():
        result[f"domain/{domain}/prompt_share"] = sums["rollouts"] / prompts
        result[f"domain/{domain}/token_share"] = sums["completion_tokens"] / tokens
        if sums["rollouts"]:
            result[f"domain/{domain}/completion_length"] = sums["completion_tokens"] / sums["rollouts"]
            result[f"domain/{domain}/truncated"] = sums["truncated"] / sums["rollouts"]
            result[f"domain/{domain}/looped"] = sums["looped"] / sums["rollouts"]
            if cfg.rollout.mask_loops:
                result[f"domain/{domain}/loop_masked_tokens"] = sums["after_loop"] / sums["completion_tokens"]
        if sums["graded"]:
            result[f"domain/{domain}/accuracy"] = sums["score"] / sums["graded"]
    return result | rollout_work(rollouts, stream)


def loss_metrics(totals: DomainTotals, is_distillation: bool) -> dict[str, float]:
    """Metrics of the losses added with `add_losses`, over all ranks."""
    sums_of, maxima, percentiles = totals.reduced(LOSS_SUMS), totals.reduced_maxima(), totals.reduced_percentile()
    names = totals.names()
    loss = sum(sums["weighted_loss"] for sums in sums_of.values())
    result = {"step/loss": loss}
    for domain, sums in sums_of.items():
        if not sums["tokens"]:
            continue
        result[f"domain/{domain}/loss_share"] = sums["weighted_loss"] / loss if loss else 0.0  # of estimates, a share may lie outside 0 to 1
        for name in OPTIONAL_SUMS:
            if name in names:
                result[f"domain/{domain}/{name}"] = sums[name] / sums["tokens"]
        if "mismatch_kl" in names:
            result[f"domain/{domain}/mismatch_kl"] = sums["mismatch_kl"] / sums["tokens"]
            result[f"domain/{domain}/mismatch_p99"] = percentiles[domain]
            result[f"domain/{domain}/mismatch_max"] = maxima[domain]
        if is_distillation:
            result[f"domain/{domain}/kl_per_token"] = sums["loss"] / sums["tokens"]
            result[f"domain/{domain}/kl_per_sequence"] = sums["loss"] / sums["sequences"]
        else:
            result[f"domain/{domain}/loss_per_token"] = sums["loss"] / sums["tokens"]
    return result | _compared_metrics(totals)


def _compared_metrics(totals: DomainTotals) -> dict[str, float]:
    result = {}
    for domain, sums in totals.reduced(COMPARED_SUMS).items():
        if sums["overlap_tokens"]:
            result[f"domain/{domain}/overlap"] = sums["overlap"] / sums["overlap_tokens"]
        for kind in ("right", "wrong"):
            if sums[f"{kind}_tokens"]:
                result[f"domain/{domain}/log_ratio_{kind}"] = sums[f"{kind}_ratio"] / sums[f"{kind}_tokens"]
    return result


def teacher_loss_metrics(totals: DomainTotals, domains_of: dict[str, list[str]]) -> dict[str, float]:
    """The same losses by teacher: divergence and entropy over all its domains' tokens, and its share of the step's tokens. domains_of: by what it is called."""
    sums_of, names, result = totals.reduced(LOSS_SUMS), totals.names(), {}
    everything = sum(sums["tokens"] for sums in sums_of.values())
    for teacher, domains in domains_of.items():
        own = [sums_of[domain] for domain in domains if domain in sums_of]
        tokens = sum(sums["tokens"] for sums in own)
        if not tokens:
            continue
        result[f"teacher/{teacher}/token_share"] = tokens / everything
        result[f"teacher/{teacher}/kl_per_token"] = sum(sums["loss"] for sums in own) / tokens
        if "teacher_entropy" in names:
            result[f"teacher/{teacher}/entropy"] = sum(sums["teacher_entropy"] for sums in own) / tokens
    return result
