"""Settings of `opd evaluate` that ask for tasks of EleutherAI's lm_eval (opd/harness.py)."""

from dataclasses import dataclass, field
from enum import Enum

from rollout.config import ModelConfig


class HarnessRole(Enum):
    """student; base: where base.model is set; teachers: each of the domains'."""

    student = "student"
    base = "base"
    teachers = "teachers"


@dataclass(slots=True)
class HarnessConfig:
    """Tasks of lm_eval, beside the domains or in place of them.

    tasks: names of its tasks, groups or tags; none runs nothing.
    include_path: folder of your own tasks' YAML files; where it has all tasks that are named, those that come with lm_eval are not looked through.
    num_fewshot: answered examples before each question; null takes each task's own number.
    limit: documents of each task at most, the first ones; the figures are then marked as no result. null takes all.
    apply_chat_template: put each question into a user turn of the tokenizer's chat template.
    models: whom to score.
    """

    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    models: list[HarnessRole] = field(default_factory=lambda: [HarnessRole.student, HarnessRole.base])


def check_harness(cfg: HarnessConfig, base: ModelConfig, has_domains: bool) -> None:
    """Raises ValueError for settings that would be ignored, that are out of range, or that leave no model to score."""
    default = HarnessConfig()
    if not cfg.tasks:
        ignored = [name for name in ("include_path", "num_fewshot", "limit", "apply_chat_template", "models") if getattr(cfg, name) != getattr(default, name)]
        if ignored:
            raise ValueError(f"lm_eval.{ignored[0]} would be ignored without tasks: name them, as in lm_eval.tasks=[gsm8k], or remove it")
        return
    if len(set(cfg.tasks)) < len(cfg.tasks):
        raise ValueError(f"lm_eval.tasks names a task twice: {cfg.tasks}")
    if cfg.num_fewshot is not None and cfg.num_fewshot < 0:
        raise ValueError(f"lm_eval.num_fewshot must be at least 0, not {cfg.num_fewshot}")
    if cfg.limit is not None and cfg.limit < 1:
        raise ValueError(f"lm_eval.limit must be at least 1, not {cfg.limit}: null takes all documents")
    if not cfg.models:
        raise ValueError("lm_eval.models is empty: name student, base or teachers")
    if cfg.models != default.models and HarnessRole.base in cfg.models and base.model is None:
        raise ValueError("lm_eval.models names the base, and there is none: set base.model")
    if HarnessRole.teachers in cfg.models and not has_domains:
        raise ValueError("lm_eval.models names the teachers, and there are no domains to have any: add them, as in domain=[law]")
