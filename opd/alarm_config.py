"""Typed settings of the alarms (opd/alarms.py): one list of rules, by name. Those that ship stand in conf/alarms/standard.yaml."""

import ast
import re
import shlex
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path

from opd.errors import nearest


class AlarmCondition(Enum):
    """What the mean of a metric over the window is held against.

    above, below: the threshold, or the threshold times the mean of relative_to. ratio_to_start: above the threshold times the metric's own mean at the start.
    rising_alone: the later half of the window above the threshold times the earlier, while the other domains' mean falls.
    falling: the later half of the window below the threshold times the earlier.
    falling_while_flat: falling, while relative_to, not yet near 1, does not rise.
    equal: no further from relative_to than the threshold times relative_to.
    """

    above = "above"
    below = "below"
    ratio_to_start = "ratio_to_start"
    rising_alone = "rising_alone"
    falling = "falling"
    falling_while_flat = "falling_while_flat"
    equal = "equal"


class AlarmAction(Enum):
    """log: one line. alert: W&B's alert and alarms.command as well. stop: and the run saves and ends, with exit code 3."""

    log = "log"
    alert = "alert"
    stop = "stop"


LETTER = re.compile(r"(?<=[/_])(D|T|U|LL|PHASE)(?=/|$)")
"""What stands for any domain, teacher, second teacher, layer or phase in the name of a metric."""
PHASES = "data|rollout|score|update"
"""What PHASE stands for: other names may stand in its place (seconds/step)."""
LEAST_HALVES = 10
"""Steps in the shortest window whose halves can differ clearly (opd/alarms.py)."""
OF_STEP_0 = ("data/", "check/", "warmup/")
"""Metrics of the record of step 0 alone, which is not judged."""
HALVES = (AlarmCondition.rising_alone, AlarmCondition.falling, AlarmCondition.falling_while_flat)
OF_TWO = (AlarmCondition.falling_while_flat, AlarmCondition.equal)


@dataclass(slots=True)
class AlarmRule:
    """One way in which a metric looks wrong.

    metric: a name of opd/metrics.py with its letters; D is any domain, each of which is judged for itself.
    condition: what it is held against.
    threshold: the number of the condition; null is for mismatch_kl alone, whose threshold follows from the number formats.
    relative_to: the metric by which the threshold is multiplied, or which is to rise, or to differ; D is the same domain. Only steps that have both
        count.
    least: of the mean and what it is a multiple of, the larger has to reach this: ratios of next to nothing say nothing.
    window: steps whose mean is judged; fewer are not. Conditions of halves want 10 or more, of which the halves can differ by more than noise.
    action: what is done when an episode begins.
    message: what it is a sign of, and what helps.
    """

    metric: str = ""
    condition: AlarmCondition = AlarmCondition.above
    threshold: float | None = None
    relative_to: str | None = None
    least: float = 0.0
    window: int = 5
    action: AlarmAction = AlarmAction.log
    message: str = ""


@dataclass(slots=True)
class AlarmsConfig:
    """What a run watches its own metrics for.

    enabled: judge the metrics of each step.
    command: run once for each episode whose action is alert or stop, without a shell, with OPD_ALARM, OPD_METRIC, OPD_VALUE, OPD_STEP, OPD_RUN and OPD_LINE
        in its environment; the run does not wait for it.
    rules: the alarms by name; `~alarms.rules.NAME` drops one, `alarms.rules.NAME.action=stop` changes one, `+alarms.rules.NAME={metric: M, threshold: T}`
        adds one.
    """

    enabled: bool = True
    command: str | None = None
    rules: dict[str, AlarmRule] = field(default_factory=dict)


def check_alarms(cfg: AlarmsConfig) -> None:
    """Raises ValueError for rules that could never fire, or say nothing."""
    if cfg.command is not None and not _words(cfg.command):
        raise ValueError(f"alarms.command={cfg.command!r} is no command: write a program and its arguments, in quotes that close")
    for name, rule in cfg.rules.items():
        where = f"alarms.rules.{name}"
        for key, metric in (("metric", rule.metric), ("relative_to", rule.relative_to)):
            if metric is not None and metric not in documented_metrics():
                raise ValueError(f"{where}.{key}={metric!r} is no metric{nearest(metric, sorted(documented_metrics()))}: opd/metrics.py lists them")
            if metric is not None and metric.startswith(OF_STEP_0):
                raise ValueError(f"{where}.{key}={metric!r} is measured before the first step alone, which no alarm judges: choose a metric of the steps")
        unknown = set(LETTER.findall(rule.relative_to or "")) - set(LETTER.findall(rule.metric))
        if unknown:
            raise ValueError(f"{where}.relative_to={rule.relative_to!r} has a letter that {rule.metric} has not ({min(unknown)}), so it names no one metric")
        least = LEAST_HALVES if rule.condition in HALVES else 1
        if rule.window < least:
            raise ValueError(f"{where}.window must be at least {least}, not {rule.window}")
        if rule.threshold is None and rule.metric != "domain/D/mismatch_kl":
            raise ValueError(f"{where} has no threshold: set {where}.threshold")
        if rule.condition is AlarmCondition.rising_alone and "/D/" not in rule.metric:
            raise ValueError(f"{where} compares domains, and {rule.metric} is of none: choose a metric with D in it, or another condition")
        if rule.condition in OF_TWO and rule.relative_to is None:
            raise ValueError(f"{where} needs relative_to, the metric that ought to {'differ' if rule.condition is AlarmCondition.equal else 'rise'}")


@cache
def documented_metrics() -> frozenset[str]:
    """The names that the docstring of opd/metrics.py lists, with their letters (domain/D/looped); read from its source, since importing it imports torch."""
    text = ast.get_docstring(ast.parse(Path(__file__).with_name("metrics.py").read_text())) or ""
    found, prefix = set(), ""
    for line in text.splitlines():
        is_head = re.match(r"    [a-z]+/", line)
        listed = re.match(r"\s+([\w/]+(?:, [\w/]+)*)", re.sub(r" \([^)]*\)", "", line))
        for word in listed[1].split(", ") if listed and (is_head or "_" in listed[1].split(", ")[0]) else ():
            prefix = word.rpartition("/")[0] if "/" in word else prefix
            found.add(word if "/" in word else f"{prefix}/{word}")
    return frozenset(found)


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:
        return []
