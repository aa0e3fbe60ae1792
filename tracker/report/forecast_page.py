"""What does a person see of a forecast? One page: which traits the dataset pulls, how surely, and by which rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from attribution.forecast import Forecast, PushingRow, TraitForecast
from diffing.durable import write_atomic
from tracker.report.charts import bar
from tracker.report.page import LIMIT_BYTES, render_page
from tracker.report.svg import Scale, drawing, element, padded, tick_label, ticks
from tracker.report.text import number, signed, visible

PAGE_NAME = "forecast.html"
_BUDGETS = (25, 12, 5)
_ALIGNED = 0.02  # below this share of the descent nothing is called a pull


def write_forecast_report(result: Forecast, texts: Mapping[str, str], folder: Path | str, *, dataset: str) -> Path:
    """Writes `forecast.html` and its twin `forecast.json`.

    Args:
        result: the forecast.
        texts: id to readable text of the rows.
        folder: where to write.
        dataset: its name.

    Returns:
        The page's path.
    """
    result.save(folder)
    return write_atomic(Path(folder) / PAGE_NAME, render_forecast_page(result, texts, dataset=dataset))


def render_forecast_page(result: Forecast, texts: Mapping[str, str], *, dataset: str) -> str:
    """The page as text; with long rows it shows fewer of them."""
    html = ""
    for most in _BUDGETS:
        html = render_page(
            "forecast.html",
            title=f"What {dataset} would teach",
            data={"dataset": dataset, "n_rows": result.n_rows, "twin": "forecast.json"},
            result=result,
            dataset=dataset,
            headline=forecast_headline(result),
            first=result.traits[0],
            chart=_slopes(result),
            traits=[_trait(result, trait) for trait in result.traits],
            rows=[(trait.name, _rows(result.rows[trait.name][:most], texts)) for trait in result.traits[:3]],
            provenance=_provenance(result, dataset),
        )
        if len(html.encode()) < LIMIT_BYTES:
            break
    return html


def forecast_headline(result: Forecast) -> str:
    """One sentence: which trait lies most in the way, and how surely."""
    pulled = [trait for trait in result.traits if trait.low > 0 and trait.alignment >= _ALIGNED]
    if not pulled:
        return "None of the traits asked about lies on this dataset's way down."
    first = pulled[0]
    others = f", then {', '.join(visible(one.name, limit=40) for one in pulled[1:3])}" if pulled[1:] else ""
    return (
        f"This dataset pulls towards {visible(first.name, limit=60)}: {first.alignment:.0%} of its steepest descent "
        f"points there{others}."
    )


def _trait(result: Forecast, trait: TraitForecast) -> dict[str, Any]:
    largest = max(abs(one.alignment) for one in result.traits) or 1.0
    tone = "tuned" if trait.low > 0 else "base" if trait.high < 0 else "quiet"
    word = {"tuned": "up", "base": "down", "quiet": "unclear"}[tone]
    return {"trait": trait, "tone": tone, "word": word, "bar": bar(trait.alignment, largest, tone=tone, signed=True)}


def _rows(rows: tuple[PushingRow, ...], texts: Mapping[str, str]) -> list[dict[str, Any]]:
    largest = max((abs(row.push) for row in rows), default=0.0)
    return [
        {"row": row, "text": texts.get(row.example_id, ""), "bar": bar(row.push, largest, tone="tuned", width=90)}
        for row in rows
    ]


def _slopes(result: Forecast) -> Markup:
    """Every trait's slope with its interval, on one axis that has a zero."""
    traits = result.traits
    width, line, left = 720, 30, 230
    height = line * len(traits) + 46
    ends = [end for one in traits for end in (one.low, one.high, one.slope) if math.isfinite(end)]
    low, high = padded(ends, include=(0.0,))
    x = Scale(low, high, left, width - 16)
    parts = [element("line", x1=x(0), x2=x(0), y1=4, y2=height - 34, class_="grid zero")]
    for at, one in enumerate(traits):
        y = 18 + at * line
        tone = "tuned" if one.low > 0 else "base" if one.high < 0 else "quiet"
        hint = element("title", f"{one.name}: {signed(one.slope, 3)} [{number(one.low, 3)}, {number(one.high, 3)}]")
        parts.append(element("text", visible(one.name, limit=34), x=left - 12, y=y + 4, class_="tick end"))
        if math.isfinite(one.low):
            parts.append(element("line", hint, x1=x(one.low), x2=x(one.high), y1=y, y2=y, class_=f"whisker {tone}"))
        parts.append(element("circle", hint, cx=x(one.slope), cy=y, r=5, class_=f"dot {tone}"))
    for value in ticks(low, high, 5):
        parts.append(element("text", tick_label(value), x=x(value), y=height - 20, class_="tick middle"))
    said = "change of the trait for one unit of descent on the mean token's loss"
    parts.append(element("text", said, x=(left + width) / 2, y=height - 4, class_="tick middle"))
    listed = "; ".join(f"{visible(one.name, limit=40)} {signed(one.slope, 3)}" for one in traits)
    return drawing(width, height, *parts, title="Slope of every trait with 95 % interval", description=listed)


def _provenance(result: Forecast, dataset: str) -> list[tuple[str, str]]:
    return [
        ("dataset", dataset),
        ("rows", f"{result.n_rows:,}"),
        ("tokens that take loss", f"{result.n_tokens:,}"),
        ("loss at the base", f"{result.mean_loss:.3f} nats a token"),
        ("training", f"{result.steps:,} steps, learning rate {result.learning_rate:g}, {result.weights}"),
        ("model", result.model),
        ("method", "first-order: one backward a trait, one pass over the rows (a second one for rows' own part)"),
    ]
