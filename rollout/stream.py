"""RolloutStream: what the training loop asks for rollouts.

It joins the prompt mixture, the sampler, the token log and the replay files: a step's rollouts are sampled with the present weights, or read
from a run that saved them. Each rank answers its share of the step's prompts; which share does not matter, since prompts, random
numbers and the loss do not depend on it.

With rollout.staleness=1 the rollouts of step k+1 are sampled in a thread, by a sampler outside this process, while step k trains; the weights are those from
before the update of step k. The loss is computed under the present student all the same, so that what is old is the choice of the states that it
visits. A run that is taken up samples its first step with the weights it would have had, as long as they are published.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from rollout.cohort import DecodingFigures
from rollout.config import RolloutConfig
from rollout.prompts import PromptMixture
from rollout.ranks import OneRank, Ranks
from rollout.repetition import mask_loops
from rollout.replay import first_difference, load_rollouts, replay_file, rollout_key, save_rollouts
from rollout.sampler import LocalSampler, Sampler, StepLog, WeightSource
from rollout.types import Rollout
from rollout.wal import RolloutLog

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pending:
    """A step that is being sampled: its rollouts to come, the prompts' state before it, and the step of its weights."""

    sampled: Future["Sampled"]
    prompts: dict
    policy_step: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """This rank's rollouts of a step, and what decoding them took; None where a sampler does not know."""

    rollouts: list[Rollout]
    figures: DecodingFigures | None


class RolloutStream:
    """Rollouts step by step; resumable through `state` and `restore`.

    sampler: a model of this process, for evaluation and checks; unless `draw_with` names another, it draws the rollouts too.
    """

    def __init__(self, prompts: PromptMixture, sampler: LocalSampler, cfg: RolloutConfig, run_dir: str, ranks: Ranks | None = None):
        """Raises ValueError where a step has fewer prompts than there are ranks."""
        self.prompts, self.sampler, self.cfg, self.run_dir = prompts, sampler, cfg, run_dir
        self.ranks = ranks or OneRank()
        self.rollout_sampler: Sampler = sampler
        self.log = RolloutLog(Path(run_dir) / "log")
        self.num_steps = 0
        self.pending: Pending | None = None
        self.taken_up: int | None = None
        self.asked_shares: dict[str, float] = {}
        self.difference: str | None = None
        self.sync_seconds = 0.0
        self.figures: DecodingFigures | None = None
        if cfg.replay is not None and (cfg.save or cfg.compare is not None):
            raise ValueError("rollout.replay samples nothing, so rollout.save and rollout.compare would be ignored: leave them out")
        if cfg.prompts_per_step < self.ranks.count:
            raise ValueError(f"rollout.prompts_per_step={cfg.prompts_per_step} is less than the {self.ranks.count} ranks: each needs a prompt")

    @property
    def longest_rollouts(self) -> dict[str, int]:
        """Tokens that a rollout of each domain can have at most, prompt and completion together."""
        return {name: domain.longest + self.cfg.max_new_tokens for name, domain in self.prompts.domains.items()}

    def draw_with(self, sampler: Sampler, num_steps: int) -> None:
        """Have another sampler draw the rollouts of a run of `num_steps`; `sampler` stays for evaluation and checks."""
        self.rollout_sampler, self.num_steps = sampler, num_steps

    def next(self, step: int, source: WeightSource) -> list[Rollout]:
        """This rank's rollouts of a step: sampled with the source's present weights, with rollout.staleness=1 with those of the step before, or replayed."""
        self.asked_shares = self.prompts.asked_shares(step)
        if self.cfg.replay is not None:
            rollouts = load_rollouts(replay_file(self.cfg.replay, step))
            own = set(list(dict.fromkeys(rollout.prompt.request for rollout in rollouts))[self.ranks.index :: self.ranks.count])
            return self._masked([rollout for rollout in rollouts if rollout.prompt.request in own])
        if self.cfg.staleness == 0:
            self._refresh(source)
            sampled = self._sample(step)
        else:
            sampled = self._take_pending(step, source)
        rollouts, self.figures = sampled.rollouts, sampled.figures
        if self.cfg.save or self.cfg.compare is not None:
            self._keep(step, rollouts)
        return self._masked(rollouts)

    def state(self) -> dict:
        """Where the prompts stand before those of the next step are drawn, and which weights sample it."""
        if self.pending is None:
            return {"prompts": self.prompts.state()}
        return {"prompts": self.pending.prompts, "policy_step": self.pending.policy_step}

    def restore(self, state: dict) -> None:
        self.prompts.restore(state["prompts"])
        self.taken_up = state.get("policy_step")
        if self.taken_up is not None:
            self.rollout_sampler.protect(self.taken_up)  # the run may be killed again before its next checkpoint

    def forget_before(self, step: int) -> None:
        """Delete what was kept for taking up steps before one: the main rank calls it once the run cannot go back to them."""
        self.log.trim(step)
        self.rollout_sampler.protect(step - 1)

    def _masked(self, rollouts: list[Rollout]) -> list[Rollout]:
        return mask_loops(rollouts) if self.cfg.mask_loops else rollouts

    def _refresh(self, source: WeightSource) -> None:
        begun = time.monotonic()
        self.rollout_sampler.refresh(source)
        self.sync_seconds = time.monotonic() - begun

    def _sample(self, step: int) -> Sampled:
        prompts = self.prompts.next(step)[self.ranks.index :: self.ranks.count]
        log = StepLog(self.log, step, f"rank-{self.ranks.index:03d}") if self.cfg.log else None
        rollouts = self.rollout_sampler.sample(prompts, self.cfg, self.cfg.completions_per_prompt, log)
        return Sampled(rollouts, self.rollout_sampler.figures)

    def _take_pending(self, step: int, source: WeightSource) -> Sampled:
        """Wait for the step's rollouts, and begin those of the next with the present weights: they are sampled while this step trains."""
        pending = self.pending or self._begin(step, source, self.taken_up)
        self.taken_up = None
        sampled = pending.sampled.result()
        self.pending = self._begin(step + 1, source) if step + 1 < self.num_steps else None
        return sampled

    def _begin(self, step: int, source: WeightSource, published: int | None = None) -> Pending:
        """published: weights that a run which is taken up sampled this step with; where they are gone, the present ones do it."""
        if published is None or not self.rollout_sampler.take_up_weights(published):
            self._refresh(source)
            if published is not None:
                LOG.warning("the weights after %d updates are no longer published: step %d is sampled with those after %d", published, step, source.policy_step)
        prompts = self.prompts.state()
        return Pending(_in_thread(lambda: self._sample(step)), prompts, self.rollout_sampler.policy_step)

    def _keep(self, step: int, rollouts: list[Rollout]) -> None:
        """Save the whole step's rollouts, and compare them with another run's until the first difference."""
        everything = sorted((rollout for part in self.ranks.gather(rollouts) for rollout in part), key=rollout_key)
        if self.cfg.save and self.ranks.index == 0:
            save_rollouts(replay_file(self.run_dir, step), step, everything)
        if self.cfg.compare is not None and self.difference is None:
            difference = first_difference(everything, load_rollouts(replay_file(self.cfg.compare, step)))
            if difference is not None:
                self.difference = f"step {step}: {difference}"
                LOG.warning("rollouts differ from those of %s at %s", self.cfg.compare, self.difference)


def _in_thread(work: Callable[[], Sampled]) -> Future[Sampled]:
    """What `work` gives or raises, to come; a run that ends meanwhile does not wait for it."""
    future: Future[Sampled] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
