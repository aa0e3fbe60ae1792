"""What does a person see of a steered model? One page: its answers side by side, and what the steering costs."""

from __future__ import annotations

import json
from pathlib import Path

from markupsafe import Markup

from diffing.durable import write_atomic
from diffing.persona.budget import SolvedStrength
from diffing.persona.steering_sheet import SteeringSheet
from tracker.report.page import finite, render_page
from tracker.report.svg import Scale, drawing, element, tick_label, ticks

PAGE_NAME = "steering.html"
_ROWS = 200


def write_steering_report(sheet: SteeringSheet, folder: Path | str) -> Path:
    """Writes `steering.html` beside the twin `steering.json`; the same answers give the same bytes.

    Returns:
        The page's path.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    twin = json.dumps(finite(sheet.to_json()), indent=1, sort_keys=True, ensure_ascii=False)
    write_atomic(folder / "steering.json", twin + "\n")
    return write_atomic(folder / PAGE_NAME, render_steering_page(sheet))


def render_steering_page(sheet: SteeringSheet) -> str:
    """The page as text."""
    return render_page(
        "steering.html",
        title=f"{sheet.model}, steered",
        data={"arms": list(sheet.arms), "twin": "steering.json"},
        sheet=sheet,
        headline=_headline(sheet),
        rows=sheet.rows[:_ROWS],
        rows_left_out=max(0, len(sheet.rows) - _ROWS),
        curve=budget_curve(sheet.solved) if sheet.solved is not None else "",
    )


def budget_curve(solved: SolvedStrength) -> Markup:
    """Divergence on neutral prompts at every strength that was measured, with the budget and what was solved."""
    width, height = 640, 260
    points = [(abs(one.strength), one) for one in solved.trace]
    # What was tried far beyond the budget would flatten the part that matters.
    top = max(2 * solved.budget, solved.spent.divergence * 1.2)
    shown = sorted(((at, one) for at, one in points if one.divergence <= top), key=lambda pair: pair[0])
    x, y = Scale(0, max(at for at, _ in shown) * 1.04 or 1.0, 56, width - 20), Scale(0, top, height - 46, 14)
    parts: list[Markup] = []
    for value in ticks(0, top, 4):
        parts.append(element("line", x1=x.start, x2=x.end, y1=y(value), y2=y(value), class_="grid"))
        parts.append(element("text", tick_label(value), x=x.start - 8, y=y(value) + 4, class_="tick end"))
    for value in ticks(0, shown[-1][0] or 1.0, 6):
        parts.append(element("text", tick_label(value), x=x(value), y=height - 26, class_="tick middle"))
    level = y(solved.budget)
    parts.append(element("line", x1=x.start, x2=x.end, y1=level, y2=level, class_="whisker alarm"))
    parts.append(element("text", "budget", x=x.end - 4, y=level - 6, class_="tick end"))
    line = " ".join(f"{x(at):.1f},{y(one.divergence):.1f}" for at, one in shown)
    parts.append(element("polyline", points=line, class_="whisker quiet"))
    for at, one in shown:
        here = "good" if one.strength == solved.strength else "quiet"
        parts.append(
            element("circle", cx=x(at), cy=y(one.divergence), r=5 if here == "good" else 3, class_=f"mark {here}")
        )
    parts.append(element("text", "strength", x=(x.start + x.end) / 2, y=height - 6, class_="tick middle"))
    parts.append(element("text", "nats a token", x=x.start + 4, y=10, class_="tick"))
    return drawing(width, height, *parts, title="What steering costs", description=str(solved), class_="pareto")


def _headline(sheet: SteeringSheet) -> str:
    traits = ", ".join(dict.fromkeys(one.rsplit(" ", 2)[0] for one in sheet.vectors))
    most = max(range(len(sheet.changed)), key=lambda at: sheet.changed[at])
    return (
        f"{sheet.changed[most]:.0%} of {len(sheet.rows)} answers change when {traits} is steered "
        f"({sheet.arms[most + 1]})."
    )
