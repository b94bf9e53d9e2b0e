"""Charts are XML whose lines lie where the numbers say."""

import xml.etree.ElementTree as ET

import pytest

from serve.bench import svg_chart
from serve.bench.plot import plot
from serve.bench.record import Record
from serve.bench.svg_chart import Panel, Scale, Series, chart, linear_ticks, log_ticks

LEFT, RIGHT = svg_chart.LEFT, svg_chart.WIDTH - svg_chart.RIGHT
TOP = svg_chart.TITLE_HEIGHT + svg_chart.TOP
BOTTOM = svg_chart.TITLE_HEIGHT + svg_chart.PANEL_HEIGHT - svg_chart.BOTTOM


def lines(svg: str) -> list[list[tuple[float, ...]]]:
    found = ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}polyline")  # noqa: S314 - our own
    return [[tuple(map(float, point.split(","))) for point in line.get("points", "").split()] for line in found]


def test_points_lie_where_the_axes_say():
    (line,) = lines(chart("t", [Panel("p", "x", [Series("s", [(0, 0), (5, 5), (10, 10)])])]))
    assert line == [(LEFT, BOTTOM), ((LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2), (RIGHT, TOP)]
    (line,) = lines(chart("t", [Panel("p", "x", [Series("s", [(0, 1), (10, 100), (3, 0)])], is_log=True)]))
    assert line == [(LEFT, BOTTOM), (RIGHT, TOP)]  # 0 has no place


def test_an_axis_may_be_longer_than_its_line():
    (line,) = lines(chart("t", [Panel("p", "x", [Series("s", [(0, 0), (5, 1)])], x_most=10)]))
    assert line[-1] == ((LEFT + RIGHT) / 2, TOP)


@pytest.mark.parametrize(("most", "last"), [(0, 1), (1, 1), (7, 8), (61, 80), (0.03, 0.03), (99_999, 100_000)])
def test_ticks(most, last):
    ticks = linear_ticks(most)
    assert ticks[0] == 0 and ticks[-1] == pytest.approx(last) and ticks[-1] >= most
    assert 2 <= len(ticks) <= svg_chart.MOST_TICKS + 1


def test_log_ticks_are_around_all():
    assert log_ticks(3, 250) == [1, 10, 100, 1000]
    assert log_ticks(10, 10) == [10, 100]


def test_a_scale_runs_either_way():
    assert Scale([0, 10], 100, 0)(2.5) == 75
    assert Scale([1, 100], 0, 10, is_log=True)(10) == Scale([10, 1000], 0, 10, is_log=True)(100) == 5


def test_text_is_escaped_and_nothing_is_drawn_of_nothing():
    svg = chart("<&", [Panel("p", "x", [Series("<s>", [])])])
    assert lines(svg) == [] and "&lt;&amp;" in svg and "&lt;s&gt;" in svg


def test_a_picture_of_a_run():
    done = Record(0.0, sent=0.0, ended=2.0, status="OK", times=[1.0, 1.5, 2.0], counts=[1, 1, 2], output_tokens=4)
    failed = Record(1.0, sent=1.0, ended=1.1, status="UNAVAILABLE")
    found = {"request_rate": 2.0, "model_id": "a<b", "completed": 1}
    drawn = lines(plot([done, failed], found))
    assert len(drawn) == 6  # in flight, tokens, four latencies
    assert len({y for _, y in drawn[0]}) == 3  # two in flight, one, none
    assert lines(plot([failed], found | {"request_rate": "inf", "completed": 0}))
