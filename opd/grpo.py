"""GRPO: a stage of `opd specialize` that trains the student on the grades of its own answers (arXiv:2402.03300).

Every prompt is answered `rollout.completions_per_prompt` times, and the domain's grader scores each answer. Within such a group

    r_i = score_i - per_token max(0, length_i - budget)             grpo.length_penalty
    A_i = r_i - mean(r), divided by the group's standard deviation where grpo.divide_by_std asks for it
    loss_t = -min(ratio_t A_i, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_i) + kl KL(student || reference)_t

A group whose rewards are all equal has A = 0 exactly: it teaches nothing but the KL, counts among the tokens that the loss divides by, and is counted in the
metrics (zero_variance). The loss is the mean over the domain's tokens in the step, with the weights of all training here (opd/update.py), rather than a mean
over the tokens of each completion first, which would let a long wrong answer cost less per token than a short one; nor is a standard deviation divided
by unless asked for, which would favour prompts that are nearly always or never solved (both arXiv:2503.20783).

One update follows each sampling, so that ratio_t = p_trainer / p_sampler would be 1 but for the numerics of the two (domain/D/mismatch_kl), and an update
between them with rollout.staleness=1. The log-probabilities are therefore the sampler's own: computed again by the trainer they would
make a ratio of 1 by construction and hide exactly what the ratio corrects and the clip bounds. Mixture-of-experts students whose sampler and trainer
may choose different experts replay the sampler's (student.replay_routes); routers are frozen unless student.router=train.

The KL is the exact one over the whole vocabulary, from the reference's hidden states, scored as a teacher's are: its gradient at every state that was visited
is that of KL(student || reference), without variance from the token that was sampled. That the states themselves are the student's choice is left out, as in
distillation. The usual estimate k3 = q / p - 1 - log(q / p), differentiated as a loss, follows the gradient of KL(reference || student) instead, and k1
none at all (arXiv:2510.01555). The reference is the model that GRPO begins with, kept in RUN/reference.

GRPO begins with a new optimizer state and learning-rate schedule: moments of the fine-tuning would move the student for its first dozens of steps.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.batch import MicroBatch, distillation_batches, supervised_batches
from opd.config import SpecializeConfig
from opd.distributed import barrier, is_main, on_main
from opd.engine import Engine
from opd.grpo_config import GrpoConfig
from opd.metrics import DomainTotals, rollout_metrics
from opd.rollouts import build_stream, data_ranks
from opd.route_replay import require_routes
from opd.throughput import score_work
from opd.tracker import Tracker
from opd.update import domain_weights, train
from rollout.files import read_json
from rollout.grading import grade_rollout
from rollout.model import save_model
from rollout.replay import rollout_key
from rollout.types import Rollout
from teachers.config import TeacherConfig, TeachersConfig
from teachers.pool import TeacherPool

LEAST_STD = 1e-4
"""Added to a group's standard deviation before it divides."""

Key = tuple[int, int]
"""Request and sample of a rollout."""


@dataclass(frozen=True, slots=True)
class Graded:
    """A step's rollouts (this rank's) with what became of each, by `rollout_key`; the completions of a prompt are all on one rank.

    scores: of the graders. rewards: less what the length costs. advantages: over the others of the prompt.
    """

    rollouts: list[Rollout]
    scores: dict[Key, float]
    rewards: dict[Key, float]
    advantages: dict[Key, float]


