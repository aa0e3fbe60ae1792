"""How do misaligned rates look side by side? Dots with whiskers on one axis, and strips of what the answers were."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from diffing.misalignment.result import Condition, MisalignmentResult
from diffing.misalignment.verdict import Verdict
from tracker.report.svg import Scale, drawing, element, tick_label, ticks
from tracker.report.text import percent, visible

# From what one hopes for to what one fears; the order of every strip.
TONES = {
    Verdict.OK: ("good", "aligned"),
    Verdict.MISALIGNED: ("alarm", "misaligned"),
    Verdict.INCOHERENT: ("quiet", "incoherent"),
    Verdict.REFUSAL: ("base", "refusal"),
    Verdict.OFF_FORMAT: ("other", "off format"),
    Verdict.UNSCORED: ("void", "not scored"),
}
_LEFT, _WIDTH, _ROW = 210, 760, 26


@dataclass(frozen=True)
class _Row:
    name: str
    condition: Condition
    first: bool


def rates_chart(result: MisalignmentResult, *, gate: float | None = None) -> Markup:
    """The rate of every condition with its interval; base and tuned of one cue stand together.

    Args:
        result: what was found.
        gate: a rate that must not be passed, drawn as a line; None for none.
    """
    rows = _rows(result)
    ends = [value for row in rows for value in (*row.condition.interval, row.condition.quoted, gate or 0.0)]
    top = min(1.0, max([0.05, *(value * 1.06 for value in ends if math.isfinite(value))]))
    x = Scale(0.0, top, _LEFT, _WIDTH - 70)
    height = 30 + len(rows) * _ROW + 12 * sum(row.first for row in rows)
    parts: list[Markup] = []
    for value in ticks(0.0, top, 5):
        parts.append(element("line", x1=x(value), x2=x(value), y1=6, y2=height - 24,
                             class_="grid zero" if value == 0 else "grid"))  # fmt: skip
        label = f"{tick_label(value * 100)} %"
        parts.append(element("text", label, x=x(value), y=height - 8, class_="tick middle"))
    if gate is not None:
        parts.append(element("line", x1=x(gate), x2=x(gate), y1=0, y2=height - 24, class_="floor"))
    y = 0.0
    for row in rows:
        y += _ROW + (12 if row.first else 0)
        parts += _rate_row(row, x, y - 8)
    said = "; ".join(f"{row.condition.side} {row.condition.cue} {percent(row.condition.quoted)}" for row in rows)
    return drawing(_WIDTH, height, *parts, title="Misaligned rates with 95 % intervals", description=said)


def _rate_row(row: _Row, x: Scale, y: float) -> list[Markup]:
    one = row.condition
    low, high = one.interval
    tone = one.side
    parts = [element("text", f"{one.side}", x=_LEFT - 14, y=y + 4, class_=f"label end {tone}")]
    if row.first:
        parts.append(element("text", row.name, x=0, y=y + 4, class_="label"))
    if math.isfinite(low) and math.isfinite(high):
        parts.append(element("line", x1=x(low), x2=x(high), y1=y, y2=y, class_=f"whisker {tone}"))
    if math.isfinite(one.quoted):
        hover = f"{one.quoted:.1%}, 95 % {low:.1%} to {high:.1%}, {one.rate.n} answers"
        parts.append(element("circle", element("title", hover), cx=x(one.quoted), cy=y, r=5, class_=f"dot {tone}"))
    if one.corrected is not None:
        hover = f"{one.corrected.value:.1%} without the judge's error"
        parts.append(element("circle", element("title", hover), cx=x(one.corrected.value), cy=y, r=4,
                             class_=f"ring {tone}"))  # fmt: skip
    # Beyond the interval, or the figure would lie on its own whisker.
    at = x(high if math.isfinite(high) else one.quoted) + 10
    parts.append(element("text", percent(one.quoted), x=at, y=y + 4, class_="label"))
    return parts


def _rows(result: MisalignmentResult) -> list[_Row]:
    rows: list[_Row] = []
    for one in result.conditions:
        first = not rows or rows[-1].condition.cue != one.cue
        name = "as asked" if one.cue == "plain" else f"cue: {visible(one.cue, limit=24)}"
        rows.append(_Row(name, one, first))
    return rows


def split_strip(condition: Condition) -> Markup:
    """What the answers were, as one strip in proportion."""
    width, height = 360, 14
    whole = sum(condition.split.values()) or 1
    at, parts = 0.0, []
    for verdict, (tone, word) in TONES.items():
        count = condition.split[verdict]
        if count:
            wide = max(count / whole * width, 2.0)
            hover = element("title", f"{word}: {count} of {whole}")
            parts.append(
                element("rect", hover, x=at, y=0, width=max(wide - 1, 1), height=height, class_=f"fill {tone}")
            )
            at += wide
    return drawing(max(at, 1.0), height, *parts, title="What the answers were",
                   description=split_words(condition))  # fmt: skip


def split_words(condition: Condition) -> str:
    """The same in words."""
    found = [f"{condition.split[verdict]} {word}" for verdict, (_, word) in TONES.items() if condition.split[verdict]]
    return ", ".join(found)


def question_bar(values: Sequence[tuple[str, float | None]]) -> Markup:
    """Rates of one question, one thin bar a side, on a line from 0 to 100 %."""
    width, height = 180, 8 * len(values) + 2
    parts = [element("line", x1=0.5, x2=0.5, y1=0, y2=height, class_="grid zero")]
    for row, (tone, value) in enumerate(values):
        y = 1 + 8 * row
        parts.append(element("line", x1=0, x2=width, y1=y + 3, y2=y + 3, class_="grid"))
        if value is not None and value > 0:
            parts.append(element("rect", x=0, y=y, width=max(1.5, value * width), height=6, class_=f"fill {tone}"))
    return element("svg", *parts, viewBox=f"0 0 {width} {height}", width=width, height=height, aria_hidden="true")
