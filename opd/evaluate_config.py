"""Typed settings of evaluations: those of a run while it trains, and `opd evaluate`'s, with the rule by which a checkpoint is chosen (opd/choice.py)."""

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from opd.harness_config import HarnessConfig
from opd.job_config import RanksConfig
from opd.ranges import INTERVALS, check_evaluated
from rollout.config import ModelConfig
from teachers.config import DomainConfig, SignalKind, TeachersConfig


class Prefer(Enum):
    """What the accepted checkpoints are ranked by: the recovery of the domain that recovers least (accuracy, where no domain has a teacher), accuracy over
    all prompts, or age.
    """

    lowest_recovery = "lowest_recovery"
    accuracy = "accuracy"
    earliest = "earliest"
    newest = "newest"


@dataclass(slots=True)
class AcceptConfig:
    """Which checkpoint of a run is chosen: of those within the bounds, the best; RUN@chosen names it, and the run does not delete it.

    minimum_recovery: of each graded domain with a teacher, accuracy over the teacher's; null sets no bound.
    maximum_retention_drop: of each domain of `retention`, accuracy of the base less that of the student; null sets no bound.
    confident: bounds hold at the worse end of a figure's 95 % interval; false: for the figure itself.
    prefer: what decides among those within the bounds; of equals, the earlier is taken.
    end_run: have a run that is still going end, with a checkpoint, as soon as one is accepted.
    """

    minimum_recovery: float | None = None
    maximum_retention_drop: float | None = None
    confident: bool = True
    prefer: Prefer = Prefer.lowest_recovery
    end_run: bool = False


@dataclass(slots=True)
class EvaluationConfig:
    """Evaluation on held-out prompts: temperature 1, and greedy beside it.

    every: steps between evaluations while training; 0 evaluates never.
    prompts: held-out prompts per domain while training; null takes all.
    samples: completions of each prompt at temperature 1, over which its score is a mean; the divergence is that of the first.
    kl: also the held-out divergence from each domain's teacher; not where a server holds it, which cannot give whole distributions.
    max_new_tokens: completion tokens at most; null takes rollout.max_new_tokens (256 in commands without rollouts).
    decode_width: rows decoded together; null takes rollout.decode_width (64 in commands without rollouts).
    """

    every: int = 0
    prompts: int | None = 256
    samples: int = 1
    kl: bool = True
    max_new_tokens: int | None = None
    decode_width: int | None = None


@dataclass(slots=True)
class EvaluateConfig:
    """`opd evaluate`: accuracy on held-out prompts of the student, of its domains' teachers, and of the base it began from.

    run_dir: folder for evaluation.json and the resolved configuration.
    seed: key of every random choice.
    threads: CPU threads of this process; null chooses.
    student, base: models to compare; base may be left out.
    domains, teachers: as for `opd distill`.
    retention: domains that are not distilled and should not be lost: student against base, without their teachers.
    pass_k: for each k, at most evaluation.samples, also the chance that one of k completions of a prompt is right.
    evaluation: how; all held-out prompts unless it says otherwise.
    lm_eval: tasks of EleutherAI's lm_eval to score as well, or in place of domains.
    cache: folder in which what was measured of each model is kept, and looked up by weights, prompts and settings (opd/evaluation_cache.py); null keeps none.
    launch: its processes.
    run: folder of the run whose checkpoints are evaluated, written behind the command, from which domains, base and sampling are then taken.
    checkpoints: of that run: newest, all, or a list of steps.
    follow: wait for further checkpoints until the run is done, or stopped by an alarm or an accepted checkpoint.
    follow_seconds: time between two looks for further checkpoints.
    follow_minutes: how long it waits for a run that is neither at work nor ended: not begun yet, preempted and queued, killed or failed.
    accept: which of a run's checkpoints is chosen.
    """

    run_dir: str = "runs/evaluate"
    seed: int = 0
    threads: int | None = None
    student: ModelConfig = field(default_factory=ModelConfig)
    base: ModelConfig = field(default_factory=ModelConfig)
    domains: dict[str, DomainConfig] = field(default_factory=dict)
    teachers: TeachersConfig = field(default_factory=TeachersConfig)
    retention: list[str] = field(default_factory=list)
    pass_k: list[int] = field(default_factory=list)
    evaluation: EvaluationConfig = field(default_factory=lambda: EvaluationConfig(prompts=None))
    lm_eval: HarnessConfig = field(default_factory=HarnessConfig)
    cache: str | None = None
    launch: RanksConfig = field(default_factory=RanksConfig)
    run: str | None = None
    checkpoints: Any = "newest"
    follow: bool = False
    follow_seconds: float = 10.0
    follow_minutes: float = 30.0
    accept: AcceptConfig = field(default_factory=AcceptConfig)


def check_evaluation(cfg: EvaluationConfig) -> None:
    """Raises ValueError for no prompts, or no completions of one."""
    if cfg.samples < 1:
        raise ValueError(f"evaluation.samples must be at least 1, not {cfg.samples}")
    if cfg.prompts is not None and cfg.prompts < 1:
        raise ValueError(f"evaluation.prompts must be at least 1, or null for all, not {cfg.prompts}")


