"""Alarms: what a run's metrics look like when it goes wrong, written down, so that nobody has to watch the curves.

An alarm is a rule of opd/alarm_config.py (conf/alarms/standard.yaml has those that ship). It judges the mean of a metric over the last `window` steps that
have it: `D` in its name stands for any domain, each of which is judged for itself (so do the other letters of opd/metrics.py). A mean that meets the condition
begins an episode, and its action is done once; the episode is over when the condition has not been met for CALM_STEPS judgements in a row, so that a figure
that hovers at its threshold does not fill the log. `alarms/active` counts the episodes, over all alarms and domains.

Conditions that hold the later half of a window against the earlier want more than the threshold, since two means of ten noisy steps often differ by half: the
halves have to differ clearly in rank (Mann and Whitney 1947, "On a test of whether one of two random variables is stochastically larger than the other"), which
those of a figure that grows ever faster do as well as those of one that leaps. Steps count as independent there; a figure that wanders may still meet it.

What is judged is the record, metrics.jsonl, and nothing else: a run that is taken up reads its own lines again (`replay`), begins where it stopped,
and repeats no line: one that an alarm has stopped goes on when it is started again, and is stopped by the next episode. Only the main rank judges; whom
an episode tells, and that it tells nobody twice, is opd/alarm_actions.py's.
"""

import logging
import math
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from opd.alarm_config import HALVES, LETTER, PHASES, AlarmAction, AlarmCondition, AlarmRule
from opd.config import DistillConfig, RunConfig, rollout_settings
from rollout.config import Dtype
from teachers.config import SignalKind

START_STEPS = 5
"""Steps that say what a metric was like at the start: one alone is noise at a hundred rollouts."""

CALM_STEPS = 5
"""Judgements without the condition that end an episode."""

