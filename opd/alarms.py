"""Alarms: what a run's metrics look like when it goes wrong, written down, so that nobody has to watch the curves.

An alarm is a rule of opd/alarm_config.py (conf/alarms/standard.yaml has those that ship). It judges the mean of a metric over the last `window` steps that
have it: `D` in its name stands for any domain, each of which is judged for itself. A mean that meets the condition begins an episode, and its action is done
once; the episode is over when the condition has not been met for CALM_STEPS judgements in a row, so that a figure that hovers at its threshold does not fill
the log. `alarms/active` counts the episodes, over all alarms and domains.

What is judged is the record, metrics.jsonl, and nothing else: a run that is taken up reads its own lines again (`replay`), begins where it stopped,
and repeats no line: one that an alarm has stopped goes on when it is started again, and is stopped by the next episode. Where steps are done again, their
discarded lines show which episodes began in them, and these tell nobody a second time. Only the main rank judges.
"""

import copy
import logging
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from opd.alarm_config import HALVES, AlarmAction, AlarmCondition, AlarmRule
from opd.config import DistillConfig, RunConfig, rollout_settings
from rollout.config import Dtype
from teachers.config import SignalKind

START_STEPS = 5
"""Steps that say what a metric was like at the start: one alone is noise at a hundred rollouts."""

CALM_STEPS = 5
"""Judgements without the condition that end an episode."""

LOG = logging.getLogger(__name__)


MISMATCH = 1e-3
"""Nats per token between a sampler and a trainer that compute the same in float32, where rounding leaves 1e-9."""

ROUGH_MISMATCH = 1e-2
"""The same where they are bound to differ: rounding of bfloat16, or an update between them (rollout.staleness=1)."""

NEAR_ONE = 0.9
"""A share that is flat from here on has little left to rise."""

FLAT = 0.01
"""A share that rises by less over half a window is flat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """What began: the name of the alarm, the metric and its mean, what is to be done, and the line for people.

    is_told: whether it was told before the run was taken up at an earlier step.
    """

    alarm: str
    metric: str
    value: float
    action: AlarmAction
    line: str
    is_told: bool = False


def rules_of(cfg: RunConfig) -> dict[str, AlarmRule]:
    """The alarms of a run. Replayed rollouts are another student's, whose distance is no fault; estimates of a divergence may be negative."""
    rollout = rollout_settings(cfg)
    rules = dict(cfg.alarms.rules) if cfg.alarms.enabled else {}
    is_replayed = rollout is None or rollout.replay is not None
    is_estimate = isinstance(cfg, DistillConfig) and (cfg.teachers.signal is SignalKind.sampled_token or cfg.loss.policy_gradient)
    for name, rule in cfg.alarms.rules.items() if cfg.alarms.enabled else ():
        is_of_sampler = rule.metric in ("domain/D/mismatch_kl", "domain/D/mismatch_p99", "domain/D/mismatch_max")
        is_of_sign = rule.metric == "domain/D/kl_per_token" and rule.condition is AlarmCondition.below
        if (is_of_sampler and is_replayed) or (is_of_sign and is_estimate):
            del rules[name]
        elif rule.threshold is None:
            is_exact = cfg.student.dtype is Dtype.float32 and rollout.staleness == 0
            rules[name] = replace(rule, threshold=MISMATCH if is_exact else ROUGH_MISMATCH)
    return rules


@dataclass(slots=True)
class Series:
    """What one alarm has seen of one metric: first values, the last (value, what it is held against), and the episode it is in."""

    recent: deque[tuple[float, float]]
    first: list[float] = field(default_factory=list)
    is_active: bool = False
    calm: int = 0