def check_evaluate(cfg: EvaluateConfig) -> None:
    """Raises ValueError for settings of `opd evaluate` that cannot be had together, or would be ignored."""
    if cfg.teachers.signal is not SignalKind.hidden_states:
        raise ValueError("opd evaluate always compares whole distributions, so teachers.signal would be ignored: remove it")
    check_evaluated({name: domain for name, domain in cfg.domains.items() if name not in cfg.retention})
    too_large = [k for k in cfg.pass_k if not 1 <= k <= cfg.evaluation.samples]
    if too_large:
        raise ValueError(f"pass_k={too_large[0]} takes as many completions of a prompt: it must be from 1 to evaluation.samples={cfg.evaluation.samples}")
    unknown = [name for name in cfg.retention if name not in cfg.domains]
    if unknown:
        raise ValueError(f"retention names {unknown[0]}, which is none of the domains: add it, as in +domain={unknown[0]}")
    if cfg.retention and cfg.base.model is None:
        raise ValueError("retention compares the student with its base, and there is none: set base.model")
    bounded = list(cfg.retention) + ([name for name in cfg.domains if name not in cfg.retention] if cfg.accept.minimum_recovery is not None else [])
    without = [name for name in bounded if cfg.domains[name].held_out.path is None]
    if without:
        raise ValueError(f"{without[0]} has no held-out prompts, so that nobody knows how good a checkpoint is at it: set domains.{without[0]}.held_out.path")
    if cfg.evaluation.every:
        raise ValueError("evaluation.every belongs to runs that train, and would be ignored: remove it (follow=true evaluates checkpoints as they come)")
    if cfg.run is None:
        _check_without_run(cfg)
        return
    is_steps = isinstance(cfg.checkpoints, list) and cfg.checkpoints and all(type(step) is int and step >= 0 for step in cfg.checkpoints)
    if cfg.checkpoints not in ("newest", "all") and not is_steps:
        raise ValueError(f"checkpoints must be newest, all or a list of steps, as in [100,200], not {cfg.checkpoints}")
    drop = cfg.accept.maximum_retention_drop
    if drop is not None and not -1 <= drop <= 1:
        raise ValueError(f"accept.maximum_retention_drop must be {INTERVALS['maximum_retention_drop']}, not {drop}")
    if cfg.checkpoints != "all" and cfg.accept != AcceptConfig():
        raise ValueError("accept chooses among all checkpoints of a run: checkpoints=all belongs to it")
    if cfg.student.model is not None:
        raise ValueError(f"student.model would be ignored, since the checkpoints of {cfg.run} are evaluated: remove it, or the run")
    if cfg.lm_eval.tasks:
        raise ValueError("lm_eval.tasks are scored of one model: write opd evaluate student.model=RUN@STEP lm_eval.tasks=[...]")
    if cfg.follow and cfg.checkpoints != "all":
        raise ValueError("follow=true waits for checkpoints that are not there yet, so checkpoints=all belongs to it")
    if drop is not None and not cfg.retention:
        raise ValueError("accept.maximum_retention_drop bounds nothing without retention: write retention=[NAME], of a domain that the run does not distil")


def _check_without_run(cfg: EvaluateConfig) -> None:
    """What belongs to a run is refused without one."""
    own = EvaluateConfig()
    for name in ("checkpoints", "follow", "accept"):
        if getattr(cfg, name) != getattr(own, name):
            raise ValueError(f"{name} belongs to the checkpoints of a run: write it behind the command, as in opd evaluate RUN {name}=...")


def settings_of_run(stored: dict[str, Any], run: str) -> dict[str, Any]:
    """The settings of `opd evaluate RUN`, from RUN/config.yaml as it is stored: domains, sampling, and the model that the run began from as the base.

    All held-out prompts are taken, whatever the run takes while it trains. A run of `opd specialize` has no teachers: what a domain names as its teacher may be
    this very run.
    """
    samples_itself = "loss" in stored or stored.get("grpo", {}).get("num_steps")
    drawn = {name: stored["rollout"].get(name) for name in ("max_new_tokens", "decode_width")} if samples_itself else {}
    own = {name: value for name, value in stored["evaluation"].items() if name != "every"}
    evaluation = own | {name: own[name] or value for name, value in drawn.items()} | {"every": 0, "prompts": None}
    domains = stored["domains"]
    if "loss" not in stored:
        domains = {name: domain | {"teacher": {}} for name, domain in domains.items()}
    base = {field.name: stored["student"][field.name] for field in fields(ModelConfig)}
    teachers = {name: value for name, value in stored.get("teachers", {}).items() if name not in ("signal", "top_k")}
    return {
        "run": run, "run_dir": f"{run}/evaluations", "cache": f"{run}/evaluations/cache", "seed": stored["seed"], "threads": stored["threads"],
        "student": base | {"model": None, "revision": None}, "base": base, "domains": domains, "teachers": teachers, "evaluation": evaluation,
    }  # fmt: skip
