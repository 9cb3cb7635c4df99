"""What may change when a run is taken up. Each setting is free, recorded or refused:

    free        decides nothing that is learnt: where and how fast things are computed, how often is saved, what is shown (FREE)
    recorded    changes what is measured, the length of the run, the rounding of a sum, or which faulty rollouts and steps are left out (RECORDED)
    refused     everything else; branch_from starts a run of its own with other settings. Settings under `domains` are recorded with
                teachers.allow_change=true (teachers/manifest.py keeps their history)

Every difference is printed when the run has been taken up; RUN/config.yaml then holds the present settings, and what was recorded stands in
RUN/changes.jsonl (schema version 1), a line each: {"schema": 1, "step": updates done, "start": which line of starts.jsonl (opd/run_facts.py) made it,
from 0, "setting": NAME, "before": VALUE, "after": VALUE}; a setting that was not there is null, and `start` is not there in a file of an earlier version.
"""

import json
import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from rollout.files import read_lines, replace_text
from teachers.config import RUNNING_SETTINGS

SCHEMA = 1
FILE = "changes.jsonl"

FREE = (
    "fresh", "threads", "logger", "checkpoint", "launch", "profile", "run_dir", "check", "alarms", "samples", "rehearse", "rollout.vllm", "rollout.service",
    *(f"teachers.{name}" for name in RUNNING_SETTINGS),
)  # fmt: skip

RECORDED = (
    "num_steps", "grpo.num_steps", "evaluation",
    "rollout.save", "rollout.compare", "rollout.decode_width", "rollout.fixed_width", "teachers.max_tokens_per_forward",
    "batch.max_tokens_per_micro_batch", "student.gradient_checkpointing", "student.router_probe_every", "optim.update_ratio_every",
    "quant.measure_every", "quant.measure_rollouts", "deepspeed.zero_optimization",
    "optim.max_skipped_steps", "rollout.max_mismatch", "rollout.mask_loops",
)  # fmt: skip
"""num_steps and grpo.num_steps stretch the learning-rate schedule from the next step on."""

NOTHING = object()


class Rule(Enum):
    free = "free"
    recorded = "recorded"
    refused = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A setting that differs. before, after: plain values, NOTHING where there is none."""

    setting: str
    before: Any
    after: Any
    rule: Rule

    def __str__(self) -> str:
        if self.setting.count(".") == 1 and self.setting.startswith("domains.") and NOTHING in (self.before, self.after):
            return f"{self.setting} is {'new' if self.before is NOTHING else 'gone'}"
        if self.setting == "domains":
            return f"domains were {', '.join(self.before)} and are {', '.join(self.after)}, in this order"
        return f"{self.setting} was {_text(self.before)} and is {_text(self.after)}"

    def record(self, step: int, start: int) -> dict[str, Any]:
        """Its line in RUN/changes.jsonl."""
        before, after = (None if value is NOTHING else value for value in (self.before, self.after))
        return {"schema": SCHEMA, "step": step, "start": start, "setting": self.setting, "before": before, "after": after}


def read_changes(folder: Path) -> list[dict[str, Any]]:
    """What was recorded in a run's changes.jsonl, oldest first; a line that a kill has cut is left out."""
    return read_lines(folder / FILE)


def lasting_changes(changes: list[dict[str, Any]], starts: list[int]) -> list[dict[str, Any]]:
    """The changes that held for steps that count, in order of these. changes: as `read_changes` gives them; starts: the steps that the run's starts began at.

    A run that is taken up at an earlier step does those after it again, with the settings that it has by then: a change of a later step holds from there on.
    Changes of one setting at one step are one, and none where it came back to what it was.
    """
    joined, least, place = {}, math.inf, len(starts)
    for change in reversed(changes):
        step, setting = change["step"], change["setting"]
        earlier = (index for index, start in enumerate(starts[: place + 1]) if start == step)
        own = change["start"] if "start" in change else max(earlier, default=None)  # the start that made it
        if own is not None:
            least, place = min([least, *starts[own:place]]), own
        least = min(least, step)
        after = joined.pop((setting, least), change)["after"]
        joined[setting, least] = change | {"step": least, "after": after}
    return [change for change in reversed(joined.values()) if change["before"] != change["after"]]


def forget_unmade(folder: Path, config: dict[str, Any], start: int) -> None:
    """Take out of changes.jsonl what a start that was killed has recorded before config.yaml, which has `config`, said so. start: the next one's number."""
    changes, seen, made = read_changes(folder), set(), []
    for change in reversed(changes):
        setting = change["setting"]
        is_unmade = change.get("start") == start and setting not in seen and _value_of(config, setting) != change["after"]
        seen.add(setting)
        made += [] if is_unmade else [change]
    if len(made) < len(changes):
        replace_text(folder / FILE, "".join(json.dumps(change) + "\n" for change in reversed(made)))


def _value_of(config: dict[str, Any], setting: str) -> Any:
    """What a recorded change of a setting has: of all domains their names."""
    value: Any = config
    for key in setting.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return list(value) if setting == "domains" else value


def find_changes(old: dict[str, Any], new: dict[str, Any], may_change_domains: bool, path: str = "") -> list[Change]:
    """The settings that differ between two configs of plain values, by name; a domain that came or went is one change."""
    found = []
    for key in sorted({*old, *new}):
        name, before, after = f"{path}{key}", old.get(key, NOTHING), new.get(key, NOTHING)
        if isinstance(before, dict) and isinstance(after, dict):
            inner = find_changes(before, after, may_change_domains, name + ".")
            if name == "domains" and not inner and list(before) != list(after):  # it decides which prompts a step draws
                inner = [Change(setting=name, before=list(before), after=list(after), rule=_rule(name, may_change_domains))]
            found += inner
        elif before != after:
            rule = Rule.free if _is_new_address(name, before, after) else _rule(name, may_change_domains)
            found.append(Change(setting=name, before=before, after=after, rule=rule))
    return found


def _rule(name: str, may_change_domains: bool) -> Rule:
    def is_in(settings: tuple[str, ...]) -> bool:
        return any(name == setting or name.startswith(f"{setting}.") for setting in settings)

    if is_in(FREE):
        return Rule.free
    return Rule.recorded if is_in(RECORDED) or (may_change_domains and is_in(("domains",))) else Rule.refused


def _is_new_address(name: str, before: Any, after: Any) -> bool:
    """Whether a teacher's server has moved; that it holds the same model is seen when the run is taken up (teachers/manifest.py)."""
    return name.startswith("domains.") and name.endswith(".teacher.server") and not {None, NOTHING} & {before, after}


def _text(value: Any) -> str:
    return "absent" if value is NOTHING else json.dumps(value)
