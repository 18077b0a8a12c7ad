"""Line charts as SVG, for self-contained pages and as files."""

import base64
import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 8, 32
MOST_POINTS = 400  # of a series; longer series are reduced to the minimum and maximum of each interval
FEW_POINTS = 60  # up to this number, dots are large
LOG_RATIO = 100.0  # the axis is logarithmic above this ratio of the largest to the smallest value

TEMPLATES = pathlib.Path(__file__).parent / "templates"

Point = tuple[float, float | None]


@dataclasses.dataclass(frozen=True)
class Series:
    """One line or one set of dots.

    Attributes:
      name: in the legend; empty for none.
      points: (x, y) with increasing x; None instead of y leaves a gap.
      dots: whether to plot dots without a line.
    """

    name: str
    points: Sequence[Point]
    dots: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """Series over a common x axis. The y axis is logarithmic if all values are positive and differ by `LOG_RATIO`.

    Attributes:
      name: name of its file.
      title: text above it.
      series: at least one.
      x_label: label of the x axis.
      y_label: unit of the y axis.
      x_limits: values that the x axis covers at least.
    """

    name: str
    title: str
    series: Sequence[Series]
    x_label: str = "step"
    y_label: str = ""
    x_limits: tuple[float, ...] = ()


@functools.cache
def environment() -> jinja2.Environment:
    """The templates of this package; all values inserted into them are escaped."""
    loader = jinja2.FileSystemLoader(TEMPLATES, encoding="utf-8")
    created = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    created.globals["geometry"] = geometry
    created.filters["short"] = short
    return created


def as_file(chart: Chart) -> str:
    """The chart as the text of an SVG file, including its style."""
    return environment().get_template("chart_file.svg").render(chart=chart)


def geometry(chart: Chart) -> dict[str, Any]:
    """Layout of a chart, in pixels of its `WIDTH` x `HEIGHT`, and its values for tooltips."""
    lines = [
        _thinned([(x, y if is_number(y) else None) for x, y in series.points if is_number(x)])
        for series in chart.series
    ]
    xs = [*chart.x_limits, *(x for line in lines for x, _ in line)] or [0.0]
    ys = [y for line in lines for _, y in line if y is not None]
    log = bool(ys) and min(ys) > 0 and max(ys) / min(ys) > LOG_RATIO
    scale = math.log10 if log else float
    values = [scale(y) for y in ys] or [0.0]
    x_low, x_high = _range(min(xs), max(xs), 0.0)
    y_low, y_high = _range(min(values), max(values), 0.04)
    across = lambda x: LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)  # noqa: E731
    up = lambda y: HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)  # noqa: E731

    plotted = []
    for series, line in zip(chart.series, lines, strict=True):
        at = [None if y is None else (across(x), up(scale(y))) for x, y in line]
        if series.dots:
            path = "".join(f"M{p[0]:.1f},{p[1]:.1f}h0" for p in at if p)
        else:
            # a point between gaps becomes a dot: a line of zero length with round caps
            path, pen = "", "M"
            for i, p in enumerate(at):
                if p:
                    alone = pen == "M" and (i + 1 == len(at) or at[i + 1] is None)
                    path += f"{pen}{p[0]:.1f},{p[1]:.1f}" + ("h0" if alone else "")
                pen = "L" if p else "M"
        few = len(line) <= FEW_POINTS
        plotted.append({"name": series.name, "path": path, "style": f"dots{' few' * few}" if series.dots else "line"})
    y_ticks = [(10.0**t, up(t)) for t in _log_ticks(y_low, y_high)] if log else [
        (t, up(t)) for t in _ticks(y_low, y_high, 4)
    ]  # fmt: skip
    known = [[(x, y) for x, y in line if y is not None] for line in lines]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
        "series": plotted,
        "x_ticks": [(t, across(t)) for t in _ticks(x_low, x_high, 4)],
        "y_ticks": y_ticks,
        "log": log,
        "empty": not ys,
        "data": {
            "x": [x_low, x_high, LEFT, WIDTH - RIGHT],
            "label": chart.x_label,
            "series": [[series.name, points] for series, points in zip(chart.series, known, strict=True)],
        },
    }


def data_uri(kind: str, content: bytes) -> str:
    """The contents of a file as a URI, for self-contained pages; `kind` is its MIME type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def is_number(value: Any) -> bool:
    """Whether a value is a number that can be plotted: finite, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def short(value: Any) -> str:
    """A number in a few characters; other values as text, None as a dash."""
    if value is None:
        return "–"
    if not is_number(value):
        return str(value)
    size = abs(value)
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / min(unit, 1e3 if letter == 'k' else unit):.4g}{letter}"
    return f"{value:.4g}"


def _thinned(points: list[Point]) -> list[Point]:
    if len(points) <= MOST_POINTS:
        return points
    stretch = -(-2 * len(points) // MOST_POINTS)
    kept = []
    for start in range(0, len(points), stretch):
        some = [point for point in points[start : start + stretch] if point[1] is not None]
        if some:
            kept += sorted({min(some, key=lambda p: p[1]), max(some, key=lambda p: p[1])})
        else:
            kept.append(points[start])
    return kept


def _range(low: float, high: float, margin: float) -> tuple[float, float]:
    if high - low <= 1e-12 * abs(low) + 1e-290:  # equal within the precision of a chart
        room = abs(low) * 0.1 if abs(low) > 1e-290 else 1.0
        return low - room, high + room
    room = (high - low) * margin
    return low - room, high + room


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between two values."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Exponents of powers of ten between two exponents, at most five."""
    powers = range(math.ceil(low), math.floor(high) + 1)
    return list(powers)[:: max(1, -(-len(powers) // 5))]
