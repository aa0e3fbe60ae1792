"""What does a person see of an alert's explanation? One page a screen long, with its JSON twin beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from attribution import AttributionRow
from diffing.durable import write_atomic
from tracker.explanation import Explanation, SpecificityAt, explanation_path
from tracker.report.charts import bar
from tracker.report.explanation_words import explanation_headline, explanation_story, figure, reading_words
from tracker.report.names import is_share, signal_title, unit_words
from tracker.report.page import render_page
from tracker.report.step_chart import NARROW, WIDE, Line, Mark, Panel, step_chart
from tracker.report.svg import Scale, drawing, element, padded, tick_label, ticks
from tracker.report.text import number, places, visible
from tracker.specificity import STYLES

_UP, _DOWN = 20, 5
_JUDGED = {
    "p_value": "p-value beside the bank",
    "level": "level of the rule",
    "benign_runs": "benign runs in the bank",
    "benign_largest": "the furthest benign run",
    "watched_together": "signals watched together",
    "horizon": "steps that the bank vouches for",
    "e_value": "e-value",
    "series": "series in the family",
    "evidence": "evidence (Shiryaev–Roberts sum)",
    "needed": "average run length, at least",
    "judged": "measurements judged",
    "baseline_level": "level of its baseline",
    "baseline_sigma": "standard deviation of its baseline",
    "baseline_memory": "lag-one correlation of its baseline",
    "baseline_n": "measurements of its baseline",
}


def write_explanation_page(found: Explanation, run_dir: Path | str) -> Path:
    """Writes the page beside the JSON twin; the same explanation gives the same bytes.

    Returns:
        The page's path.
    """
    twin = found.save(run_dir)
    return write_atomic(twin.with_suffix(".html"), render_explanation_page(found))


def render_explanation_page(found: Explanation) -> str:
    """The page as text."""
    return render_page(
        "explanation.html",
        title=f"Why: {found.alert}",
        data={"alert": found.alert, "step": found.step, "twin": explanation_path("", found.alert).name},
        found=found,
        headline=explanation_headline(found),
        story=explanation_story(found),
        facts=_facts(found),
        wide=_chart(found, WIDE),
        narrow=_chart(found, NARROW),
        parts_made=_parts(found),
        compared=None if found.specificity is None else _compared(found.specificity),
        rows=_rows(found),
    )


def _facts(found: Explanation) -> list[tuple[str, str]]:
    said = [("alert", found.alert), ("signal", found.signal), ("rule", found.rule)]
    said += [
        ("at the start of the run", f"{reading_words(found.start, found)}, step {found.start.step}"),
        (
            "before it began",
            "–" if found.before is None else f"{reading_words(found.before, found)}, step {found.before.step}",
        ),
        ("when it fired", f"{reading_words(found.at, found)}, step {found.step}"),
        ("threshold", figure(found.threshold, found)),
        ("steps above the threshold", f"{found.since} to {found.step}"),
    ]
    if found.reference:
        said.append(("measured against", found.reference))
    said += [(_JUDGED[name], number(value)) for name, value in found.judged.items() if name in _JUDGED]
    step, folder = found.checkpoint or (None, "none on disk")
    said.append(("checkpoint before it", folder if step is None else f"step {step}: {folder}"))
    return said


def _chart(found: Explanation, frame: Any) -> Markup:
    series = [one for one in found.series if math.isfinite(one.value)]
    banded = any(one.low is not None and one.high is not None for one in series)
    line = Line(
        label="",
        steps=[one.step for one in series],
        values=[one.value for one in series],
        low=[math.nan if one.low is None else one.low for one in series] if banded else (),
        high=[math.nan if one.high is None else one.high for one in series] if banded else (),
    )
    floor = found.threshold if math.isfinite(found.threshold) else None
    marks = [Mark(found.since, "", "quiet"), Mark(found.step, f"alert, step {found.step}")]
    if found.checkpoint is not None:
        marks.append(Mark(found.checkpoint[0], f"checkpoint {found.checkpoint[0]}", "quiet"))
    panel = Panel(
        signal_title(found.signal), [line], note=found.unit, floor=floor, floor_label="threshold",
        share=is_share(found.signal),
    )  # fmt: skip
    return step_chart(
        [panel], marks=marks, frame=frame, title=signal_title(found.signal),
        description=f"{explanation_headline(found)} Alert at step {found.step}.",
        class_="wide-only" if frame is WIDE else "narrow-only",
    )  # fmt: skip


def _parts(found: Explanation) -> list[dict[str, Any]]:
    largest = max((abs(part.score) for part in found.parts), default=0.0)
    return [
        {
            "part": part,
            "title": f"{visible(part.signal)}, together" if part.is_kind else signal_title(part.signal),
            "value": "" if part.value is None else f"{places(part.value, 2)} {unit_words(part.unit)}",
            "bar": bar(part.score, largest, tone="other" if part.is_kind else "tuned", signed=True),
        }
        for part in found.parts
    ]


def _compared(at: SpecificityAt) -> dict[str, Any]:
    found = at.found
    others = sorted(found.traits.items(), key=lambda one: (one[0] not in STYLES, -abs(one[1])))
    lines = [(found.trait, "the alert’s own", found.drift, "tuned")]
    lines += [(name, "style" if name in STYLES else "trait", value, "base") for name, value in others]
    largest = max(abs(found.random_high), *(abs(value) for _, _, value, _ in lines))
    return {
        "at": at,
        "found": found,
        "drawn": _strip(at),
        "lines": [
            (name, kind, value, bar(value, largest, tone=tone, signed=True)) for name, kind, value, tone in lines
        ],
    }


def _strip(at: SpecificityAt) -> Markup:
    """Where the drift lies among random directions; nothing where only their quantiles were kept."""
    found, width, height = at.found, 560, 54
    if not found.random_shown:
        return Markup("")
    low, high = padded([found.drift, *found.random_shown], include=[0.0])
    x = Scale(low, high, 10, width - 10)
    parts = [element("line", x1=x.start, x2=x.end, y1=30, y2=30, class_="grid")]
    for value in ticks(low, high, 6):
        parts.append(
            element("line", x1=x(value), x2=x(value), y1=26, y2=34, class_="grid zero" if not value else "grid")
        )
        parts.append(element("text", tick_label(value), x=x(value), y=height - 4, class_="tick middle"))
    parts += [element("circle", cx=x(value), cy=30, r=3, class_="dot quiet") for value in found.random_shown]
    parts.append(element("circle", cx=x(found.drift), cy=30, r=5, class_="dot tuned"))
    anchor = "end" if x(found.drift) > width / 2 else ""
    parts.append(
        element("text", visible(found.trait, limit=30), x=x(found.drift), y=16, class_=f"label tuned {anchor}")
    )
    return drawing(width, height, *parts, title="The drift among random directions", description=(
        f"{visible(found.trait)} at {found.drift:.2f} gap; {len(found.random_shown)} random directions shown, "
        f"95 % of them within {found.random_high:.2f} of zero."))  # fmt: skip


def _rows(found: Explanation) -> dict[str, Any] | None:
    if found.rows is None:
        return None
    up = [row for row in found.rows.rows if row.score > 0][:_UP]
    down = sorted((row for row in found.rows.rows if row.score < 0), key=lambda row: row.score)[:_DOWN]
    largest = max((abs(row.score) for row in (*up, *down)), default=0.0)

    def drawn(rows: Sequence[AttributionRow], tone: str) -> list[dict[str, Any]]:
        return [{"row": row, "bar": bar(abs(row.score), largest, tone=tone, width=90)} for row in rows]

    return {"pushed": found.rows, "up": drawn(up, "tuned"), "down": drawn(down, "base")}
