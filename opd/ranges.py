"""What the numbers of a config may be. Types alone are OmegaConf's: opd/config.py declares them, `parse` there calls this.

A field is known by its name, whichever dataclass it stands in.
"""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from opd.loss_config import Backend, DivergenceKind, LossConfig
from opd.start_config import CheckConfig, WarmupConfig, WarmupKind
from rollout.config import RolloutConfig, SamplerKind, ServiceConfig, VllmConfig, schedule_value
from rollout.grader_config import read_grader
from teachers.config import DomainConfig, SignalKind, TeachersConfig

AT_LEAST_ONE = (
    "prompts_per_step", "completions_per_prompt", "max_new_tokens", "decode_width", "examples_per_step", "max_tokens",
    "max_tokens_per_micro_batch", "max_tokens_per_forward", "max_resident", "keep", "threads", "processes",
    "top_k", "num_tokens", "vocab_sizes", "hidden", "teacher_hidden", "repeats", "measure_rollouts", "kl_prompts",
    "shape", "tokens_per_expert", "max_connections", "num_teachers", "tokens_per_step", "rollouts_per_teacher", "vocab_size",
    "max_failures", "requests", "prompt_tokens", "ranks", "ranks_per_node", "rows", "parallel",
)  # fmt: skip
"""Whole numbers from 1; of a list, each of its members, and there is one."""

NOT_NEGATIVE = (
    "num_steps", "temperature", "lr", "muon_lr", "eps", "weight_decay", "warmup_steps", "every", "router_probe_every", "update_ratio_every",
    "measure_every", "steps", "memory_gb", "hidden_memory_gb", "gradient_share_every", "retries", "show", "stop_tokens", "num_end_tokens",
    "teacher_answers", "max_restarts", "max_skipped_steps", "minimum_recovery", "follow_minutes",
)  # fmt: skip

ABOVE_ZERO = (
    "timeout_seconds", "load_timeout_seconds", "probe_tolerance", "lease_seconds", "max_mismatch", "tolerance", "heartbeat_seconds", "timeout_minutes",
    "follow_seconds", "memory_gib", "host_memory_gib", "max_hours",
)  # fmt: skip
"""Finite numbers above 0, or none at all."""

INTERVALS = {
    "betas": "two numbers from 0 to below 1", "top_p": "above 0 and at most 1", "min_p": "from 0 to below 1", "rate": "from 0 to 1",
    "maximum_retention_drop": "from -1 to 1", "momentum": "from 0 to below 1",
}  # fmt: skip

OF_PATHS = {
    "rollout.staleness": "0 or 1", "loss.temperature": "above 0", "loss.beta": "from 0 (forward KL) to 1 (reverse KL)", "loss.smoothing": "from 0 to below 1",
    "loss.cap": "above 0", "evaluation.samples": "at least 1", "evaluation.prompts": "at least 1", "check.prompts": "at least 1",
    "warmup.prompts": "at least 1", "alarms.rules.NAME.window": "at least 1", "grpo.lr_factor": "above 0", "grpo.clip_low": "above 0 and below 1",
    "grpo.clip_high": "above 0", "domains.NAME.grader.tolerance": "at least 0", "domains.NAME.grader.relative_tolerance": "at least 0",
    "grpo.length_penalty.NAME.budget": "at least 1",
}  # fmt: skip
"""What is checked where the setting stands, since others of its name may be something else."""

MOST_COMPLETIONS = 1 << 16
"""Of a prompt: beyond it, two would be drawn with the same random numbers."""

LEAST_TEMPERATURE = 1e-5
"""Logits divided by less may be infinite."""


def range_of(path: str) -> str:
    """What a number may be, in words; empty where its type says all."""
    name = path.rpartition(".")[2]
    if path in OF_PATHS:
        return OF_PATHS[path]
    if name in INTERVALS:
        return INTERVALS[name]
    return "at least 1" if name in AT_LEAST_ONE else "at least 0" if name in NOT_NEGATIVE else "above 0" if name in ABOVE_ZERO else ""


def check_ranges(cfg: Any, path: str = "") -> None:
    """Raises ValueError for a number that is out of its range, anywhere in a config."""
    for field in fields(cfg):
        name, value = path + field.name, getattr(cfg, field.name)
        least = 1 if field.name in AT_LEAST_ONE else 0 if field.name in NOT_NEGATIVE else None
        if least == 1 and value == []:
            raise ValueError(f"{name} must not be empty: write {name}=[N]")
        for number in value if isinstance(value, list) else [value]:
            if least is not None and number is not None and not number >= least:
                raise ValueError(f"{name} must be at least {least}, not {number}")
        if field.name == "betas" and not (len(value) == 2 and all(0 <= beta < 1 for beta in value)):
            raise ValueError(f"{name} must be {INTERVALS['betas']}, not {value}")
        if field.name == "top_p" and not 0 < value <= 1:
            raise ValueError(f"{name} must be {INTERVALS['top_p']}, not {value}")
        if field.name in ("min_p", "momentum") and not 0 <= value < 1:
            raise ValueError(f"{name} must be {INTERVALS[field.name]}, not {value}")
        if field.name in ABOVE_ZERO and value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0 and finite, not {value}")
        for key, member in value.items() if isinstance(value, dict) else [("", value)]:
            if is_dataclass(member):
                check_ranges(member, f"{name}.{key}." if key else f"{name}.")


