"""Typed settings of GRPO in `opd specialize` (opd/grpo.py), and what they must not be. How the student is sampled for it stands under `rollout`."""

import math
from dataclasses import dataclass, field

from rollout.config import RolloutConfig
from teachers.config import DomainConfig


@dataclass(slots=True)
class LengthPenaltyConfig:
    """What long answers cost.

    budget: tokens of a completion, its end-of-sequence token included, that cost nothing.
    per_token: what each token beyond takes off the score.
    """

    budget: int = 0
    per_token: float = 0.0


@dataclass(slots=True)
class GrpoConfig:
    """Group relative policy optimisation with the domains' graders, after the supervised fine-tuning.

    num_steps: optimizer steps; 0 leaves GRPO out.
    lr_factor: GRPO's learning rates are this times those of `optim`, whose warm-up and schedule begin anew with it.
    clip_low, clip_high: a token gains nothing where the ratio of its probabilities under trainer and sampler leaves 1 - clip_low to 1 + clip_high.
    kl: weight of the exact reverse KL per token, KL(student || reference), the reference being the model that GRPO begins with; 0 has none and loads none.
    divide_by_std: advantages in units of their group's standard deviation, which gives the prompts that are nearly always or never solved more weight.
    length_penalty: by domain, or by DOMAIN/SOURCE for one source of its prompts: what long answers cost there. A reasoning effort is a domain or a
        source of its own, with its own budget. Others cost nothing.
    """

    num_steps: int = 0
    lr_factor: float = 0.1
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.0
    divide_by_std: bool = False
    length_penalty: dict[str, LengthPenaltyConfig] = field(default_factory=dict)


def group_rollouts() -> RolloutConfig:
    """Sampling for GRPO where nothing else is asked for: 16 prompts a step, in groups of 8 completions."""
    return RolloutConfig(prompts_per_step=16, completions_per_prompt=8)


def check_grpo(cfg: GrpoConfig, rollout: RolloutConfig, domains: dict[str, DomainConfig], replays_routes: bool) -> None:
    """Raises ValueError for settings that are out of range, contradict each other or would be ignored. replays_routes: student.replay_routes."""
    if cfg.num_steps == 0:
        _require_nothing_ignored(cfg, rollout, replays_routes)
        return
    if not 0 < cfg.lr_factor < math.inf:
        raise ValueError(f"grpo.lr_factor must be above 0 and finite, not {cfg.lr_factor}")
    if not 0 < cfg.clip_low < 1:
        raise ValueError(f"grpo.clip_low must be above 0 and below 1, not {cfg.clip_low}")
    if not 0 < cfg.clip_high < math.inf:
        raise ValueError(f"grpo.clip_high must be above 0 and finite, not {cfg.clip_high}")
    if not 0 <= cfg.kl < math.inf:
        raise ValueError(f"grpo.kl must be at least 0 and finite, not {cfg.kl}")
    for name, domain in domains.items():
        if domain.grader is None:
            raise ValueError(f"GRPO needs a grader in every domain: set domains.{name}.grader, or leave {name} out")
    _check_sampling(rollout)
    for name, penalty in cfg.length_penalty.items():
        _check_penalty(name, penalty, domains)


def _require_nothing_ignored(cfg: GrpoConfig, rollout: RolloutConfig, replays_routes: bool) -> None:
    if replays_routes:
        raise ValueError(
            "student.replay_routes=true would be ignored: opd specialize without grpo.num_steps trains on answers that no one sampled, which have no "
            "routes: remove it"
        )
    if cfg != GrpoConfig():
        raise ValueError("settings of grpo would be ignored with grpo.num_steps=0: set grpo.num_steps, or remove them")
    if rollout != group_rollouts():
        raise ValueError("settings of rollout would be ignored without GRPO, since no one samples: set grpo.num_steps, or remove them")


def _check_sampling(rollout: RolloutConfig) -> None:
    if rollout.completions_per_prompt < 2:
        raise ValueError("rollout.completions_per_prompt=1 has no group to compare a completion with: set it to 2 or more")
    if rollout.temperature != 1 or rollout.truncates:
        raise ValueError("GRPO trains the very distribution that is sampled: remove rollout.temperature, rollout.top_p, rollout.top_k and rollout.min_p")
    if rollout.replay is not None:
        raise ValueError("rollout.replay would bias GRPO, since saved rollouts are another policy's samples: remove it")
    if rollout.max_mismatch is not None:
        raise ValueError("rollout.max_mismatch would be ignored: GRPO clips the ratio of each token (grpo.clip_low, grpo.clip_high): remove it")


def _check_penalty(name: str, cfg: LengthPenaltyConfig, domains: dict[str, DomainConfig]) -> None:
    domain, _, source = name.partition("/")
    if domain not in domains or ("/" in name and source not in domains[domain].prompts.sources):
        known = [*domains, *(f"{other}/{part}" for other, own in domains.items() for part in own.prompts.sources)]
        raise ValueError(f"grpo.length_penalty names {name}, which is neither a domain of the run nor DOMAIN/SOURCE: there are {', '.join(known)}")
    if cfg.budget < 1:
        raise ValueError(f"grpo.length_penalty.{name}.budget must be at least 1, not {cfg.budget}")
    if not 0 < cfg.per_token < math.inf:
        raise ValueError(f"grpo.length_penalty.{name}.per_token must be above 0 and finite, not {cfg.per_token}")
