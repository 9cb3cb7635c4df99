"""Settings of `opd merge`: which models become one by arithmetic on their weights."""

import math
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from rollout.config import ModelConfig, SamplingConfig
from teachers.config import DomainConfig


class MergeKind(Enum):
    """task_arithmetic: the base plus scale times the sum of the teachers' differences from it (arXiv:2212.04089). ties: the same of the mean of those
    differences that are large, and of the sign that most weight has, in each place (arXiv:2306.01708). average: the mean of the teachers' weights.
    """

    average = "average"
    task_arithmetic = "task_arithmetic"
    ties = "ties"


@dataclass(slots=True)
class MergeConfig:
    """`opd merge`: all domains' teachers as one model, without training.

    run_dir: folder for student/, merge.json and the resolved configuration.
    seed: key of every random choice; only the answers that are graded have any.
    threads: CPU threads of this process; null chooses.
    base: the model that the teachers were made from.
    domains: whose teachers are merged; of each, the training prompts and the grader choose among several settings.
    kind: how.
    scales: what the differences are multiplied by; of several, the one whose model does best is kept.
    densities: of ties, the share of each weight's places that is kept; of several likewise.
    prompts: training prompts of each domain that a setting is judged on, where there are several.
    rollout: how these are answered.
    """

    run_dir: str = "runs/merge"
    seed: int = 0
    threads: int | None = None
    base: ModelConfig = field(default_factory=ModelConfig)
    domains: dict[str, DomainConfig] = field(default_factory=dict)
    kind: MergeKind = MergeKind.task_arithmetic
    scales: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0])
    densities: list[float] = field(default_factory=lambda: [0.2, 0.5])
    prompts: int = 64
    rollout: SamplingConfig = field(default_factory=SamplingConfig)


def merge_of_run(stored: dict[str, Any], run: str) -> dict[str, Any]:
    """The settings of `opd merge RUN`, from RUN/config.yaml as it is stored: the run's teachers, added to the model that the run began from."""
    base = {field.name: stored["student"][field.name] for field in fields(ModelConfig)}
    drawn = {name: stored["rollout"][name] for name in ("max_new_tokens", "decode_width")}
    own = {name: stored[name] for name in ("seed", "threads", "domains")}
    return own | {"run_dir": f"{run}/merge", "base": base, "rollout": drawn}


def check_merge(cfg: MergeConfig) -> None:
    """Raises ValueError for settings that are out of range or would be ignored."""
    default = MergeConfig()
    for name, value in (("scales", cfg.scales), ("densities", cfg.densities)):
        if not value or not all(0 < number < math.inf for number in value):
            raise ValueError(f"{name} must be numbers above 0, and one at least, not {value}")
    if not all(density < 1 for density in cfg.densities):
        raise ValueError(f"densities must be below 1, not {cfg.densities}: with all places kept, use kind=task_arithmetic")
    if cfg.kind is MergeKind.average and cfg.scales != default.scales:
        raise ValueError("scales would be ignored with kind=average, which has none: remove them, or use kind=task_arithmetic")
    if cfg.kind is not MergeKind.ties and cfg.densities != default.densities:
        raise ValueError(f"densities belong to kind=ties and would be ignored with kind={cfg.kind.value}: remove them")
    if cfg.prompts < 1:
        raise ValueError(f"prompts must be at least 1, not {cfg.prompts}")
