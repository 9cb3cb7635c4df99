"""Alarms: what a run's metrics look like when it goes wrong, written down, so that nobody has to watch the curves.

An alarm judges the mean of a metric over the last `window` steps that have it: `D` in its name stands for any domain, each of which is judged for itself. A
mean that meets the condition begins an episode, and one line is logged; the episode is over when the condition has not been met for CALM_STEPS judgements
in a row, so that a figure that hovers at its threshold does not fill the log. `alarms/active` counts the episodes, over all alarms and domains.

    above, below     the mean against the threshold, or against the threshold times the mean of another metric (`relative_to`)
    ratio_to_start   the mean above the threshold times the metric's mean over its first START_STEPS steps

What is judged is the record, metrics.jsonl, and nothing else: a run that is taken up reads its own lines again (`replay`), begins where it stopped,
and repeats no line. Only the main rank judges. `standard_alarms` are the failures of multi-teacher distillation that are known to show early; their
thresholds are rules of thumb from published runs, so nothing is stopped: they log.
"""

import logging
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from opd.config import RunConfig, rollout_settings
from rollout.config import Dtype

START_STEPS = 5
"""Steps that say what a metric was like at the start: one alone is noise at a hundred rollouts."""

CALM_STEPS = 5
"""Judgements without the condition that end an episode."""

LOG = logging.getLogger(__name__)


class Condition(Enum):
    """What a metric is held against."""

    above = "above"
    below = "below"
    ratio_to_start = "ratio_to_start"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One way in which a metric looks wrong.

    metric: a name of opd/metrics.py; `D` is any domain.
    condition, threshold: see above.
    relative_to: the metric by which the threshold is multiplied; `D` is the same domain.
    least: of the mean and what it is a multiple of, the larger has to reach this: ratios of next to nothing say nothing.
    window: steps whose mean is judged; fewer are not.
    message: what it is a sign of, and what helps.
    """

    metric: str
    condition: Condition
    threshold: float
    relative_to: str | None = None
    least: float = 0.0
    window: int = 5
    message: str


LENGTH = "compare answers with the teacher's by eye, and their end-of-sequence token and template with `opd check`"

STANDARD_ALARMS = (
    Alarm(
        metric="domain/D/truncated",
        condition=Condition.ratio_to_start,
        threshold=2.0,
        least=0.1,
        message="answers no longer end: look for loops (domain/D/looped), and raise rollout.max_new_tokens if they are only long",
    ),
    Alarm(
        metric="domain/D/looped",
        condition=Condition.above,
        threshold=0.05,
        message="answers repeat themselves, which reverse KL rewards: set rollout.mask_loops=true, or go back to a checkpoint and lower optim.lr",
    ),
    Alarm(metric="domain/D/length_ratio", condition=Condition.above, threshold=2.0, message=f"answers are far longer than the teacher's: {LENGTH}"),
    Alarm(metric="domain/D/length_ratio", condition=Condition.below, threshold=0.5, message=f"answers are far shorter than the teacher's: {LENGTH}"),
    Alarm(
        metric="domain/D/student_entropy",
        condition=Condition.below,
        threshold=0.5,
        relative_to="domain/D/teacher_entropy",
        least=0.05,
        message="the student is much surer than its teacher and samples too little else: lower optim.lr, or mix in forward KL with loss.kind=jsd",
    ),
    Alarm(
        metric="domain/D/token_share",
        condition=Condition.below,
        threshold=0.25,
        relative_to="domain/D/prompt_share_asked",
        message="its answers are short beside those of other domains, so few tokens make its gradient: raise its prompts.share if it falls behind",
    ),
    Alarm(
        metric="domain/D/token_share",
        condition=Condition.above,
        threshold=4.0,
        relative_to="domain/D/prompt_share_asked",
        message="its answers are long beside those of other domains, and take the time of the step: lower its prompts.share if others fall behind",
    ),
)
"""For every run; each is silent where its metric is not there."""

MISMATCH = 1e-3
"""Nats per token between a sampler and a trainer that compute the same in float32, where rounding leaves 1e-9."""

ROUGH_MISMATCH = 1e-2
"""The same where they are bound to differ: rounding of bfloat16, or an update between them (rollout.staleness=1)."""


def standard_alarms(cfg: RunConfig) -> tuple[Alarm, ...]:
    """The alarms of a run. Replayed rollouts are another student's, whose distance is no fault: it is not judged."""
    rollout = rollout_settings(cfg)
    if rollout is None or rollout.replay is not None:
        return STANDARD_ALARMS
    is_exact = cfg.student.dtype is Dtype.float32 and rollout.staleness == 0
    update = "" if rollout.staleness == 0 else ", and whether an update changes too much (rollout.staleness=1 has one between them)"
    mismatch = Alarm(
        metric="domain/D/mismatch_kl",
        condition=Condition.above,
        threshold=MISMATCH if is_exact else ROUGH_MISMATCH,
        window=1,
        message="what samples is not what trains: compare the weights, number formats and attention of both" + update,
    )
    return (*STANDARD_ALARMS, mismatch)


