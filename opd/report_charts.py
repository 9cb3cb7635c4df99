"""Pictures of a report as inline SVG: lines over steps, intervals per domain, and a heat map of pairs.

No chart library: the page has to be one small file that needs no network, follows the reader's light or dark theme, and stays readable at 375 pixels.
plotly.js alone is 4.7 MB, Vega with its runtime 0.8 MB, both draw in colours fixed when the page is made; matplotlib's SVG cannot follow a theme. What is
needed here is scales, paths and text. Colours are classes that the page's style sheet fills in for each theme.

A chart is CHART wide and drawn at about its own size on a phone and in a column of a wide screen, so that its text is never scaled to nothing. A line has
one of six colours that colour-blind readers can tell apart and one of three dashes, eighteen styles, and its name stands at its right end. Every name is
escaped: it may come from a user's file.
"""

import math
from dataclasses import dataclass

from markupsafe import Markup, escape

CHART, HEIGHT = 420, 262
LEFT, RIGHT, TOP, BOTTOM = 50, 94, 10, 40
POINTS, POINTS_AMONG_MANY = 100, 36
"""Of a line at most, and of one among more than four, where noise would hide which is which; more are averaged over equal stretches of steps."""
COLOURS, DASHES = 6, 3
STEPS = "optimizer steps done"
LABEL_HEIGHT = 11.5
LOG_RATIO = 30
"""Of largest and smallest value, from which a scale that may be logarithmic is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line: (step, value) in order of steps. style: which of the page's line styles; the same name has the same one everywhere."""

    name: str
    points: list[tuple[float, float]]
    style: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """From values to pixels; ticks: (value, text)."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[tuple[float, str]]
    is_log: bool = False

    def at(self, value: float) -> float:
        share = (self._of(value) - self._of(self.low)) / (self._of(self.high) - self._of(self.low))
        return self.start + share * (self.end - self.start)

    def _of(self, value: float) -> float:
        return math.log10(max(value, self.low)) if self.is_log else value


def line_chart(
    title: str, lines: list[Line], y_axis: str, *, may_be_log: bool = False, bounds: tuple[float, float] | None = None, x_axis: str = STEPS
) -> Markup:
    """Lines over optimizer steps, or over what x_axis says. y_axis: name with its unit; bounds: what the axis shows at least."""
    lines = [Line(name=line.name, points=reduced(line.points, most_points(len(lines))), style=line.style) for line in lines]
    steps = [step for line in lines for step, _ in line.points]
    x = linear_scale(min(0.0, *steps), max([*steps, 1.0]), LEFT, CHART - RIGHT, 5)
    y = _value_scale([value for line in lines for _, value in line.points], may_be_log, bounds)
    parts = [_axes(x, y, x_axis, y_axis + (", logarithmic" if y.is_log else ""))]
    for line in lines:
        path = "M" + "L".join(f"{x.at(step):.1f},{y.at(value):.1f}" for step, value in line.points)
        values = ";".join(f"{step:g},{value:.4g}" for step, value in line.points)
        parts.append(Markup('<path class="line {}" data-name="{}" data-points="{}" d="{}"/>').format(style_class(line.style), line.name, values, path))
        if len(line.points) == 1:
            parts.append(_dot(x.at(line.points[0][0]), y.at(line.points[0][1]), line))
    ends = _ends(lines, y)
    for height, (own, line) in zip(_spread([height for height, _ in ends]), ends, strict=True):
        last = x.at(line.points[-1][0])
        leader = Markup('<path class="leader {}" data-name="{}" d="M{:.1f},{:.1f}L{},{:.1f}"/>').format(
            style_class(line.style), line.name, last + 1, own, CHART - RIGHT + 8, height
        )
        text = Markup('<text class="end {}" data-name="{}" x="{}" y="{:.1f}">{}</text>').format(
            style_class(line.style), line.name, CHART - RIGHT + 10, height + 3.5, shortened(line.name, 15)
        )
        parts += [leader, text]
    frame = f'data-low="{x.low:g}" data-high="{x.high:g}" data-left="{LEFT}" data-right="{CHART - RIGHT}"'
    frame += f' data-axis="{"step" if x_axis == STEPS else x_axis.partition(" of ")[0]}"'  # what a reader is told beside the number
    return _svg(title, CHART, HEIGHT, parts, "lines", frame)


def interval_chart(title: str, rows: list[str], marks: dict[str, list[tuple[float, float, float] | None]], floors: list[float | None]) -> Markup:
    """A row per domain with (value, low, high) of each series in `marks`, and a bar at its floor; all from 0 to 1."""
    height = TOP + 26 * len(rows) + BOTTOM
    x = linear_scale(0.0, 1.0, 96, CHART - 12, 5)
    parts = [Markup('<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(x.at(tick), TOP, height - BOTTOM) for tick, _ in x.ticks]
    parts += [_text(x.at(tick), height - BOTTOM + 14, text, "tick middle") for tick, text in x.ticks]
    parts += [_text((x.start + x.end) / 2, height - 6, "accuracy (share of held-out prompts answered rightly)", "axis middle")]
    parts.append(Markup('<text class="axis middle" transform="translate(10,{}) rotate(-90)">domain</text>').format((height - BOTTOM + TOP) / 2))
    for index, name in enumerate(rows):
        middle = TOP + 26 * index + 13
        parts.append(_text(92, middle + 4, shortened(name, 13), "tick right"))
        if floors[index] is not None:
            place = x.at(max(0.0, floors[index]))
            parts.append(Markup('<path class="floor" d="M{0:.1f},{1}V{2}"/>').format(place, middle - 10, middle + 10))
        for order, (role, values) in enumerate(marks.items()):
            if values[index] is not None:
                value, low, high = values[index]
                across = middle + (order - (len(marks) - 1) / 2) * 6
                label = f"{name}, {role}: {value:.3f} [{low:.3f}, {high:.3f}]"
                parts.append(
                    Markup('<g class="role-{}"><title>{}</title><path d="M{:.1f},{:.1f}H{:.1f}"/><circle cx="{:.1f}" cy="{:.1f}" r="3.2"/></g>').format(
                        role, label, x.at(low), across, x.at(high), x.at(value), across
                    )
                )
    return _svg(title, CHART, height, parts, "intervals")


def heat_map(title: str, names: list[str], value_of: dict[tuple[str, str], float], axis: str) -> Markup:
    """Every pair of names with its value from -1 to 1, symmetric; pairs without one are empty."""
    left, top, cell = 92, 88, min(44.0, (CHART - 96) / len(names))
    side = cell * len(names)
    width, height = CHART, top + side + 22
    parts = []
    for row, one in enumerate(names):
        parts.append(_text(left - 6, top + cell * (row + 0.5) + 3.5, shortened(one, 13), "tick right"))
        parts.append(
            Markup('<text class="tick" transform="translate({:.1f},{}) rotate(-60)">{}</text>').format(left + cell * (row + 0.6), top - 6, shortened(one, 13))
        )
        for column, other in enumerate(names):
            value = 1.0 if one == other else value_of.get((one, other), value_of.get((other, one)))
            if value is None:
                continue
            sign = "same" if one == other else "pull" if value < 0 else "push"
            share = round(min(1.0, abs(value)) ** 0.7 * 100)
            label = f"{one} and {other}: {value:+.3f}"
            number = "" if one == other else _hundredths(value)
            parts.append(
                Markup('<g class="cell {}" style="--share:{}%"><title>{}</title><rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                    sign, share, label, left + cell * column, top + cell * row, cell - 1, cell - 1
                )
                + _text(left + cell * (column + 0.5) - 0.5, top + cell * (row + 0.5) + 3, number, "number middle")
                + Markup("</g>")
            )
    parts.append(_text(left + side / 2, height - 6, axis, "axis middle"))
    parts.append(Markup('<text class="axis middle" transform="translate(10,{:.0f}) rotate(-90)">{}</text>').format(top + side / 2, axis))
    return _svg(title, width, round(height), parts, "heat")


def _hundredths(value: float) -> str:
    rounded = round(value, 2)
    return "0" if rounded == 0 else f"{rounded:.2f}".replace("0.", ".").replace("-", "\u2212")


def style_class(style: int) -> str:
    """The classes of a line style."""
    return f"c{style % COLOURS} d{style // COLOURS % DASHES}"


def most_points(num_lines: int) -> int:
    """Points of each line of a chart, at most."""
    return POINTS_AMONG_MANY if num_lines > 4 else POINTS


def reduced(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many points: means over equal stretches of steps; one where all are at the same place."""
    if len(points) <= most:
        return points
    first, width = points[0][0], (points[-1][0] - points[0][0]) / most
    groups: dict[int, list[tuple[float, float]]] = {}
    for step, value in points:
        groups.setdefault(min(most - 1, int((step - first) / width) if width else 0), []).append((step, value))
    return [(round(sum(step for step, _ in group) / len(group), 1), sum(value for _, value in group) / len(group)) for group in groups.values()]


