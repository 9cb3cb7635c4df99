"""Which figures a report has: from the names of opd/metrics.py to charts with captions, or to a sentence that says why one is absent.

Each figure is a row of SECTIONS: the pattern of its metrics, its axis with unit, what one should see, and the setting that would give it where the run did
not log it. A caption says what is good and what is bad, since a curve alone says neither. Absent figures never leave an empty frame.
"""

import re
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from opd.report_charts import Line, heat_map, interval_chart, line_chart, most_points, style_class
from opd.report_reader import RunFacts

Points = list[tuple[float, float]]
SHARE = (0.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A picture of the page. legend: (name, classes of its line); wide: it takes the whole width."""

    title: str
    picture: Markup
    caption: str
    legend: list[tuple[str, str]]
    wide: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page: its figures, and the sentences for those that are absent."""

    title: str
    figures: list[Figure]
    absent: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """A chart over steps.

    pattern: of the metrics' names; its group names the line. axis: with unit. seen: what one should see, and what would be bad. given_by: what gives it.
    may_be_log: where values differ by much. bounds: what the axis shows at least.
    """

    title: str
    pattern: str
    axis: str
    seen: str
    given_by: str
    may_be_log: bool = False
    bounds: tuple[float, float] | None = None


LEARNING = (
    Curves(
        title="Accuracy on held-out prompts", pattern=r"evaluation/(.+)/accuracy", axis="accuracy (share right)", bounds=SHARE, given_by="evaluation.every=N",
        seen="The student at temperature 1. Lines should rise to their teachers' level and stay; one that falls while others rise is a domain that is "
        "being forgotten.",
    ),
    Curves(
        title="Accuracy of the rollouts", pattern=r"domain/(.+)/accuracy", axis="accuracy (share right)", bounds=SHARE, given_by="a grader in domains.D.grader",
        seen="The student's own training answers, graded. It should run with the held-out curve; far above it means that prompts are being memorised.",
    ),
    Curves(
        title="KL to the teacher, per token", pattern=r"domain/(.+)/kl_per_token", axis="nats per token", may_be_log=True, given_by="opd distill",
        seen="The divergence that the loss names, on the step's rollouts. It should fall and level out; a rise after the warm-up means a rate too high, a "
        "line that never falls a teacher that this student cannot follow.",
    ),
    Curves(
        title="KL to the teacher, per completion", pattern=r"domain/(.+)/kl_per_sequence", axis="nats per completion", may_be_log=True, given_by="opd distill",
        seen="The sum over a completion, which bounds how far accuracies can lie apart. Below about 0.1 the certificate says something; a rise with a flat "
        "per-token curve is growing length.",
    ),
    Curves(
        title="KL to the teacher on held-out prompts", pattern=r"evaluation/(.+)/kl_per_sequence", axis="nats per completion", may_be_log=True,
        given_by="evaluation.every=N with evaluation.kl=true",
        seen="Exact reverse KL, whatever the loss. It should fall as on the rollouts; a gap that opens between the two is overfitting to the training prompts.",
    ),
    Curves(
        title="Entropy of the student", pattern=r"domain/(.+)/student_entropy", axis="nats per token", given_by="opd distill",
        seen="It should come near the teacher's and stay there. Towards 0 while the teacher's is not, the student collapses onto one answer; a steady "
        "rise is noise.",
    ),
    Curves(
        title="Entropy of the teacher on the student's answers", pattern=r"domain/(.+)/teacher_entropy", axis="nats per token",
        given_by="teachers.signal=hidden_states",
        seen="How sure the teacher is where the student goes. It should fall towards what it is on its own answers; high values are states that the "
        "teacher does not know.",
    ),
    Curves(
        title="Likeliest tokens in common", pattern=r"domain/(.+)/overlap", axis="share of the 16 likeliest", bounds=SHARE,
        given_by="opd distill, where teachers give 16 likeliest tokens or more",
        seen="Of the student's 16 likeliest tokens, those that are among the teacher's. It should rise and stay; a fall means that the two drift apart, "
        "whatever the divergence of the sampled tokens says.",
    ),
    Curves(
        title="Sampler and trainer apart", pattern=r"domain/(.+)/mismatch_kl", axis="nats per token", may_be_log=True,
        given_by="opd distill, or GRPO, with rollouts that the run samples",
        seen="KL(sampler || trainer) of what ought to be one student. Rounding in float32 leaves less than 1e-6, bfloat16 less than 1e-2; more, or growth, "
        "means that something else is sampled than is trained.",
    ),
    Curves(
        title="Length of completions", pattern=r"domain/(.+)/completion_length", axis="tokens per completion", given_by="opd distill, or GRPO",
        seen="It should settle at the teacher's length. A steady climb towards rollout.max_new_tokens is runaway length; a collapse is answers cut short.",
    ),
    Curves(
        title="Completions cut at the limit", pattern=r"domain/(.+)/truncated", axis="share of completions", bounds=(0.0, 0.05),
        given_by="opd distill, or GRPO",
        seen="Near 0, or falling to it. What stays is trained on answers without an end: raise rollout.max_new_tokens.",
    ),
    Curves(
        title="Loss per token", pattern=r"domain/(.+)/loss_per_token", axis="nats per token", may_be_log=True, given_by="opd specialize",
        seen="Negative log-likelihood of the reference answers, or GRPO's surrogate, which stays near 0. It should fall; a step up is a change of the data.",
    ),
    Curves(
        title="Reward", pattern=r"domain/(.+)/reward", axis="mean score less length costs", given_by="grpo.num_steps above 0",
        seen="Mean score of the rollouts. It should rise; flat with many groups of equal rewards means that there is nothing to learn from.",
    ),
)
COST = (
    Curves(
        title="Seconds of a step, by phase", pattern=r"seconds/(.+)", axis="seconds", bounds=(0.0, 0.0), given_by="any training",
        seen="Of the rank that took longest; step is the whole, evaluation included, and so has spikes, as update has where gradients or quantisation "
        "are measured. A phase that grows goes with growing lengths; one that jumps "
        "with other work on the machine.",
    ),
    Curves(
        title="Tokens per second, by phase", pattern=r"throughput/(.+)_tokens_per_second_per_device", axis="tokens per second per device",
        may_be_log=True, given_by="opd distill, or GRPO",
        seen="Lines should be level. The lowest is the phase to make faster; a fall at equal lengths means something else uses the machine.",
    ),
    Curves(
        title="Share of the matrix rate", pattern=r"throughput/((?:.+_)?mfu)", axis="share of the measured rate", given_by="opd distill, or GRPO",
        seen="FLOPs of a phase over what the device was measured to do in them. Higher is better; small models and short rows stay low.",
    ),
)
OPTIMIZER = (
    Curves(
        title="Loss of the step", pattern=r"step/(loss)", axis="weighted nats per token", may_be_log=True, given_by="any training",
        seen="What the optimizer sees. It should fall and level out; a spike with a clipped gradient is a bad batch, a rise that stays is divergence.",
    ),
    Curves(
        title="Norm of the gradient before clipping", pattern=r"optim/(grad_norm)", axis="norm (dimensionless)", may_be_log=True, given_by="optim=adamw",
        seen="It should settle below optim.clip_norm. Always above means that the clip, not the rate, sets the step; growth without end is divergence.",
    ),
    Curves(
        title="Learning rate", pattern=r"optim/((?:muon_)?lr)", axis="learning rate", given_by="any training", bounds=(0.0, 0.0),
        seen="As asked for: the warm-up, then the schedule. A jump is a resume with another num_steps.",
    ),
    Curves(
        title="Update over weight", pattern=r"optim/(update_to_weight)", axis="ratio of norms", may_be_log=True, given_by="optim.update_ratio_every=N",
        seen="Around 1e-3 in most training. Far above, the weights are thrown about; far below, the rate could be higher.",
    ),
)
QUANTIZATION = (
    Curves(
        title="Quantisation gap", pattern=r"quant/(.+)/kl_per_token", axis="nats per token", may_be_log=True,
        given_by="quant=mxfp4_experts with quant.measure_every=N",
        seen="KL(student with unquantised experts || student). It should be far below the KL to the teacher and level; growth means masters that "
        "drift away from "
        "the FP4 grid.",
    ),
    Curves(
        title="FP4 values that an update changed", pattern=r"quant/(flipped)", axis="share of values", given_by="quant=mxfp4_experts", bounds=(0.0, 0.0),
        seen="It should fall with the rate. 0 from the start means that updates are too small to reach the next FP4 value; a constant high share is "
        "oscillation.",
    ),
)
ROUTING = (
    Curves(
        title="Entropy of the expert load", pattern=r"router/(layer_\d+)/load_entropy", axis="nats", bounds=(0.0, 0.0),
        given_by="a mixture-of-experts student",
        seen="The logarithm of the number of experts is an even load. It should not fall from where it began; a fall is routing that collapses onto "
        "few experts.",
    ),
    Curves(
        title="Experts without a token", pattern=r"router/(layer_\d+)/dead_experts", axis="experts", bounds=(0.0, 1.0), given_by="a mixture-of-experts student",
        seen="0 is best. Experts that stay without tokens learn nothing.",
    ),
    Curves(
        title="Routing unchanged since the start", pattern=r"router/(layer_\d+)/routed_as_at_start", axis="share of choices", bounds=SHARE,
        given_by="student.router_probe_every=N",
        seen="With a frozen router it falls only as far as hidden states move. A fast fall means that experts are being given other tokens than they know.",
    ),
)  # fmt: skip


def sections(facts: RunFacts) -> list[Section]:
    """The sections with curves, in the order of the page."""
    series = collect(facts.records)
    learning = _section("Learning, domain by domain", LEARNING, series, facts)
    recovery = _recovery(facts, series)
    learning = Section(
        title=learning.title,
        figures=[*learning.figures[:1], *([recovery] if isinstance(recovery, Figure) else []), *learning.figures[1:]],
        absent=[*([recovery] if isinstance(recovery, str) else []), *learning.absent],
    )
    others = [("Optimizer", OPTIMIZER), ("Quantisation", QUANTIZATION), ("Routing", ROUTING), ("Time and throughput", COST)]
    drawn = {title: _section(title, rows, series, facts) for title, rows in others}
    return [learning, _conflict(facts, series), *drawn.values()]


def collect(records: list[dict[str, Any]]) -> dict[str, Points]:
    """Metric -> its points; what is not finite is no point."""
    series: dict[str, Points] = {}
    for record in records:
        for name, value in record.items():
            if name not in ("schema", "step") and isinstance(value, int | float) and abs(value) < float("inf"):
                series.setdefault(name, []).append((record["step"], value))
    return series


def accuracy_intervals(facts: RunFacts) -> Figure | None:
    """Accuracy of base, teacher and student with their intervals, and the certificate's floor; None without an evaluation."""
    if facts.evaluation is None:
        return None
    domains = facts.evaluation["domains"]
    graded = [name for name, domain in domains.items() if domain["student"]["accuracy"] is not None]
    if not graded:
        return None
    marks = {role: [_interval(domains[name].get(role)) for name in graded] for role in ("base", "teacher", "student")}
    marks = {role: values for role, values in marks.items() if any(values)}
    floors = [(domains[name].get("certificate") or {}).get("low") for name in graded]
    title = "Accuracy of base, teacher and student"
    legend = [(role, f"role-{role}") for role in marks] + ([("certified floor", "floor")] if any(floor is not None for floor in floors) else [])
    caption = (
        "Temperature 1, with 95 % intervals. The student should lie on its teacher, and never left of the bar: that is the accuracy which its measured KL "
        "guarantees, at the upper end of the KL\u2019s interval. Where student and base overlap, nothing was learnt that can be shown."
    )
    return Figure(title=title, picture=interval_chart(title, graded, marks, floors), caption=caption, legend=legend)


def _section(title: str, rows: tuple[Curves, ...], series: dict[str, Points], facts: RunFacts) -> Section:
    figures, absent = [], []
    for row in rows:
        lines = _lines(row.pattern, series, facts)
        if lines:
            figures.append(_line_figure(row, lines))
        else:
            absent.append(f"{row.title}: not in this run\u2019s records; {row.given_by} gives it.")
    return Section(title=title, figures=figures, absent=absent)


def _line_figure(row: Curves, lines: list[Line]) -> Figure:
    picture = line_chart(row.title, lines, row.axis, may_be_log=row.may_be_log, bounds=row.bounds)
    longest = max(len(line.points) for line in lines)
    each = longest / most_points(len(lines))
    means = f" Each point is the mean of about {each:.2g} records." if each > 1 else ""
    return Figure(title=row.title, picture=picture, caption=row.seen + means, legend=[(line.name, style_class(line.style)) for line in lines])


def _lines(pattern: str, series: dict[str, Points], facts: RunFacts) -> list[Line]:
    """Domains in the styles of their order in the run, all else by order of appearance."""
    found = {match[1]: points for name, points in series.items() if (match := re.fullmatch(pattern, name))}
    names = sorted(found, key=lambda name: (facts.domains.index(name) if name in facts.domains else len(facts.domains), name))
    return [Line(name=name, points=found[name], style=facts.domains.index(name) if name in facts.domains else names.index(name)) for name in names]


def _recovery(facts: RunFacts, series: dict[str, Points]) -> Figure | str:
    """Held-out accuracy over that of the teacher, where an evaluation has measured it."""
    teachers = {} if facts.evaluation is None else {name: domain.get("teacher", {}).get("accuracy") for name, domain in facts.evaluation["domains"].items()}
    scaled = {
        f"recovery/{name}": [(step, value / accuracy) for step, value in series[f"evaluation/{name}/accuracy"]]
        for name, accuracy in teachers.items()
        if accuracy and f"evaluation/{name}/accuracy" in series
    }
    row = Curves(
        title="Recovery of the teacher", pattern=r"recovery/(.+)", axis="accuracy over the teacher's (ratio)", bounds=SHARE, given_by="",
        seen="Held-out accuracy divided by the teacher's in the table above. 1 is a teacher fully recovered, and all lines should end there; above 1 by more "
        "than the interval is worth a look at the teacher.",
    )  # fmt: skip
    lines = _lines(row.pattern, scaled, facts)
    missing = "Recovery of the teacher: it takes the teachers\u2019 accuracy, from a pipeline with an evaluation, and evaluation.every=N."
    return _line_figure(row, lines) if lines else missing


def _conflict(facts: RunFacts, series: dict[str, Points]) -> Section:
    """The heat map of pairs, each teacher's mean cosine with the others over steps, and shares of the gradient."""
    pairs = {(match[1], match[2]): points for name, points in series.items() if (match := re.fullmatch(r"conflict/(.+)/(.+)/gradient_cosine", name))}
    title, rows = "Do teachers pull against each other?", []
    shares = Curves(
        title="Share of the gradient", pattern=r"teacher/(.+)/gradient_share", axis="share of the norms (ratio)", given_by="teachers.gradient_share_every=N",
        bounds=(0.0, 0.0), seen="Of the norms of the teachers\u2019 gradients. A teacher near 1 trains the student alone; shares should follow loss "
        "weights and KL.",
    )  # fmt: skip
    if not pairs:
        drawn = _section(title, (shares,), series, facts)
        reason = "Cosines of the teachers\u2019 gradients: teachers.gradient_share_every=N measures them, with two teachers or more and not under ZeRO-3."
        return Section(title=title, figures=drawn.figures, absent=[reason, *drawn.absent])
    means = {pair: sum(value for _, value in points) / len(points) for pair, points in pairs.items()}
    names = _ordered({name for pair in pairs for name in pair}, facts)
    count = max(len(points) for points in pairs.values())
    worst = min(means, key=means.__getitem__)
    caption = (
        f"Cosine of two teachers\u2019 gradients, mean over {count} measured steps. Near 0 the teachers do not meet; above, they help each other; "
        f"clearly below "
        f"0, they undo each other\u2019s work, and one student may not hold both. Lowest here: {worst[0]} and {worst[1]}, {means[worst]:+.2f}."
    )
    heat = heat_map("Cosine of the teachers' gradients", names, means, "teacher (by its domains); colour: cosine, from -1 to 1")
    legend = [("pull apart (below 0)", "swatch pull"), ("help (above 0)", "swatch push")]
    rows.append(Figure(title="Cosine of the teachers\u2019 gradients", picture=heat, caption=caption, legend=legend))
    averaged = {f"with_others/{name}": _mean_over([points for pair, points in pairs.items() if name in pair]) for name in names}
    own = Curves(
        title="Each teacher against all others", pattern=r"with_others/(.+)", axis="mean cosine (ratio)", given_by="", bounds=(-0.1, 0.1),
        seen="Mean cosine with the other teachers. A line that sinks below 0 is a domain that the others overwrite more and more.",
    )  # fmt: skip
    rest = _section(title, (own, shares), series | averaged, facts)
    return Section(title=title, figures=[*rows, *rest.figures], absent=rest.absent)


def _ordered(names: set[str], facts: RunFacts) -> list[str]:
    first = {name: index for index, name in enumerate(facts.domains)}
    return sorted(names, key=lambda name: (first.get(name.split("+")[0], len(first)), name))


def _mean_over(curves: list[Points]) -> Points:
    """Mean of several curves at each step that one of them has."""
    at: dict[float, list[float]] = {}
    for step, value in (point for points in curves for point in points):
        at.setdefault(step, []).append(value)
    return [(step, sum(values) / len(values)) for step, values in sorted(at.items())]


def _interval(record: dict[str, Any] | None) -> tuple[float, float, float] | None:
    return None if record is None or record["accuracy"] is None else (record["accuracy"], record["low"], record["high"])