def check_schedules(cfg: Any) -> None:
    """Raises ValueError for a number or schedule that is neither, and for what is no grader; OmegaConf has no type for them."""
    names = {field.name for field in fields(cfg)}
    for name, domain in cfg.domains.items() if "domains" in names else ():
        schedule_value(domain.prompts.share, 0, f"domains.{name}.prompts.share")
        schedule_value(domain.loss_weight, 0, f"domains.{name}.loss_weight")
        read_grader(domain.grader, f"domains.{name}.grader")
        _check_perturbation(domain, f"domains.{name}.perturbation")
    if "slip_rate" in names:
        _check_rates(cfg.slip_rate, cfg.repair_rate)


def _check_perturbation(domain: DomainConfig, name: str) -> None:
    cfg = domain.perturbation
    if not 0 <= cfg.rate <= 1:
        raise ValueError(f"{name}.rate must be {INTERVALS['rate']}, not {cfg.rate}")
    if not cfg.rate:
        return
    if len(cfg.alphabet) < 2:
        raise ValueError(f"{name}.alphabet={cfg.alphabet} has no token to replace another by: name two texts of one token each, or more")
    if domain.grader is None:
        raise ValueError(f"{name} would be ignored without a grader, since accuracy is all that it measures: set the domain's grader, or {name}.rate=0")


def _check_rates(slip_rate: Any, repair_rate: Any) -> None:
    """Raises ValueError for shares of the examples that are no schedules, or more than all of them together from some step on."""
    steps = {0} | {int(step) for schedule in (slip_rate, repair_rate) if isinstance(schedule, Mapping) for step in schedule}
    for step in sorted(steps, key=lambda step: (step != 0, step)):  # what does not begin at step 0 is refused as that
        slip, repair = schedule_value(slip_rate, step, "slip_rate"), schedule_value(repair_rate, step, "repair_rate")
        if repair and slip + repair > 1:
            raise ValueError(f"slip_rate={slip:g} and repair_rate={repair:g} are shares of the same examples, more than all at step {step}: lower one")


def check_evaluated(domains: dict[str, DomainConfig]) -> None:
    """Raises ValueError for a teacher that `opd evaluate` could not evaluate: it samples from teachers, and compares whole distributions."""
    for name, domain in domains.items():
        if domain.teacher.server is not None:
            raise ValueError(f"opd evaluate loads each teacher, and that of {name} is a server: set domains.{name}.teacher.server=null and teacher.model")


def check_loss(loss: LossConfig, teachers: TeachersConfig, rollout: RolloutConfig) -> None:
    """Raises ValueError for settings of the loss that are out of range, do not fit what the teachers give, or would be ignored."""
    if not 0 <= loss.smoothing < 1:
        raise ValueError(f"loss.smoothing must be from 0 to below 1, not {loss.smoothing}")
    if not 0 <= loss.beta <= 1:
        raise ValueError(f"loss.beta must be from 0 (forward KL) to 1 (reverse KL), not {loss.beta}")
    if not 0 < loss.temperature < math.inf:
        raise ValueError(f"loss.temperature must be above 0 and finite, not {loss.temperature}")
    if loss.cap is not None and not loss.cap > 0:
        raise ValueError(f"loss.cap must be above 0, not {loss.cap}: null has no cap")
    if loss.kind is not DivergenceKind.jsd and loss.beta != LossConfig().beta:
        raise ValueError(f"loss.beta belongs to loss.kind=jsd and would be ignored with {loss.kind.value}: remove it")
    if teachers.signal is not SignalKind.top_k and teachers.top_k != TeachersConfig().top_k:
        raise ValueError(f"teachers.top_k belongs to teachers.signal=top_k and would be ignored with {teachers.signal.value}: remove it")
    if rollout.max_mismatch is not None and rollout.comparable_temperature is None:
        raise ValueError("rollout.max_mismatch compares log-probabilities, which temperature 0, top_p, top_k and min_p do not leave comparable: remove one")
    if loss.constant_penalty and teachers.signal is not SignalKind.sampled_token:
        raise ValueError("loss.constant_penalty=true is a policy gradient on sampled tokens alone: set teachers.signal=sampled_token, or remove it")
    if loss.constant_penalty and loss.cap is not None:
        raise ValueError("loss.cap would be ignored with loss.constant_penalty=true, whose advantage is 0 or -1: remove it")
    _check_estimator(loss, teachers.signal, rollout)


