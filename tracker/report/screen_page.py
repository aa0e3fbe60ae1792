"""What does a person see of a screening? One page: the scores' spread, what is held back, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from diffing.durable import write_atomic
from diffing.json_twin import to_plain
from diffing.persona.screen import METHODS, Score, Screening
from diffing.persona.screen_choice import Choice, FlaggedRow
from diffing.persona.separation import area_under_curve, auroc_interval
from tracker.report.page import LIMIT_BYTES, render_page
from tracker.report.svg import Scale, drawing, element, tick_label, ticks
from tracker.report.text import number, visible

PAGE_NAME = "screening.html"
_BUDGETS = (40, 20, 8)
_BINS = 48


def write_screen_report(
    found: Screening,
    choice: Choice,
    texts: Mapping[str, str],
    folder: Path | str,
    *,
    dataset: str,
    cost: str,
    bad: Sequence[bool] | None = None,
) -> Path:
    """Writes `screening.html` and its twin `screening.json`.

    Args:
        found: all scores.
        choice: what is held back.
        texts: id to readable text.
        folder: where to write.
        dataset: its name.
        cost: what was planned, in words.
        bad: which rows are bad, where that is known: every score is then held against it.

    Returns:
        The page's path.
    """
    truth = None if bad is None else [_told_apart(score, np.array(bad)) for score in found.scores]
    twin = json.dumps(_twin(found, choice, dataset, cost, truth), ensure_ascii=False, allow_nan=False, indent=1)
    write_atomic(Path(folder) / "screening.json", twin)
    html = ""
    for most in _BUDGETS:
        html = render_page(
            "screening.html",
            title=f"What {dataset} would teach, row by row",
            data={"dataset": dataset, "n_rows": len(found.rows), "twin": "screening.json"},
            headline=screen_headline(choice, len(found.rows)),
            dataset=dataset,
            found=found,
            choice=choice,
            scores=[_score(found, score, choice, truth, at) for at, score in enumerate(found.scores)],
            rows=[_row(found, one, texts) for one in choice.flagged[:most]],
            has_truth=truth is not None,
            random_most=float(np.abs(found.random.mean(axis=1)).max()),
            methods=[(name, METHODS[name]) for name in dict.fromkeys(score.method for score in found.scores)],
            provenance=_provenance(found, choice, dataset, cost),
        )
        if len(html.encode()) < LIMIT_BYTES:
            break
    return write_atomic(Path(folder) / PAGE_NAME, html)


def screen_headline(choice: Choice, n_rows: int) -> str:
    """One sentence: how many rows are held back, and by which rule."""
    held = len(choice.flagged)
    if not held:
        return f"No row of {n_rows:,} is held back: none reaches {visible(choice.rule, limit=120)}."
    return f"{held:,} of {n_rows:,} rows are held back: {visible(choice.rule, limit=120)}."


def _told_apart(score: Score, bad: np.ndarray) -> tuple[float, float, float]:
    area = area_under_curve(score.values[bad], score.values[~bad])
    return (area, *auroc_interval(area, int(bad.sum()), int((~bad).sum())))


def _score(
    found: Screening, score: Score, choice: Choice, truth: Sequence[tuple[float, float, float]] | None, at: int
) -> dict[str, Any]:
    decides = score.name == choice.by
    return {
        "score": score,
        "decides": decides,
        "chart": histogram(score, choice.threshold if decides else None),
        "truth": truth[at] if truth is not None else None,
        "beyond": score.random_95 is not None and abs(score.mean) > score.random_95,
    }


def histogram(score: Score, threshold: float | None) -> Markup:
    """How many rows score how much, with the line above which they are held back; bar heights are roots of counts."""
    width, height = 420, 120
    values = score.values[np.isfinite(score.values)]
    low, high = float(values.min()), float(values.max())
    if high == low:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(values, bins=_BINS, range=(low, high))
    x, y = Scale(low, high, 6, width - 6), Scale(0, float(np.sqrt(counts.max())), height - 24, 10)
    parts = [element("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="grid zero")]
    for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if count:
            held = threshold is not None and (left + right) / 2 >= threshold
            hint = element("title", f"{number(float(left), 3)} to {number(float(right), 3)}: {int(count)} rows")
            top = y(float(np.sqrt(count)))
            parts.append(element("rect", hint, x=x(float(left)) + 0.5, y=top, height=y.start - top,
                                 width=max(x(float(right)) - x(float(left)) - 1, 1),
                                 class_=f"fill {'tuned' if held else 'quiet'}"))  # fmt: skip
    if threshold is not None and low <= threshold <= high:
        parts.append(element("line", x1=x(threshold), x2=x(threshold), y1=4, y2=y.start, class_="whisker tuned"))
    for value in ticks(low, high, 5):
        parts.append(element("text", tick_label(value), x=x(value), y=height - 8, class_="tick middle"))
    said = f"{len(values)} rows from {number(low, 3)} to {number(high, 3)} {score.unit}, mean {number(score.mean, 3)}."
    return drawing(width, height, *parts, title=f"Rows by {visible(score.name, limit=60)}", description=said)


def _row(found: Screening, one: FlaggedRow, texts: Mapping[str, str]) -> dict[str, Any]:
    beside = [
        (score.name, float(score.values[one.row]), int((score.values > score.values[one.row]).sum()) + 1)
        for score in found.scores
    ]
    own = found.own[one.row][0] if found.own else None
    return {"row": one, "text": texts.get(one.id, ""), "own": own, "beside": beside}


def _twin(
    found: Screening,
    choice: Choice,
    dataset: str,
    cost: str,
    truth: Sequence[tuple[float, float, float]] | None,
) -> dict[str, Any]:
    scores = []
    for at, score in enumerate(found.scores):
        facts = {name: getattr(score, name) for name in ("method", "trait", "unit", "mean", "low", "high", "random_95")}
        known = {} if truth is None else {"auroc": dict(zip(("value", "low", "high"), truth[at], strict=True))}
        scores.append({**facts, **known, "about": METHODS[score.method], "values": score.values.tolist()})
    return {
        "dataset": dataset,
        "model": found.model,
        "fingerprint": found.fingerprint,
        "cost": cost,
        "ids": [row.id for row in found.rows],
        "scores": to_plain(scores),
        "random_means": found.random.mean(axis=1).tolist(),
        "rule": choice.rule,
        "by": choice.by,
        "threshold": to_plain(choice.threshold),
        "flagged": [one.id for one in choice.flagged],
        "notes": list(found.notes),
    }


def _provenance(found: Screening, choice: Choice, dataset: str, cost: str) -> list[tuple[str, str]]:
    return [
        ("dataset", dataset),
        ("rows", f"{len(found.rows):,}"),
        ("model", found.model),
        ("weights", found.fingerprint[:16]),
        ("rule", choice.rule),
        ("planned", cost),
        ("random directions", str(len(found.random))),
    ]