class Alarms:
    """Judges the metrics of one step after the other."""

    def __init__(self, rules: dict[str, AlarmRule]):
        self.rules = rules
        self.patterns = {name: re.compile(re.escape(rule.metric).replace("/D/", "/([^/]+)/")) for name, rule in rules.items()}
        self.series: dict[tuple[str, str], Series] = {}
        self.begun: list[Episode] = []
        self.told: set[tuple[int, str, str]] = set()

    def observe(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Judge a step's metrics and log what begins, which then stands in `begun`; returns {"alarms/active": episodes}."""
        self.begun = [replace(episode, is_told=(step, episode.alarm, episode.metric) in self.told) for episode in self._judge(metrics)]
        for episode in self.begun:
            LOG.warning("alarm at step %d: %s", step, episode.line)
        return {"alarms/active": sum(series.is_active for series in self.series.values())}

    def replay(self, records: Iterable[dict[str, float]], discarded: Iterable[dict[str, float]] = ()) -> None:
        """Take up where these records end; what began in them has been logged, and done. discarded: those after them, whose steps will be done again."""
        self.series = {}
        for record in records:
            if record["step"]:
                self._judge(record)
        ahead = Alarms(self.rules)
        ahead.series = copy.deepcopy(self.series)
        self.told = {(record["step"], episode.alarm, episode.metric) for record in discarded if record["step"] for episode in ahead._judge(record)}

    def _judge(self, metrics: dict[str, float]) -> list[Episode]:
        """The episodes that these metrics begin."""
        begun = []
        for alarm, rule in self.rules.items():
            names = [name for name in metrics if self.patterns[alarm].fullmatch(name)]
            units = {name: self._add(alarm, name, metrics) for name in names}  # of all domains, before one is held against the others
            for name in names:
                found = _next(rule, name, units[name], self.series[alarm, name], self._others(alarm, name))
                begun += [Episode(alarm=alarm, metric=name, value=found[0], action=rule.action, line=found[1])] if found is not None else []
        return begun

    def _add(self, alarm: str, name: str, metrics: dict[str, float]) -> str | None:
        """Add one step to a series; the name of what it is held against, None where there is nothing to judge."""
        rule = self.rules[alarm]
        series = self.series.setdefault((alarm, name), Series(deque(maxlen=rule.window)))
        unit, unit_name = _unit(rule, name, metrics, series)
        if unit is not None:
            series.recent.append((metrics[name], unit))
        return unit_name if unit is not None and len(series.recent) == rule.window else None

    def _others(self, alarm: str, metric: str) -> list[Series]:
        """What the same alarm has seen of the other domains."""
        return [series for (name, other), series in self.series.items() if name == alarm and other != metric]


def _next(rule: AlarmRule, name: str, unit_name: str | None, series: Series, others: list[Series]) -> tuple[float, str] | None:
    """Judge a series; the mean and the line to log where an episode begins."""
    if unit_name is None:
        return None
    value, unit = _means(list(series.recent))
    is_met, against = _holds(rule, series, others) if rule.condition in HALVES else _exceeds(rule, value, unit, unit_name)
    begins = is_met and not series.is_active
    series.calm = 0 if is_met else series.calm + 1
    series.is_active = is_met or (series.is_active and series.calm < CALM_STEPS)
    over = f" over {rule.window} steps" if rule.window > 1 else ""
    return (value, f"{name} is {value:.3g}{over}, {against}: {rule.message}") if begins else None


def _exceeds(rule: AlarmRule, value: float, unit: float, unit_name: str) -> tuple[bool, str]:
    """Whether a mean is on the wrong side of its limit, and what that is in words."""
    if rule.condition is AlarmCondition.equal:
        return max(value, unit) >= rule.least and abs(value - unit) <= rule.threshold * unit, f"as {unit_name} ({unit:.3g})"
    is_below, limit = rule.condition is AlarmCondition.below, rule.threshold * unit
    against = f"{rule.threshold:g}" if not unit_name else f"{rule.threshold:g} x {unit_name} ({unit:.3g})"
    is_large = rule.least == 0 or max(value, unit if unit_name else 0.0) >= rule.least
    return is_large and (value < limit if is_below else value > limit), f"{'below' if is_below else 'above'} {against}"


def _holds(rule: AlarmRule, series: Series, others: list[Series]) -> tuple[bool, str]:
    """Whether the later half of a window differs from the earlier as the condition says, and that in words."""
    (before, held_before), (after, held_after) = _halves(series)
    if rule.condition is AlarmCondition.falling_while_flat:
        is_flat = held_after < NEAR_ONE and held_after - held_before < FLAT
        falls = before >= rule.least and after < rule.threshold * before
        return is_flat and falls, f"down from {before:.3g} while {rule.relative_to} stays at {held_after:.3g}"
    if rule.condition is AlarmCondition.falling:
        return before >= rule.least and after < rule.threshold * before, f"down from {before:.3g}"
    full = [_halves(other) for other in others if len(other.recent) == rule.window]
    falls = bool(full) and sum(second[0] for _, second in full) < sum(first[0] for first, _ in full)
    return falls and after >= rule.least and after > rule.threshold * before, f"up from {before:.3g} while the other domains fall"


def _halves(series: Series) -> tuple[tuple[float, float], tuple[float, float]]:
    """The means of the earlier and of the later half."""
    values = list(series.recent)
    middle = len(values) // 2
    return _means(values[:middle]), _means(values[middle:])


def _means(values: list[tuple[float, float]]) -> tuple[float, float]:
    first, second = (sum(column) / len(values) for column in zip(*values, strict=True))
    return first, second


def _unit(rule: AlarmRule, name: str, metrics: dict[str, float], series: Series) -> tuple[float | None, str]:
    """(what the threshold is multiplied by, or what is to rise or differ, its name): 1 with an empty name, or None where it is not known at this step."""
    if rule.relative_to is not None:
        other = rule.relative_to.replace("/D/", f"/{name.split('/')[1]}/")
        return metrics.get(other), other
    if rule.condition is not AlarmCondition.ratio_to_start:
        return 1.0, ""
    if len(series.first) < START_STEPS:
        series.first.append(metrics[name])
        return None, ""
    return sum(series.first) / START_STEPS, "its mean at the start"