class Grpo:
    """The stage; resumable like a rollout stream."""

    def __init__(self, cfg: SpecializeConfig, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device):
        """Raises ValueError for what `build_stream` refuses."""
        self.cfg, self.tokenizer, self.device = cfg, tokenizer, device
        self.stream = build_stream(cfg, student, tokenizer, device)
        self.reference: TeacherPool | None = None
        self.is_prepared, self.has_begun = False, False

    def step(self, step: int, engine: Engine, tracker: Tracker) -> dict[str, float]:
        """One sampling and one update; returns the step's metrics. Every rank calls it."""
        if not self.is_prepared:
            self._prepare(step, engine)
        with tracker.timer("rollout"):
            rollouts = self.stream.next(step, engine)
        with tracker.timer("score"):
            graded = grade_groups(rollouts, self.cfg.grpo, {name: domain.grader for name, domain in self.cfg.domains.items()}, self.tokenizer)
            scored = [] if self.reference is None else self.reference.score(rollouts)
        with tracker.timer("update"):
            require_routes(rollouts, self.cfg.student.replay_routes, len(engine.recorder.routers))
            weights, metrics = domain_weights(rollouts, self.cfg, engine.policy_step)
            if self.reference is None:
                batches = supervised_batches(rollouts, weights, self.cfg.batch, engine.least_length)
            else:
                batches = distillation_batches(self.reference.recovered(scored), weights, self.cfg.batch, engine.least_length)
            metrics |= train(engine, with_advantages(batches, graded.advantages), self.cfg, self.reference)
        metrics |= {} if self.reference is None else score_work(scored, self.reference)
        return metrics | reward_metrics(graded, self.cfg) | rollout_metrics(rollouts, self.stream, self.cfg, self.tokenizer, graded.scores)

    def state(self) -> dict:
        """Nothing until GRPO has begun."""
        return {"grpo": {"begun_after": self.cfg.num_steps, "rollouts": self.stream.state()}} if self.has_begun else {}

    def restore(self, state: dict) -> None:
        """Raises ValueError where GRPO began after another number of steps."""
        if "grpo" not in state:
            return
        begun_after = state["grpo"]["begun_after"]
        if begun_after != self.cfg.num_steps:
            raise ValueError(f"GRPO has begun after {begun_after} steps of fine-tuning, and num_steps={self.cfg.num_steps}: set num_steps={begun_after}")
        self.stream.restore(state["grpo"]["rollouts"])
        self.has_begun = True

    def forget_before(self, step: int) -> None:
        if self.has_begun:
            self.stream.forget_before(step)

    def _prepare(self, step: int, engine: Engine) -> None:
        """Begin GRPO, or take it up before a step in its midst."""
        cfg = self.cfg
        if step > cfg.num_steps and not self.has_begun:
            raise ValueError(f"the run has done {step} steps of fine-tuning, and GRPO should have begun after num_steps={cfg.num_steps}: set num_steps={step}")
        if self.has_begun:
            engine.set_schedule(cfg.grpo.num_steps, cfg.num_steps, cfg.grpo.lr_factor)
        else:
            engine.begin_schedule(cfg.grpo.num_steps, cfg.num_steps, cfg.grpo.lr_factor)
        if cfg.grpo.kl:
            folder = Path(cfg.run_dir) / "reference"
            if self.has_begun:
                _require_reference(folder)
            else:
                self._write_reference(folder, engine)
            self.reference = self._pool(folder)
        self.is_prepared = self.has_begun = True

    def _write_reference(self, folder: Path, engine: Engine) -> None:
        weights = engine.full_weights()
        if is_main():
            save_model(folder, engine.model, self.tokenizer, weights)
        barrier()

    def _pool(self, folder: Path) -> TeacherPool:
        """The reference as the teacher of every domain, in the student's dtype."""
        own = self.cfg.student
        own_loading = {"attention": own.attention, "experts": own.experts, "trust_remote_code": own.trust_remote_code}
        teacher = TeacherConfig(model=str(folder), dtype=own.dtype, **own_loading)
        domains = {name: replace(domain, teacher=teacher) for name, domain in self.cfg.domains.items()}
        return TeacherPool(domains, TeachersConfig(), self.tokenizer, self.device, data_ranks())