@dataclass(slots=True)
class Series:
    """What one alarm has seen of one metric: first values, the last (value, what it is a multiple of), and the episode it is in."""

    recent: deque[tuple[float, float]]
    first: list[float] = field(default_factory=list)
    is_active: bool = False
    calm: int = 0


class Alarms:
    """Judges the metrics of one step after the other."""

    def __init__(self, alarms: Iterable[Alarm]):
        self.alarms = tuple(alarms)
        self.patterns = [re.compile(re.escape(alarm.metric).replace("/D/", "/([^/]+)/")) for alarm in self.alarms]
        self.series: dict[tuple[int, str], Series] = {}

    def observe(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Judge a step's metrics and log what begins; returns {"alarms/active": episodes}."""
        for line in self._judge(metrics):
            LOG.warning("alarm at step %d: %s", step, line)
        return {"alarms/active": sum(series.is_active for series in self.series.values())}

    def replay(self, records: Iterable[dict[str, float]]) -> None:
        """Take up where these records end; what began in them has been logged."""
        self.series = {}
        for record in records:
            if record["step"]:
                self._judge(record)

    def _judge(self, metrics: dict[str, float]) -> list[str]:
        """Lines of the episodes that these metrics begin."""
        lines = []
        for number, (alarm, pattern) in enumerate(zip(self.alarms, self.patterns, strict=True)):
            for name in [name for name in metrics if pattern.fullmatch(name)]:
                series = self.series.setdefault((number, name), Series(deque(maxlen=alarm.window)))
                line = _next(alarm, name, metrics, series)
                lines += [line] if line is not None else []
        return lines


def _next(alarm: Alarm, name: str, metrics: dict[str, float], series: Series) -> str | None:
    """Add one step to a series; the line to log where an episode begins."""
    unit, unit_name = _unit(alarm, name, metrics, series)
    if unit is None:
        return None
    series.recent.append((metrics[name], unit))
    if len(series.recent) < alarm.window:
        return None
    value, unit = (sum(column) / alarm.window for column in zip(*series.recent, strict=True))
    limit = alarm.threshold * unit
    is_met = max(value, unit) >= alarm.least and (value < limit if alarm.condition is Condition.below else value > limit)
    begins = is_met and not series.is_active
    series.calm = 0 if is_met else series.calm + 1
    series.is_active = is_met or (series.is_active and series.calm < CALM_STEPS)
    side = "below" if alarm.condition is Condition.below else "above"
    against = f"{alarm.threshold:g}" if unit_name is None else f"{alarm.threshold:g} x {unit_name} ({unit:.3g})"
    over = f" over {alarm.window} steps" if alarm.window > 1 else ""
    return f"{name} is {value:.3g}{over}, {side} {against}: {alarm.message}" if begins else None


def _unit(alarm: Alarm, name: str, metrics: dict[str, float], series: Series) -> tuple[float | None, str | None]:
    """(what the threshold is multiplied by, its name): 1 without a name, or None where it is not known at this step."""
    if alarm.relative_to is not None:
        other = alarm.relative_to.replace("/D/", f"/{name.split('/')[1]}/")
        return metrics.get(other), other
    if alarm.condition is not Condition.ratio_to_start:
        return 1.0, None
    if len(series.first) < START_STEPS:
        series.first.append(metrics[name])
        return None, None
    return sum(series.first) / START_STEPS, "its mean at the start"
