"""Settings of `opd evaluate` through EleutherAI's evaluation harness (opd/harness.py)."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class HarnessConfig:
    """lm_eval beside the domains' own held-out prompts; `pip install -e '.[eval]'`.

    tasks: names of its tasks or groups; none leaves it out.
    include_path: folder of task files of your own.
    num_fewshot: examples before each question; null takes the task's own number.
    limit: documents of each task at most, for a trial: what comes out is then no result, and marked so.
    apply_chat_template: ask through the model's chat template.
    max_gen_toks: tokens of an answer at most, where the task does not say.
    decode_width: rows decoded together.
    """

    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    max_gen_toks: int = 256
    decode_width: int = 64


def check_harness(cfg: HarnessConfig) -> None:
    """Raises ValueError for numbers out of range, and settings that would be ignored."""
    if not cfg.tasks and cfg != HarnessConfig():
        raise ValueError("settings of lm_eval would be ignored without tasks: set lm_eval.tasks=[NAME], or remove them")
    for name, number, least in (("limit", cfg.limit, 1), ("num_fewshot", cfg.num_fewshot, 0), ("max_gen_toks", cfg.max_gen_toks, 1)):
        if number is not None and number < least:
            raise ValueError(f"lm_eval.{name} must be at least {least}, not {number}")