def grade_groups(rollouts: list[Rollout], cfg: GrpoConfig, graders: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Graded:
    """Grade rollouts and compare those of each prompt. graders: of each domain, as in its config. Raises ValueError where a grader fails."""
    scores = {rollout_key(rollout): grade_rollout(graders[rollout.prompt.domain], rollout, tokenizer) for rollout in rollouts}
    rewards = {rollout_key(rollout): scores[rollout_key(rollout)] - length_cost(rollout, cfg) for rollout in rollouts}
    found: dict[Key, float] = {}
    for keys in _groups(rewards).values():
        found |= dict(zip(keys, advantages([rewards[key] for key in keys], cfg.divide_by_std), strict=True))
    return Graded(rollouts, scores, rewards, found)


def length_cost(rollout: Rollout, cfg: GrpoConfig) -> float:
    """What a completion's length takes off its score: by its source of prompts where that has a penalty, else by its domain."""
    source = rollout.prompt.row.rpartition(":")[0]
    penalty = cfg.length_penalty.get(f"{rollout.prompt.domain}/{source}") or cfg.length_penalty.get(rollout.prompt.domain)
    return 0.0 if penalty is None else penalty.per_token * max(0, len(rollout.completion_T) - penalty.budget)


def advantages(rewards: list[float], divide_by_std: bool) -> list[float]:
    """Rewards of one group less their mean; exactly 0 where all are equal."""
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    std = (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5
    return [(reward - mean) / (std + LEAST_STD if divide_by_std else 1.0) for reward in rewards]


def with_advantages(batches: list[MicroBatch], advantage: dict[Key, float]) -> list[MicroBatch]:
    """Micro-batches of GRPO: each token with the advantage of its completion."""
    return [replace(batch, advantage_N=torch.tensor([advantage[rollout_key(rollout)] for rollout in batch.rollouts])[batch.rollout_N]) for batch in batches]


def reward_metrics(graded: Graded, cfg: SpecializeConfig) -> dict[str, float]:
    """Rewards, what length costs, and groups without a difference, over all ranks (names: opd/metrics.py)."""
    totals = DomainTotals(list(cfg.domains))
    domain_of = {rollout.prompt.request: rollout.prompt.domain for rollout in graded.rollouts}
    for (request, sample), reward in graded.rewards.items():
        totals.add(domain_of[request], rollouts=1, reward=reward, cost=graded.scores[request, sample] - reward)
    for request, keys in _groups(graded.rewards).items():
        totals.add(domain_of[request], groups=1, flat=len({graded.rewards[key] for key in keys}) == 1)
    names = ("rollouts", "reward", "cost", "groups", "flat")
    sums_of = totals.reduced(names)
    whole = {name: sum(sums[name] for sums in sums_of.values()) for name in names}
    result = {"grpo/reward": whole["reward"] / whole["rollouts"], "grpo/zero_variance": whole["flat"] / whole["groups"]}
    for domain, sums in sums_of.items():
        if sums["rollouts"]:
            result[f"domain/{domain}/reward"] = sums["reward"] / sums["rollouts"]
            result[f"domain/{domain}/zero_variance"] = sums["flat"] / sums["groups"]
            if cfg.grpo.length_penalty:
                result[f"domain/{domain}/length_penalty"] = sums["cost"] / sums["rollouts"]
    return result


def _groups(keys: dict[Key, float]) -> dict[int, list[Key]]:
    """Request -> the keys of its completions."""
    found: dict[int, list[Key]] = {}
    for key in keys:
        found.setdefault(key[0], []).append(key)
    return found


def _require_reference(folder: Path) -> None:
    """Raises ValueError where the reference of a run that is taken up is gone; a branch takes its own from the run it came from. Every rank calls it."""
    lineage = folder.parent / "lineage.json"
    if is_main() and not folder.is_dir() and lineage.is_file():
        source = Path(read_json(lineage)["from"]) / folder.name
        if source.is_dir():
            shutil.copytree(source, folder.with_name(folder.name + ".partial"), dirs_exist_ok=True)
            folder.with_name(folder.name + ".partial").rename(folder)
    if not on_main(folder.is_dir):
        raise ValueError(f"{folder}, the model that GRPO began with, is gone: restore it, or begin anew with fresh=true")
