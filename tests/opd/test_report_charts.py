"""Charts as text: what is drawn is what was given, in pixels that a reader can invert, and no name can break out of the picture."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from opd.report_charts import CHART, HEIGHT, POINTS, POINTS_AMONG_MANY, RIGHT, Line, heat_map, interval_chart, line_chart, linear_scale, reduced, style_class

SVG = "{http://www.w3.org/2000/svg}"


def parsed(picture) -> ElementTree.Element:
    return ElementTree.fromstring(f'<root xmlns="http://www.w3.org/2000/svg">{picture}</root>')


def line(name: str, values: list[float], style: int = 0) -> Line:
    return Line(name=name, points=[(float(step), value) for step, value in enumerate(values)], style=style)


def pixels(path: ElementTree.Element) -> list[tuple[float, float]]:
    return [tuple(map(float, point.split(","))) for point in re.split("[ML]", path.get("d"))[1:]]


def test_points_are_drawn_in_proportion_and_listed_for_the_reader():
    [path] = [path for path in parsed(line_chart("t", [line("law", [0.0, 0.5, 1.0])], "nats")).iter(f"{SVG}path") if "line" in path.get("class").split()]
    (x0, y0), (x1, y1), (x2, y2) = pixels(path)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y2, "larger values stand higher"
    assert path.get("data-points") == "0,0;1,0.5;2,1"


def test_a_logarithmic_axis_gives_equal_factors_equal_heights_and_says_so():
    picture = parsed(line_chart("t", [line("law", [1e-3, 1e-1, 10.0])], "nats", may_be_log=True))
    [path] = [path for path in picture.iter(f"{SVG}path") if "line" in path.get("class").split()]
    heights = [y for _, y in pixels(path)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert any(text.text == "nats, logarithmic" for text in picture.iter(f"{SVG}text"))


def test_a_logarithmic_axis_is_not_taken_where_a_value_is_zero():
    assert "logarithmic" not in line_chart("t", [line("law", [0.0, 1e-3, 10.0])], "nats", may_be_log=True)


@pytest.mark.parametrize("values", [[0.3], [0.0, 0.0], [-2.0, -1.0], [5e8, 6e8], [1e-7, 2e-7]])
def test_any_values_stay_within_the_chart(values):
    picture = parsed(line_chart("t", [line("law", values)], "nats"))
    [path] = [path for path in picture.iter(f"{SVG}path") if "line" in path.get("class").split()]
    assert all(0 <= x <= CHART - RIGHT and 0 <= y <= HEIGHT for x, y in pixels(path))


def test_labels_of_lines_that_end_together_do_not_lie_on_each_other():
    picture = parsed(line_chart("t", [line(f"domain{number}", [0.5, 1.0], number) for number in range(12)], "nats"))
    heights = sorted(float(text.get("y")) for text in picture.iter(f"{SVG}text") if "end" in text.get("class").split())
    assert len(heights) == 12
    assert min(after - before for before, after in pairwise(heights)) >= 10
    assert all(0 < height < HEIGHT for height in heights)


def test_eighteen_lines_have_eighteen_styles():
    assert len({style_class(style) for style in range(18)}) == 18


def test_long_lines_are_means_over_equal_stretches_and_keep_their_mean():
    points = [(float(step), float(step % 7)) for step in range(700)]
    few = reduced(points, 100)
    assert len(few) == 100
    assert sum(value for _, value in few) / 100 == pytest.approx(3.0, abs=0.05)
    assert reduced(points[:50], 100) == points[:50]
    many = line_chart("t", [Line(name=str(number), points=points, style=number) for number in range(6)], "nats")
    assert max(len(found.split(";")) for found in re.findall(r'data-points="([^"]*)"', many)) == POINTS_AMONG_MANY < POINTS


def test_many_points_at_one_place_are_drawn_as_their_mean():
    assert reduced([(0.0, float(number % 2)) for number in range(200)], 100) == [(0.0, 0.5)]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 37.0), (-3.0, 4.5), (1e-6, 3e-6)])
def test_ticks_are_round_and_inside(low, high):
    scale = linear_scale(low, high, 0, 100, 5)
    ticks = [tick for tick, _ in scale.ticks]
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-12 <= tick <= high * (1 + 1e-9) + 1e-12 for tick in ticks)
    assert len({text for _, text in scale.ticks}) == len(ticks)


def test_a_heat_map_shows_every_pair_twice_whichever_way_it_was_named():
    picture = parsed(heat_map("t", ["a", "b", "c"], {("b", "a"): -0.5, ("a", "c"): 0.25}, "teacher"))
    titles = [title.text for title in picture.iter(f"{SVG}title")]
    assert titles.count("a and b: -0.500") == titles.count("b and a: -0.500") == 1
    assert titles.count("a and c: +0.250") == titles.count("c and a: +0.250") == 1
    assert not [title for title in titles if title in ("b and c", "c and b")], "that pair was not measured"
    assert [cell.get("class") for cell in picture.iter(f"{SVG}g")].count("cell pull") == 2


def test_an_interval_stands_at_its_value_between_its_ends():
    picture = parsed(interval_chart("t", ["law"], {"base": [None], "student": [(0.5, 0.25, 0.75)]}, [0.0]))
    [group] = list(picture.iter(f"{SVG}g"))
    low, high = map(float, re.fullmatch(r"M([\d.]+),[\d.]+H([\d.]+)", group.find(f"{SVG}path").get("d")).groups())
    assert float(group.find(f"{SVG}circle").get("cx")) == pytest.approx((low + high) / 2, abs=0.1)


@pytest.mark.parametrize("name", ['<script>alert("x")</script>', '"><b>', "a & b"])
def test_a_name_is_text_wherever_it_stands(name):
    for picture in (line_chart(name, [line(name, [1.0, 2.0])], name), heat_map(name, [name, "b"], {(name, "b"): 0.1}, name)):
        tags = {element.tag for element in parsed(picture).iter()}
        assert not tags & {f"{SVG}script", f"{SVG}b"}
        assert any(name in (element.get("data-name") or "") or (element.text or "") == name for element in parsed(picture).iter())
