"""Charts: positions of points and labels, and escaping of text."""

import json
import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings, strategies as st

from larp_jax.tools import charts
from larp_jax.tools.charts import Chart, Series

NUMBERS = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.integers(-(10**400), 10**400))


def paths(chart):
    """Coordinates (x, y) of the points of each series, as plotted."""
    found = []
    for series in charts.geometry(chart)["series"]:
        commands = series["path"].replace("h0", "").replace("L", "M").split("M")
        found.append([tuple(map(float, command.split(","))) for command in commands if command])
    return found


def test_points_agree_with_the_axes():
    chart = Chart("c", "c", [Series("a", [(0, 1.0), (50, 3.0), (100, 2.0)])])
    g = charts.geometry(chart)
    (line,) = paths(chart)
    assert [x for x, _ in line] == pytest.approx([g["left"], (g["left"] + g["right"]) / 2, g["right"]], abs=0.1)
    ticks = dict(g["y_ticks"])
    assert line[2][1] == pytest.approx(ticks[2.0], abs=0.1)
    assert g["bottom"] > line[0][1] > line[2][1] > line[1][1] > g["top"]  # y decreases upward
    assert not g["log"]


def test_values_far_apart_get_a_logarithmic_axis():
    chart = Chart("c", "c", [Series("", [(0, 1e-4), (1, 1e-2), (2, 1.0)])])
    g = charts.geometry(chart)
    ((_, low), (_, middle), (_, high)) = paths(chart)[0]
    assert g["log"] and middle == pytest.approx((low + high) / 2, abs=0.1)
    assert [round(value, 9) for value, _ in g["y_ticks"]] == [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    assert not charts.geometry(Chart("c", "c", [Series("", [(0, -1e-4), (1, 1.0)])]))["log"]


def test_missing_and_non_finite_values_make_a_gap():
    points = [(0, 1.0), (1, 2.0), (2, None), (3, math.nan), (4, 1.5), (5, math.inf), (6, 1.0), (7, 1.2)]
    (series,) = charts.geometry(Chart("c", "c", [Series("", points)]))["series"]
    assert series["path"].count("M") == 3 and series["path"].count("L") == 2
    assert series["path"].count("h0") == 1  # the point between two gaps, as a dot


def test_long_series_keep_their_extremes():
    points = [(x, math.sin(x / 50)) for x in range(10_000)]
    points[4321] = (4321, 9.0)
    points[7654] = (7654, -9.0)
    chart = Chart("c", "c", [Series("", points)])
    ((_, known),) = charts.geometry(chart)["data"]["series"]
    assert len(known) <= charts.MOST_POINTS
    assert (4321, 9.0) in known and (7654, -9.0) in known
    assert [x for x, _ in known] == sorted(x for x, _ in known)


@settings(deadline=None, max_examples=50)
@given(st.lists(NUMBERS, max_size=30), st.booleans())
def test_any_values_give_a_chart(values, dots):
    chart = Chart("c", "<&>", [Series("'\"", list(enumerate(values)), dots=dots)])
    root = ElementTree.fromstring(charts.as_file(chart))
    (inner,) = root.findall("{http://www.w3.org/2000/svg}svg")
    assert inner.get("aria-label") == "<&>"
    held = json.loads(inner.get("data-chart"))
    finite = [(x, y) for x, y in enumerate(values) if charts.is_number(y)]
    assert [tuple(point) for point in held["series"][0][1]] == finite
    for line in paths(chart):
        assert all(0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in line)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (None, "–"), (1234567, "1.235M"), (20_000, "20k"), (0.00012, "0.00012"), (8192, "8192"), ("x", "x")],
)
def test_short(value, text):
    assert charts.short(value) == text
