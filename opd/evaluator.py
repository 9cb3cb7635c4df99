"""Evaluation on held-out prompts: accuracy at temperature 1 (greedy beside it), and the divergence from each domain's teacher; where a domain asks for it
also the accuracy under an environment that replaces tokens (rollout/perturbation.py), from completions of its own, which enter no other figure.

A figure is a sum over all held-out prompts divided by their number, with its 95 % interval; ranks answer a share of the prompts each. Random
numbers are keyed apart from training's, and are the same for every model that is evaluated. `opd evaluate` writes what opd/comparison.py defines.

B: rollouts of a micro-batch. N: its completion tokens, flattened. D: hidden size. V: vocabulary.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.batch import forward_batches
from opd.comparison import DomainResult, PerturbedResult
from opd.config import DistillConfig, EvaluateConfig, RunConfig, rollout_settings
from opd.distributed import Group, gather_objects, is_main, num_ranks, rank, reduce_sum
from opd.estimators import distillation_loss, signal_of, student_states
from opd.intervals import Interval, clustered_proportion, mean, proportion, ratio_of_sums
from opd.loss_config import Backend, LossConfig
from opd.rollouts import FirstRequest
from opd.scores import scores_by_domain, write_scores
from opd.tiles import Targets
from rollout.config import SamplingConfig
from rollout.grading import grade_rollout, grader_identity, require_gradable
from rollout.model import context_length, end_tokens, logit_transform
from rollout.perturbation import Perturbation, build_perturbation
from rollout.prompts import DomainPrompts, load_held_out
from rollout.sampler import LocalSampler, WeightSource
from rollout.types import Prompt, Rollout
from teachers.config import SignalKind
from teachers.pool import TeacherPool


class Evaluator:
    """Evaluates models on the held-out prompts of a run's domains."""

    def __init__(self, cfg: RunConfig | EvaluateConfig, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, teachers: TeacherPool | None):
        """Reads the held-out prompts, unless evaluation.every=0. `teachers` are needed for divergences only."""
        self.domains, self.cfg, self.tokenizer, self.teachers = cfg.domains, cfg.evaluation, tokenizer, teachers
        self.sampling, self.run_dir = sampling_of(cfg), Path(cfg.run_dir) if isinstance(cfg, RunConfig) else None
        self.seed, self.dtype = cfg.seed, cfg.student.dtype.value
        self.loss = LossConfig(backend=cfg.loss.backend if isinstance(cfg, DistillConfig) else Backend.auto)  # always exact reverse KL
        context = context_length(student.config, "student")
        longest = context - self.sampling.max_new_tokens
        is_wanted = isinstance(cfg, EvaluateConfig) or cfg.evaluation.every > 0
        if is_wanted and longest < 1 and any(domain.held_out.path for domain in cfg.domains.values()):
            given = f"completions of {self.sampling.max_new_tokens} tokens leave no room for a prompt in the student's context of {context}"
            raise ValueError(f"in the evaluation {given}: lower evaluation.max_new_tokens")
        prompts = {name: domain.prompts for name, domain in cfg.domains.items()}
        sources = {name: domain.held_out for name, domain in cfg.domains.items() if is_wanted}
        held_out = load_held_out(prompts, sources, tokenizer, longest)
        require_gradable(held_out, {name: domain.grader for name, domain in cfg.domains.items()})
        self.prompts = {name: _held_out(rows, cfg.evaluation.prompts) for name, rows in held_out.items()}
        self.dropped = {name: rows.num_dropped for name, rows in held_out.items()}
        self.perturbations = {name: self._perturbation(name, student, cfg.seed) for name in self.prompts if cfg.domains[name].perturbation.rate}
        if teachers is not None:
            longest_of = {name: rows.longest + self.sampling.max_new_tokens for name, rows in held_out.items() if name in teachers.teacher_of}
            teachers.require_context(longest_of)

    def evaluate(self, sampler: LocalSampler, source: WeightSource | None = None) -> dict[str, DomainResult]:
        """Results per domain with held-out prompts; takes the source's weights first where one is given. Every rank calls it."""
        if source is not None and self.prompts:
            sampler.refresh(source)
        results = {name: self.evaluate_domain(name, sampler) for name in self.prompts}
        if source is not None and self.run_dir is not None and is_main():
            write_scores(self.run_dir, source.policy_step, scores_by_domain(self.prompts, results, self.asked()))
        return results

    def asked(self) -> dict[str, dict[str, Any]]:
        """Per domain what decides the scores, beside the model and the prompts, as JSON values."""
        shared = {"samples_per_prompt": self.cfg.samples, "max_new_tokens": self.sampling.max_new_tokens, "decode_width": self.sampling.decode_width}
        shared |= {"dtype": self.dtype, "seed": self.seed}
        return {name: shared | {"grader": grader_identity(self.domains[name].grader)} for name in self.prompts}

    def evaluate_domain(self, name: str, sampler: LocalSampler, with_kl: bool = True) -> DomainResult:
        """The sampler's model on one domain, its divergence from the domain's teacher included if asked; every rank calls it."""
        own = self.prompts[name][rank(Group.data) :: num_ranks(Group.data)]
        samples, count = self.cfg.samples, len(self.prompts[name])
        sampled = sampler.sample(own, replace(self.sampling, temperature=1.0), samples)
        scores = right = accuracy = greedy = None
        if self.domains[name].grader is not None:
            of_prompts = self._scores_of_prompts(name, sampled)
            scores = tuple(sum(found) / samples for found in of_prompts)
            right = tuple(sum(score >= 1 for score in found) for found in of_prompts)
            accuracy = clustered_proportion(scores, samples)
            greedy = proportion(sum(self._scores(name, sampler.sample(own, replace(self.sampling, temperature=0.0)))), count)
        kl_per_token = kl_per_sequence = None
        has_teacher = self.teachers is not None and name in self.teachers.teacher_of
        if with_kl and self.cfg.kl and has_teacher and not self.teachers.is_remote(name):
            kl_per_token, kl_per_sequence = self._divergence(sampler.model, sampled[::samples])
        unfinished = torch.tensor(sum(not rollout.finished for rollout in sampled), dtype=torch.float64)
        return DomainResult(
            prompts=count,
            truncated=float(reduce_sum(unfinished, Group.data)) / (count * samples),
            samples=samples,
            scores=scores,
            right=right,
            accuracy=accuracy,
            greedy=greedy,
            perturbed=self._perturbed(name, sampler) if name in self.perturbations else None,
            kl_per_token=kl_per_token,
            kl_per_sequence=kl_per_sequence,
        )

    def _perturbation(self, name: str, student: PreTrainedModel, seed: int) -> Perturbation:
        ends = end_tokens(student, self.tokenizer)
        return build_perturbation(self.domains[name].perturbation, self.tokenizer, ends, seed, f"domains.{name}.perturbation")

    def _perturbed(self, name: str, sampler: LocalSampler) -> PerturbedResult:
        """Accuracy of samples of their own, at temperature 1; what they diverge is not asked, since they are not the model's alone."""
        own, count = self.prompts[name][rank(Group.data) :: num_ranks(Group.data)], len(self.prompts[name])
        sampled = sampler.sample_perturbed(own, replace(self.sampling, temperature=1.0), self.perturbations[name])
        totals = [sum(not rollout.finished for rollout in sampled), sum(int((~rollout.completion_mask_T).sum()) for rollout in sampled)]
        unfinished, replaced = reduce_sum(torch.tensor(totals, dtype=torch.float64), Group.data).tolist()
        scores = self._scores(name, sampled)
        rate = self.perturbations[name].rate
        return PerturbedResult(rate=rate, accuracy=proportion(sum(scores), count), truncated=unfinished / count, replaced=replaced / count)

    def _scores_of_prompts(self, name: str, rollouts: list[Rollout]) -> tuple[list[float], ...]:
        """For each prompt of the domain, in order, the scores of its completions; `rollouts` are this rank's, those of a prompt side by side."""
        grader, samples = self.domains[name].grader, self.cfg.samples
        scores = [grade_rollout(grader, rollout, self.tokenizer) for rollout in rollouts]
        return in_prompt_order(gather_objects([scores[first : first + samples] for first in range(0, len(scores), samples)], Group.data))

    def _scores(self, name: str, rollouts: list[Rollout]) -> tuple[float, ...]:
        """Scores of all ranks' rollouts, in the order of the domain's prompts; `rollouts` are this rank's."""
        grader = self.domains[name].grader
        return in_prompt_order(gather_objects([grade_rollout(grader, rollout, self.tokenizer) for rollout in rollouts], Group.data))

    @torch.no_grad()
    def _divergence(self, model: PreTrainedModel, rollouts: list[Rollout]) -> tuple[Interval | None, Interval | None]:
        """KL(student || teacher) per token and per sequence; the per-token interval treats sequences as the independent units. None of a dropped domain."""
        sums = torch.zeros(6, dtype=torch.float64)
        scored = [item for item in self.teachers.score(rollouts, SignalKind.hidden_states) if item.signal.kind is not None]
        for batch in forward_batches(scored, self.teachers, model.device):
            student = student_states(model, batch, logit_transform(model.config, "student"))
            signal = signal_of(batch, self.teachers.head(batch.teacher))
            _, losses = distillation_loss(student, signal, Targets(batch.target_N), batch.weight_N, self.loss, len(self.tokenizer))
            kl_B = torch.zeros(len(batch.rollouts), dtype=torch.float64).index_add_(0, batch.rollout_N.cpu(), (losses.loss_N * batch.mask_N).double().cpu())
            tokens_B = torch.tensor([rollout.num_loss_tokens for rollout in batch.rollouts], dtype=torch.float64)
            ones_B = torch.ones_like(kl_B)
            sums += torch.stack([ones_B, tokens_B, kl_B, tokens_B**2, kl_B**2, kl_B * tokens_B], dim=1).sum(0)
        count, tokens, kl, tokens_squared, kl_squared, product = reduce_sum(sums, Group.data).tolist()
        if not count:
            return None, None
        return ratio_of_sums(count, tokens, kl, tokens_squared, kl_squared, product), mean(kl, kl_squared, int(count))