def check_routes(replays: bool, rollout: RolloutConfig) -> None:
    """Raises ValueError where routes are asked for that are not recorded. replays: student.replay_routes."""
    if rollout.record_routes and rollout.sampler is not SamplerKind.local:
        kind = rollout.sampler.value
        raise ValueError(f"rollout.sampler={kind} does not say which experts it chose: use rollout.sampler=local, or leave out rollout.record_routes")
    if rollout.record_routes and rollout.replay is not None:
        raise ValueError("rollout.replay samples nothing, so rollout.record_routes would be ignored: leave it out")
    if replays and not rollout.record_routes and rollout.replay is None:
        raise ValueError("student.replay_routes=true has no routes to replay: set rollout.record_routes=true, or remove it")


def _check_estimator(loss: LossConfig, signal: SignalKind, rollout: RolloutConfig) -> None:
    if signal is not SignalKind.hidden_states:
        if loss.policy_gradient:
            raise ValueError(f"loss.policy_gradient=true needs whole distributions, and teachers.signal={signal.value} gives less: remove one")
        if loss.temperature != 1:
            raise ValueError(f"loss.temperature={loss.temperature} needs whole distributions: use teachers.signal=hidden_states")
        if loss.backend is not Backend.auto:
            raise ValueError(f"loss.backend={loss.backend.value} would be ignored with teachers.signal={signal.value}: remove it")
    if signal is not SignalKind.sampled_token and not loss.policy_gradient:
        return
    cause = "teachers.signal=sampled_token" if signal is SignalKind.sampled_token else "loss.policy_gradient=true"
    if loss.temperature != 1 or loss.kind is not DivergenceKind.reverse_kl or loss.smoothing:
        raise ValueError(f"{cause} estimates reverse KL at temperature 1: remove loss.kind, loss.smoothing and loss.temperature, or {cause}")
    if rollout.temperature != 1:
        raise ValueError(f"rollout.temperature={rollout.temperature} would bias {cause}: use rollout.temperature=1")
    if rollout.replay is not None:
        raise ValueError(f"rollout.replay would bias {cause}, since saved rollouts are another policy's samples: use teachers.signal=hidden_states")


def check_rollout(rollout: RolloutConfig) -> None:
    """Raises ValueError for settings of the sampler that are out of range or contradict each other."""
    if rollout.temperature != 0 and not LEAST_TEMPERATURE <= rollout.temperature < math.inf:
        raise ValueError(f"rollout.temperature must be finite, and 0 (greedy) or at least {LEAST_TEMPERATURE:g}, not {rollout.temperature}")
    if rollout.completions_per_prompt > MOST_COMPLETIONS:
        raise ValueError(f"rollout.completions_per_prompt must be at most {MOST_COMPLETIONS}, not {rollout.completions_per_prompt}")
    if rollout.staleness not in (0, 1):
        raise ValueError(f"rollout.staleness must be 0 (rollouts of the present weights) or 1 (of those before the last update), not {rollout.staleness}")
    if rollout.staleness and rollout.sampler is SamplerKind.local:
        raise ValueError("rollout.staleness=1 samples while the trainer trains, which its own process cannot: use rollout.sampler=service or vllm")
    if rollout.sampler is SamplerKind.service and not rollout.log:
        raise ValueError("rollout.sampler=service reads what its processes log: remove rollout.log=false")
    if rollout.sampler is not SamplerKind.service and rollout.service != ServiceConfig():
        raise ValueError(f"rollout.service would be ignored with rollout.sampler={rollout.sampler.value}: write rollout.sampler=service, or remove it")
    if rollout.sampler is SamplerKind.vllm and not rollout.vllm.servers:
        raise ValueError("rollout.sampler=vllm needs servers: write rollout.vllm.servers=[http://host:8000]")
    if rollout.sampler is not SamplerKind.vllm and rollout.vllm != VllmConfig():
        raise ValueError(f"rollout.vllm would be ignored with rollout.sampler={rollout.sampler.value}: write rollout.sampler=vllm, or remove it")


def check_profile(steps: list[int], all_ranks: bool, num_steps: int) -> None:
    """Raises ValueError for steps to trace that are no range within the run, and for ranks of a trace not asked for."""
    if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1] <= num_steps):
        raise ValueError(f"profile.steps must be the first and the last step to trace, from 1 to num_steps={num_steps}, as [10,12], not {steps}")
    if all_ranks and not steps:
        raise ValueError("profile.all_ranks would be ignored without profile.steps: name the steps to trace, or remove it")


def check_start(check: CheckConfig, cfg: WarmupConfig, domains: dict[str, DomainConfig]) -> None:
    """Raises ValueError for a check without prompts, a warm-up of no step or of a domain that the run does not have, and settings of one not asked for."""
    for name, number in (("check.prompts", check.prompts), ("warmup.prompts", cfg.prompts)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
    if cfg.kind is WarmupKind.none:
        if cfg != WarmupConfig():
            raise ValueError("settings of warmup would be ignored without one: write warmup=sft, or remove them")
        return
    unknown = [name for name in cfg.domains or () if name not in domains]
    if unknown or cfg.domains == []:
        raise ValueError(f"warmup.domains={cfg.domains} must name domains of the run: {', '.join(domains)}")
    if not cfg.steps:
        raise ValueError("warmup=sft needs updates: set warmup.steps to 1 or more, or write warmup=none")
