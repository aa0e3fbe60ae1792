"""How do layers and strengths look beside one another? Small static drawings; colours come from classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tracker.report.svg import Scale, drawing, element, padded, path_through, tick_label, ticks

_WIDTH, _HEIGHT = 700, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 118, 16, 40
_MOST_NAMES = 14


@dataclass(frozen=True)
class LayerLine:
    """One series over the layers.

    Attributes:
        label: written at the line's end.
        values: one a layer; NaN where there is none.
        low: lower ends of the 95 % intervals; empty for none.
        high: upper ends.
        tone: colour class.
        strong: whether the label and the dots stand out.
    """

    label: str
    values: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    tone: str = "quiet"
    strong: bool = False


def layer_chart(
    sites: Sequence[str],
    lines: Sequence[LayerLine],
    *,
    title: str,
    description: str,
    chosen: str | None = None,
    include: Sequence[float] = (0.0,),
    floor: float | None = None,
    floor_label: str = "",
    axis: str = "block, counted from 0",
) -> Markup:
    """Lines over the layers of a model, from the first block to the last.

    Args:
        sites: names, in order of depth.
        lines: series; the last is drawn on top.
        title: for those who do not see it, as the description.
        description: what is to be seen.
        chosen: the layer marked by a vertical line.
        include: values the axis always shows.
        floor: a level that matters, dashed.
        floor_label: written on it.
        axis: what the names along the bottom are.
    """
    shown = [value for line in lines for value in (*line.values, *line.low, *line.high)]
    low, high = padded(shown, include=[*include, *(() if floor is None else (floor,))])
    x = Scale(0, max(1, len(sites) - 1), _LEFT + 14, _WIDTH - _RIGHT)
    y = Scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    parts = _axes(sites, x, y, axis)
    if chosen in sites:
        at = x(sites.index(chosen))
        parts.append(element("line", x1=at, x2=at, y1=y.start, y2=y.end, class_="cursor"))
        parts.append(element("text", "chosen", x=at, y=_TOP - 4, class_="tick middle"))
    if floor is not None:
        parts.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y(floor), y2=y(floor), class_="floor"))
        parts.append(element("text", floor_label, x=_WIDTH - _RIGHT, y=y(floor) - 5, class_="tick end"))
    for line in lines:
        parts += _drawn(line, x, y)
    parts += _labels(lines, x, y)
    return drawing(_WIDTH, _HEIGHT, *parts, title=title, description=description)


def _axes(sites: Sequence[str], x: Scale, y: Scale, axis: str) -> list[Markup]:
    parts: list[Markup] = []
    for value in ticks(y.low, y.high, 4):
        zero = "grid zero" if value == 0 else "grid"
        parts.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y(value), y2=y(value), class_=zero))
        parts.append(element("text", tick_label(value), x=_LEFT - 6, y=y(value) + 4, class_="tick end"))
    every = max(1, math.ceil(len(sites) / _MOST_NAMES))
    for index, site in enumerate(sites):
        if index % every == 0 or index == len(sites) - 1:
            name = site.removeprefix("resid:")
            parts.append(element("text", name, x=x(index), y=_HEIGHT - _BOTTOM + 17, class_="tick middle"))
    middle = (x.start + x.end) / 2
    parts.append(element("text", axis, x=middle, y=_HEIGHT - 6, class_="tick middle"))
    return parts


def _drawn(line: LayerLine, x: Scale, y: Scale) -> list[Markup]:
    known = [(index, value) for index, value in enumerate(line.values) if math.isfinite(value)]
    parts: list[Markup] = []
    if len(known) > 1:
        points = [(x(index), y(value)) for index, value in known]
        parts.append(element("path", d=path_through(points), class_=f"line {line.tone}"))
    for index, value in known:
        if line.low and line.high and math.isfinite(line.low[index]) and math.isfinite(line.high[index]):
            ends = {"y1": y(line.low[index]), "y2": y(line.high[index])}
            parts.append(element("line", x1=x(index), x2=x(index), **ends, class_=f"whisker {line.tone}"))
        said = element("title", f"{line.label}, block {index}: {value:.3g}")
        parts.append(
            element("circle", said, cx=x(index), cy=y(value), r=4 if line.strong else 2.5, class_=f"dot {line.tone}")
        )
    return parts


def _labels(lines: Sequence[LayerLine], x: Scale, y: Scale) -> list[Markup]:
    """Names at the lines' ends, pushed apart where they would lie on each other."""
    last = [(next((v for v in reversed(line.values) if math.isfinite(v)), math.nan), line) for line in lines]
    placed = sorted(((y(value), line) for value, line in last if math.isfinite(value)), key=lambda end: end[0])
    heights = [at for at, _ in placed]
    for number in range(1, len(heights)):
        heights[number] = max(heights[number], heights[number - 1] + 14)
    shift = max(0.0, heights[-1] - (_HEIGHT - _BOTTOM)) if heights else 0.0
    return [
        element("text", line.label, x=x.end + 10, y=at - shift + 4, class_=f"label {line.tone}")
        for at, (_, line) in zip(heights, placed, strict=True)
    ]