def evaluation_metrics(results: dict[str, DomainResult]) -> dict[str, float]:
    """Results under the names of opd/metrics.py."""
    metrics = {}
    for name, result in results.items():
        metrics[f"evaluation/{name}/truncated"] = result.truncated
        for figure in ("accuracy", "kl_per_token", "kl_per_sequence"):
            interval = {"accuracy": result.accuracy, "kl_per_token": result.kl_per_token, "kl_per_sequence": result.kl_per_sequence}[figure]
            if interval is not None:
                metrics[f"evaluation/{name}/{figure}"] = interval.value
                metrics[f"evaluation/{name}/{figure}_low"] = interval.low
                metrics[f"evaluation/{name}/{figure}_high"] = interval.high
        if result.greedy is not None:
            metrics[f"evaluation/{name}/greedy"] = result.greedy.value
        if result.perturbed is not None:
            metrics[f"evaluation/{name}/perturbed"] = result.perturbed.accuracy.value
            metrics[f"evaluation/{name}/perturbed_low"] = result.perturbed.accuracy.low
            metrics[f"evaluation/{name}/perturbed_high"] = result.perturbed.accuracy.high
    return metrics


def in_prompt_order(shares: list[list[Any]]) -> tuple[Any, ...]:
    """The ranks' shares of a domain put together: rank r of n has prompts r, r + n, r + 2 n, ..."""
    return tuple(shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares))))


def _held_out(prompts: DomainPrompts, limit: int | None) -> list[Prompt]:
    return [prompts.prompt(source, row, FirstRequest.evaluation + number) for number, (source, row) in enumerate(prompts.all_rows()[:limit])]


def sampling_of(cfg: RunConfig | EvaluateConfig) -> SamplingConfig:
    """How completions are drawn: as in the run's rollouts, unless the evaluation says otherwise."""
    default = rollout_settings(cfg) or SamplingConfig(max_new_tokens=256)
    own = cfg.evaluation
    return SamplingConfig(max_new_tokens=own.max_new_tokens or default.max_new_tokens, decode_width=own.decode_width or default.decode_width)
