"""RolloutStream: what the training loop asks for rollouts.

It joins the prompt mixture, the sampler and the replay files: a step's rollouts are sampled with the present weights, or read
from a run that saved them. Each rank answers its share of the step's prompts; which share does not matter, since prompts, random
numbers and the loss do not depend on it.
"""

import logging
from pathlib import Path

from rollout.config import RolloutConfig
from rollout.prompts import PromptMixture
from rollout.ranks import OneRank, Ranks
from rollout.replay import first_difference, load_rollouts, replay_file, rollout_key, save_rollouts
from rollout.sampler import Sampler, StepLog, WeightSource
from rollout.types import Rollout
from rollout.wal import RolloutLog


class RolloutStream:
    """Rollouts step by step; resumable through `state` and `restore`."""

    def __init__(self, prompts: PromptMixture, sampler: Sampler, cfg: RolloutConfig, run_dir: str, ranks: Ranks | None = None):
        """Raises ValueError where a step has fewer prompts than there are ranks."""
        self.prompts, self.sampler, self.cfg, self.run_dir = prompts, sampler, cfg, run_dir
        self.ranks = ranks or OneRank()
        self.log = RolloutLog(Path(run_dir) / "log")
        self.asked_shares: dict[str, float] = {}
        self.difference: str | None = None
        if cfg.replay is not None and (cfg.save or cfg.compare is not None):
            raise ValueError("rollout.replay samples nothing, so rollout.save and rollout.compare would be ignored: leave them out")
        if cfg.prompts_per_step < self.ranks.count:
            raise ValueError(f"rollout.prompts_per_step={cfg.prompts_per_step} is less than the {self.ranks.count} ranks: each needs a prompt")

    @property
    def longest_rollouts(self) -> dict[str, int]:
        """Tokens that a rollout of each domain can have at most, prompt and completion together."""
        return {name: domain.longest + self.cfg.max_new_tokens for name, domain in self.prompts.domains.items()}

    def next(self, step: int, source: WeightSource) -> list[Rollout]:
        """This rank's rollouts of a step, sampled with the source's present weights (or replayed)."""
        self.asked_shares = self.prompts.asked_shares(step)
        if self.cfg.replay is not None:
            rollouts = load_rollouts(replay_file(self.cfg.replay, step))
            return rollouts[self.ranks.index :: self.ranks.count]
        self.sampler.refresh(source)
        prompts = self.prompts.next(step)[self.ranks.index :: self.ranks.count]
        log = StepLog(self.log, step, f"rank-{self.ranks.index:03d}") if self.cfg.log else None
        rollouts = self.sampler.sample(prompts, self.cfg, self.cfg.completions_per_prompt, log)
        if self.cfg.save or self.cfg.compare is not None:
            self._keep(step, rollouts)
        return rollouts

    def state(self) -> dict:
        return {"prompts": self.prompts.state()}

    def restore(self, state: dict) -> None:
        self.prompts.restore(state["prompts"])

    def forget_before(self, step: int) -> None:
        """Delete what was kept for taking up steps before one: the main rank calls it once the run cannot go back to them."""
        self.log.trim(step)

    def _keep(self, step: int, rollouts: list[Rollout]) -> None:
        """Save the whole step's rollouts, and compare them with another run's until the first difference."""
        everything = sorted((rollout for part in self.ranks.gather(rollouts) for rollout in part), key=rollout_key)
        if self.cfg.save and self.ranks.index == 0:
            save_rollouts(replay_file(self.run_dir, step), step, everything)
        if self.cfg.compare is not None and self.difference is None:
            difference = first_difference(everything, load_rollouts(replay_file(self.cfg.compare, step)))
            if difference is not None:
                self.difference = f"step {step}: {difference}"
                logging.getLogger(__name__).warning("rollouts differ from those of %s at %s", self.cfg.compare, self.difference)
