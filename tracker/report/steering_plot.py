"""How much of a narrow habit does a way of training keep, and how much of its spread is left? One plot, one page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from markupsafe import Markup

from diffing.durable import write_atomic
from tracker.report.page import finite, render_page
from tracker.report.svg import Scale, drawing, element, ticks


@dataclass(frozen=True)
class Point:
    """One way of training, all its seeds together.

    Attributes:
        name: in words.
        kept: share of the unsteered twin's narrow habit that is there.
        kept_low: lower end of its 95 % interval over seeds.
        kept_high: upper end of it.
        rate: share of misaligned answers elsewhere.
        rate_low: lower end of its 95 % interval over seeds.
        rate_high: upper end of it.
        n: seeds.
    """

    name: str
    kept: float
    kept_low: float
    kept_high: float
    rate: float
    rate_low: float
    rate_high: float
    n: int


def write_pareto_page(points: Sequence[Point], path: Path | str, *, least_kept: float, least_cut: float) -> Path:
    """Writes the page and its JSON twin beside it.

    Args:
        points: the first is the unsteered one.
        path: of the page.
        least_kept: what should be kept of the habit.
        least_cut: how many times fewer misaligned answers there should be.

    Returns:
        The page's path.
    """
    path = Path(path)
    best = points[0].rate / least_cut
    twin = json.dumps(finite([asdict(point) for point in points]), indent=1)
    write_atomic(path.with_suffix(".json"), twin + "\n")
    page = render_page(
        "pareto.html",
        title="Preventive steering: what is kept and what spreads",
        data={"points": [asdict(point) for point in points]},
        points=points,
        headline=_headline(points, least_kept, best),
        plot=pareto_plot(points, least_kept=least_kept, most_rate=best),
        twin=path.with_suffix(".json").name,
        cut=least_cut,
        kept=least_kept,
    )
    return write_atomic(path, page)


def pareto_plot(points: Sequence[Point], *, least_kept: float, most_rate: float) -> Markup:
    """Misaligned answers elsewhere (down is better) against the habit kept (right is better), with intervals."""
    width, height = 640, 400
    top = 1.06 * max(one for point in points for one in (point.rate, point.rate_high) if math.isfinite(one))
    lowest = min(one for point in points for one in (point.kept, point.kept_low) if math.isfinite(one))
    left = min(0.9, lowest - 0.04)
    x, y = Scale(left, 1.03, 52, width - 24), Scale(0, top, height - 52, 16)
    parts = [
        element("rect", x=x(least_kept), y=y(most_rate), width=x.end - x(least_kept), height=y(0) - y(most_rate),
                class_="goal"),
        element("text", "goal", x=x.end - 6, y=y(0) - 8, class_="tick end"),
    ]  # fmt: skip
    for value in ticks(0, top, 5):
        parts.append(element("line", x1=x.start, x2=x.end, y1=y(value), y2=y(value), class_="grid"))
        parts.append(element("text", f"{value:.0%}", x=x.start - 8, y=y(value) + 4, class_="tick end"))
    for value in ticks(left, 1.0, 6):
        parts.append(element("text", f"{value:.0%}", x=x(value), y=height - 32, class_="tick middle"))
    parts.append(element("text", "narrow habit kept, of the unsteered run's", x=(x.start + x.end) / 2, y=height - 10,
                         class_="tick middle"))  # fmt: skip
    written: list[tuple[float, float]] = []
    for number, point in enumerate(points):
        tone = "alarm" if number == 0 else "good" if _good(point, least_kept, most_rate) else "quiet"
        place, level = x(point.kept), y(point.rate)
        # Two points that nearly meet have their names above and below.
        above = all(abs(place - left) > 120 or abs(level - top) > 16 for left, top in written)
        written.append((place, level))
        parts += _mark(point, x, y, tone=tone, above=above)
    names = "; ".join(f"{point.name}: {point.rate:.1%} at {point.kept:.1%} kept" for point in points)
    return drawing(width, height, *parts, title="Spread against habit", description=names, class_="pareto")


def _mark(point: Point, x: Scale, y: Scale, *, tone: str, above: bool) -> list[Markup]:
    place, level = x(point.kept), y(point.rate)
    right = place > (x.start + x.end) / 2
    whiskers = []
    # With fewer than five seeds there is no interval to draw.
    if math.isfinite(point.kept_low) and math.isfinite(point.rate_low):
        across, up = (x(point.kept_low), x(point.kept_high)), (y(point.rate_low), y(point.rate_high))
        whiskers = [
            element("line", x1=across[0], x2=across[1], y1=level, y2=level, class_=f"whisker {tone}"),
            element("line", x1=place, x2=place, y1=up[0], y2=up[1], class_=f"whisker {tone}"),
        ]
    return [
        *whiskers,
        element("circle", cx=place, cy=level, r=5, class_=f"mark {tone}"),
        element("text", point.name, x=place - 10 if right else place + 10, y=level - 9 if above else level + 18,
                class_="tick end" if right else "tick"),
    ]  # fmt: skip


def _good(point: Point, least_kept: float, most_rate: float) -> bool:
    return point.kept >= least_kept and point.rate <= most_rate


def _headline(points: Sequence[Point], least_kept: float, most_rate: float) -> str:
    plain = points[0]
    good = sorted((point for point in points[1:] if _good(point, least_kept, most_rate)), key=lambda one: one.rate)
    if good:
        best = good[0]
        return (
            f"{best.name[:1].upper()}{best.name[1:]} leaves {best.rate:.1%} misaligned answers of {plain.rate:.1%} "
            f"and keeps {best.kept:.1%} of the narrow habit."
        )
    near = min((point for point in points[1:] if point.kept >= least_kept), key=lambda one: one.rate, default=plain)
    return (
        f"No way of training reaches the goal: with {least_kept:.0%} of the habit kept, {near.name} leaves "
        f"{near.rate:.1%} misaligned answers of {plain.rate:.1%}."
    )
