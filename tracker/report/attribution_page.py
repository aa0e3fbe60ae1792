"""What does a person see of an attribution? One page that says which rows did it, and how far to believe it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attribution.groups import RowGroup, SourceShare, Theme
from attribution.ranking import Attribution, AttributionRow
from diffing.durable import write_atomic
from tracker.report.attribution_words import attribution_headline, attribution_story
from tracker.report.charts import bar, interval
from tracker.report.counterfactual_view import counterfactual_view
from tracker.report.heat import passage
from tracker.report.page import LIMIT_BYTES, render_page

PAGE_NAME = "attribution.html"
_BUDGETS = ((40, 12), (20, 8), (10, 4))  # rows shown that pushed up and that pushed down


def write_attribution_report(result: Attribution, folder: Path | str) -> Path:
    """Writes `attribution.html` beside the twin `attribution.json`; the same result gives the same bytes.

    Returns:
        The page's path.
    """
    result.save(folder)
    return write_atomic(Path(folder) / PAGE_NAME, render_attribution_page(result))


def render_attribution_page(result: Attribution) -> str:
    """The page as text; where rows are long it shows fewer of them and says so."""
    html = ""
    for up, down in _BUDGETS:
        html = render_page(
            "attribution.html",
            title=f"Which rows did it: {result.query}",
            data={"query": result.query, "n_rows": result.n_rows, "twin": "attribution.json"},
            **attribution_view(result, up, down),
        )
        if len(html.encode()) < LIMIT_BYTES:
            break
    return html


def attribution_view(result: Attribution, most_up: int, most_down: int) -> dict[str, Any]:
    """Everything the template names."""
    by_name = {row.example_id: row for row in result.rows}
    groups = [group for group in result.groups if group.examples[0] in by_name] or _single_groups(result)
    held = sorted((row for row in result.rows if row.score < 0), key=lambda row: row.score)
    largest = max((abs(row.score) for row in result.rows), default=0.0)
    return {
        "result": result,
        "headline": attribution_headline(result),
        "story": attribution_story(result),
        "figures": _figures(result),
        "again": counterfactual_view(result.counterfactual),
        "sources": [_source(source) for source in result.sources],
        "themes": _themes(result.themes, by_name),
        "rows": [_group(result, group, by_name, largest) for group in groups[:most_up]],
        "rows_left_out": max(0, len(groups) - most_up),
        "held": [_row(result, row, largest, "base") for row in held[:most_down]],
        "provenance": _provenance(result),
    }


def _figures(result: Attribution) -> dict[str, Any]:
    positive = result.strongest
    return {
        "top_share": sum(row.share for row in positive),
        "n_top": len(positive),
        "repeats": sum(len(group.examples) - 1 for group in result.groups),
        "lexical": result.lexical,
    }


def _source(source: SourceShare) -> dict[str, Any]:
    largest = max(1e-9, min(1.0, max(source.high, source.row_share) * 1.05))
    return {
        "source": source,
        "drawn": interval(source.push_share, source.low, source.high, largest=largest),
        # Above its share of the rows with the whole interval: more push than its size gives it.
        "tone": "tuned" if source.low > source.row_share else "base" if source.high < source.row_share else "quiet",
    }


def _themes(themes: Sequence[Theme], by_name: dict[str, AttributionRow]) -> list[dict[str, Any]]:
    largest = max((theme.share for theme in themes), default=0.0)
    examples = [next((by_name[name] for name in theme.examples if name in by_name), None) for theme in themes]
    return [
        {"theme": theme, "example": example, "bar": bar(theme.share, largest, tone="tuned")}
        for theme, example in zip(themes, examples, strict=True)
    ]


def _group(result: Attribution, group: RowGroup, by_name: dict[str, AttributionRow], largest: float) -> dict[str, Any]:
    shown = _row(result, by_name[group.examples[0]], largest, "tuned")
    return {**shown, "share": group.share, "repeats": len(group.examples) - 1, "exact": group.exact}


def _row(result: Attribution, row: AttributionRow, largest: float, tone: str) -> dict[str, Any]:
    return {
        "row": row,
        "share": row.share,
        "repeats": 0,
        "exact": True,
        "bar": bar(abs(row.score), largest, tone=tone, width=90),
        "marked": _marked(result, row),
    }


def _marked(result: Attribution, row: AttributionRow) -> Any:
    found = result.tokens.get(row.example_id)
    if found is None:
        return None
    sign = 1.0 if row.score >= 0 else -1.0
    values = [sign * push for push in found.pushes]
    largest = max((value for value in values if math.isfinite(value)), default=0.0)
    return passage(found.tokens, values, largest=largest)


def _single_groups(result: Attribution) -> Sequence[RowGroup]:
    return [RowGroup((row.example_id,), row.share, True) for row in result.strongest]


def _provenance(result: Attribution) -> list[tuple[str, str]]:
    return [
        ("query", result.query),
        ("method", result.method),
        ("checkpoints", ", ".join(f"step {step}" for step in result.steps) or "the one given"),
        ("training rows", str(result.n_rows)),
        ("rows kept in attribution.json", str(len(result.rows))),
    ]