CLEAR = 2.6
"""Standard deviations of Mann and Whitney's U by which the halves of a window differ clearly; two halves of five can just do so."""

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
    """What began: the name of the alarm, the metric and its mean, what is to be done, and the line for people. Of halves it is the later one's mean."""

    alarm: str
    metric: str
    value: float
    action: AlarmAction
    line: str


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
        self.patterns = {name: _pattern(rule.metric) for name, rule in rules.items()}
        self.series: dict[tuple[str, str], Series] = {}
        self.begun: list[Episode] = []
        self.replayed: set[tuple[int, str, str]] = set()

    def observe(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Judge a step's metrics and log what begins, which then stands in `begun`; returns {"alarms/active": episodes}."""
        self.begun = self._judge(metrics)
        for episode in self.begun:
            LOG.warning("alarm at step %d: %s", step, episode.line)
        return {"alarms/active": sum(series.is_active for series in self.series.values())}

    def replay(self, records: Iterable[dict[str, float]]) -> None:
        """Take up where these records end; what began in them has been logged, and done, and stands in `replayed` as (step, alarm, metric)."""
        self.series, self.replayed = {}, set()
        for record in records:
            if record["step"]:
                self.replayed |= {(record["step"], episode.alarm, episode.metric) for episode in self._judge(record)}

    def _judge(self, metrics: dict[str, float]) -> list[Episode]:
        """The episodes that these metrics begin."""
        begun = []
        for alarm, rule in self.rules.items():
            matches = {name: self.patterns[alarm].fullmatch(name) for name in metrics}
            units = {  # of all domains, before one is held against the others
                name: self._add(alarm, name, metrics, match.groupdict()) for name, match in matches.items() if match is not None
            }
            for name in units:
                found = _next(rule, name, units[name], self.series[alarm, name], self._others(alarm, name))
                begun += [Episode(alarm=alarm, metric=name, value=found[0], action=rule.action, line=found[1])] if found is not None else []
        return begun

    def _add(self, alarm: str, name: str, metrics: dict[str, float], letters: dict[str, str]) -> str | None:
        """Add one step to a series; the name of what it is held against, None where there is nothing to judge. letters: what they stand for in the name."""
        rule = self.rules[alarm]
        series = self.series.setdefault((alarm, name), Series(deque(maxlen=rule.window)))
        unit, unit_name = _unit(rule, metrics[name], metrics, series, letters)
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
    if rule.condition in HALVES:
        value, (is_met, against) = _halves(series)[1].mean, _holds(rule, unit_name, series, others)
    else:
        value, unit = _means(list(series.recent))
        is_met, against = _exceeds(rule, value, unit, unit_name)
    begins = is_met and not series.is_active
    series.calm = 0 if is_met else series.calm + 1
    series.is_active = is_met or (series.is_active and series.calm < CALM_STEPS)
    steps = f"{rule.window - rule.window // 2} of {rule.window}" if rule.condition in HALVES else str(rule.window)
    over = f" over {steps} steps" if rule.window > 1 else ""
    return (value, f"{name} is {value:.3g}{over}, {against}: {rule.message}") if begins else None


def _exceeds(rule: AlarmRule, value: float, unit: float, unit_name: str) -> tuple[bool, str]:
    """Whether a mean is on the wrong side of its limit, and what that is in words."""
    if rule.condition is AlarmCondition.equal:
        return max(value, unit) >= rule.least and abs(value - unit) <= rule.threshold * unit, f"as {unit_name} ({unit:.3g})"
    is_below, limit = rule.condition is AlarmCondition.below, rule.threshold * unit
    against = f"{rule.threshold:g}" if not unit_name else f"{rule.threshold:g} x {unit_name} ({unit:.3g})"
    is_large = rule.least == 0 or max(value, unit if unit_name else 0.0) >= rule.least
    return is_large and (value < limit if is_below else value > limit), f"{'below' if is_below else 'above'} {against}"


@dataclass(frozen=True, slots=True)
class Half:
    """Of half a window: the values of the metric, their mean, and the mean of what it is held against."""

    values: list[float]
    mean: float
    held: float


def _holds(rule: AlarmRule, unit_name: str, series: Series, others: list[Series]) -> tuple[bool, str]:
    """Whether the later half of a window differs from the earlier as the condition says, and that in words."""
    before, after = _halves(series)
    rise = _rank_difference(before.values, after.values)
    if rule.condition is AlarmCondition.rising_alone:
        full = [_halves(other) for other in others if len(other.recent) == rule.window]
        others_fall = bool(full) and sum(second.mean for _, second in full) < sum(first.mean for first, _ in full)
        rises = rise > CLEAR and after.mean >= rule.least and after.mean > rule.threshold * before.mean
        return others_fall and rises, f"up from {before.mean:.3g} while the other domains fall"
    falls = rise < -CLEAR and before.mean >= rule.least and after.mean < rule.threshold * before.mean
    if rule.condition is AlarmCondition.falling:
        return falls, f"down from {before.mean:.3g}"
    is_flat = after.held < NEAR_ONE and after.held - before.held < FLAT
    return falls and is_flat, f"down from {before.mean:.3g} while {unit_name} stays at {after.held:.3g}"


def _halves(series: Series) -> tuple[Half, Half]:
    """The earlier and the later half."""
    values = list(series.recent)
    middle = len(values) // 2
    return _half(values[:middle]), _half(values[middle:])


def _half(values: list[tuple[float, float]]) -> Half:
    return Half([value for value, _ in values], *_means(values))


def _rank_difference(before: list[float], after: list[float]) -> float:
    """How much higher the later values rank: Mann and Whitney's U less its mean, in its standard deviations without ties; a pair that is equal counts half."""
    higher = sum((later > earlier) + 0.5 * (later == earlier) for earlier in before for later in after)
    pairs = len(before) * len(after)
    return (higher - pairs / 2) / math.sqrt(pairs * (len(before) + len(after) + 1) / 12)


def _means(values: list[tuple[float, float]]) -> tuple[float, float]:
    first, second = (sum(column) / len(values) for column in zip(*values, strict=True))
    return first, second


def _pattern(metric: str) -> re.Pattern[str]:
    """The names that a metric with letters stands for; each letter is a group of that name."""
    return re.compile(LETTER.sub(lambda found: f"(?P<{found[0]}>{PHASES if found[0] == 'PHASE' else '[^/]+'})", re.escape(metric)))


def _unit(rule: AlarmRule, value: float, metrics: dict[str, float], series: Series, letters: dict[str, str]) -> tuple[float | None, str]:
    """(what the threshold is multiplied by, or what is to rise or differ, its name): 1 with an empty name, or None where it is not known at this step."""
    if rule.relative_to is not None:
        other = LETTER.sub(lambda found: letters[found[0]], rule.relative_to)
        return metrics.get(other), other
    if rule.condition is not AlarmCondition.ratio_to_start:
        return 1.0, ""
    if len(series.first) < START_STEPS:
        series.first.append(value)
        return None, ""
    return sum(series.first) / START_STEPS, "its mean at the start"