def linear_scale(low: float, high: float, start: float, end: float, count: int) -> Scale:
    """A scale whose ends are the values given, with about `count` ticks at round numbers."""
    high = high if high > low else low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    ticks = [(first + number) * step for number in range(count + 3) if (first + number) * step <= high + step * 1e-6]
    return Scale(low=low, high=high, start=start, end=end, ticks=[(tick, tick_text(tick)) for tick in ticks])


def tick_text(value: float) -> str:
    """A number of an axis, short."""
    size = abs(value)
    if size < 1e-12:
        return "0"
    unit, letter = next(((unit, letter) for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")) if size >= unit), (1.0, ""))
    unit = 1e3 if letter == "k" else unit
    return f"{value:.3g}".replace("e-0", "e-") if size < 1e-3 else f"{value / unit:.4g}{letter}"


def shortened(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "\u2026"


def _value_scale(values: list[float], may_be_log: bool, bounds: tuple[float, float] | None) -> Scale:
    start, end = HEIGHT - BOTTOM, TOP
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high / low > LOG_RATIO:
        low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
        powers = range(round(math.log10(low)), round(math.log10(high)) + 1)
        return Scale(low=low, high=high, start=start, end=end, ticks=[(10.0**power, tick_text(10.0**power)) for power in powers], is_log=True)
    if bounds is not None:
        low, high = min(low, bounds[0]), max(high, bounds[1])
    elif low >= 0 and low < 0.5 * high:
        low = 0.0
    return linear_scale(low, high if high > low else low + (abs(low) or 1.0), start, end, 5)


def _ends(lines: list[Line], y: Scale) -> list[tuple[float, Line]]:
    return sorted(((y.at(line.points[-1][1]), line) for line in lines), key=lambda end: end[0])


def _spread(heights: list[float]) -> list[float]:
    """Places of labels, near their ends and none on another, within the chart."""
    lowest, highest = TOP + 2.0, HEIGHT - BOTTOM + 4.0
    gap = min(LABEL_HEIGHT, (highest - lowest) / max(1, len(heights) - 1))
    places: list[float] = []
    for height in heights:
        places.append(max(height, places[-1] + gap) if places else max(height, lowest))
    limit = highest
    for index in reversed(range(len(places))):
        places[index] = min(places[index], limit)
        limit = places[index] - gap
    return places


def _axes(x: Scale, y: Scale, x_axis: str, y_axis: str) -> Markup:
    parts = []
    for tick, text in y.ticks:
        parts.append(Markup('<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>').format(x.start, x.end, y.at(tick)))
        parts.append(_text(x.start - 5, y.at(tick) + 3.5, text, "tick right"))
    parts.append(Markup('<line class="base" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>').format(x.start, x.end, y.start))
    parts += [_text(x.at(tick), y.start + 14, text, "tick middle") for tick, text in x.ticks]
    parts.append(_text((x.start + x.end) / 2, HEIGHT - 6, x_axis, "axis middle"))
    parts.append(Markup('<text class="axis middle" transform="translate(10,{:.0f}) rotate(-90)">{}</text>').format((y.start + y.end) / 2, y_axis))
    return Markup("").join(parts)


def _dot(x: float, y: float, line: Line) -> Markup:
    return Markup('<circle class="point {}" data-name="{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(style_class(line.style), line.name, x, y)


def _text(x: float, y: float, text: str, kind: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(kind, x, y, text)


def _svg(title: str, width: int, height: int, parts: list[Markup], kind: str, frame: str = "") -> Markup:
    begin = f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" {frame}><title>{escape(title)}</title>'
    return Markup(begin) + Markup("").join(parts) + Markup("</svg>")
