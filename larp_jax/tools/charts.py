"""Line charts as SVG: for pages that must need nothing else, and as files."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 32
MOST_POINTS = 400  # of a series; of more, each stretch shows its smallest and largest
FEW_POINTS = 60  # of dots that may be large
LOG_RATIO = 100.0  # values further apart than this get a logarithmic axis

TEMPLATES = pathlib.Path(__file__).parent / "templates"

Point = tuple[float, float | None]


@dataclasses.dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
      name: for the legend; empty for none.
      points: (x, y) with rising x; None in place of y makes a gap.
      dots: points without a line between them.
    """

    name: str
    points: Sequence[Point]
    dots: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """Series over one axis. The y axis is logarithmic where all values are positive and far apart.

    Attributes:
      name: of its file.
      title: above it.
      series: at least one.
      x_label: what is counted.
      y_label: the unit.
      x_limits: what the axis covers at least.
    """

    name: str
    title: str
    series: Sequence[Series]
    x_label: str = "step"
    y_label: str = ""
    x_limits: tuple[float, ...] = ()


@functools.cache
def environment() -> jinja2.Environment:
    """Templates of this package; whatever is put into them is escaped."""
    loader = jinja2.FileSystemLoader(TEMPLATES, encoding="utf-8")
    made = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.globals["geometry"] = geometry
    made.filters["short"] = short
    return made


def as_file(chart: Chart) -> str:
    """The chart as an SVG file, with its style inside."""
    return environment().get_template("chart_file.svg").render(chart=chart)


def geometry(chart: Chart) -> dict[str, Any]:
    """Where everything of a chart lies, in pixels of its `WIDTH` x `HEIGHT`, and what its readers may look up."""
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

    drawn = []
    for series, line in zip(chart.series, lines, strict=True):
        at = [None if y is None else (across(x), up(scale(y))) for x, y in line]
        if series.dots:
            path = "".join(f"M{p[0]:.1f},{p[1]:.1f}h0" for p in at if p)
        else:
            # a point between gaps is a dot, by the round cap of a line of no length
            path, pen = "", "M"
            for i, p in enumerate(at):
                if p:
                    alone = pen == "M" and (i + 1 == len(at) or at[i + 1] is None)
                    path += f"{pen}{p[0]:.1f},{p[1]:.1f}" + ("h0" if alone else "")
                pen = "L" if p else "M"
        few = len(line) <= FEW_POINTS
        drawn.append({"name": series.name, "path": path, "style": f"dots{' few' * few}" if series.dots else "line"})
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
        "series": drawn,
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


def is_number(value: Any) -> bool:
    """Whether a value is a number that can be drawn: finite, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def short(value: Any) -> str:
    """A number in a few characters; other values as they are."""
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
    if high - low <= 1e-12 * abs(low) + 1e-290:  # the same, as far as a picture can show
        room = abs(low) * 0.1 if abs(low) > 1e-290 else 1.0
        return low - room, high + room
    room = (high - low) * margin
    return low - room, high + room


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About so many round numbers between two."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Exponents of powers of ten between two exponents, five at most."""
    powers = range(math.ceil(low), math.floor(high) + 1)
    return list(powers)[:: max(1, -(-len(powers) // 5))]
