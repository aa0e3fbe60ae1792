"""What does a person see of an extracted persona? One page: how it was asked for, where it is read, where it steers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from diffing.durable import write_atomic
from diffing.persona.extraction import ExtractionRecord, VectorRow
from diffing.persona.keep import Kept
from diffing.persona.sweep_result import Estimate, LayerSweep, SweepPoint
from tracker.report.page import render_page
from tracker.report.persona_charts import LayerLine, layer_chart
from tracker.report.text import number, signed

PAGE_NAME = "extraction.html"
_POOLINGS = {
    "response_mean": "mean over the answer",
    "last_prompt": "last token before the answer",
    "prompt_mean": "mean over the prompt",
}


def write_persona_report(record: ExtractionRecord, folder: Path | str) -> Path:
    """Writes `extraction.html` beside the twin `extraction.json`; the same record gives the same bytes.

    Returns:
        The page's path.
    """
    record.save(folder)
    return write_atomic(Path(folder) / PAGE_NAME, render_persona_page(record))


def render_persona_page(record: ExtractionRecord) -> str:
    """The page as text."""
    sweep = record.sweep
    return render_page(
        "persona.html",
        title=f"Persona: {record.trait} in {record.model}",
        data={"trait": record.trait, "site": record.site, "twin": "extraction.json"},
        record=record,
        headline=persona_headline(record),
        chosen=record.chosen,
        point=sweep.chosen if sweep else None,
        shares=[
            _kept_view(what, kept) for what, kept in (("Extraction", record.fitted), ("Held out", record.held_out))
        ],
        steering=_steering_chart(sweep) if sweep else None,
        judged=_judged_chart(sweep) if sweep else None,
        points=[_point_view(point, sweep) for point in sweep.points] if sweep else [],
        separations=_separation_charts(record),
        rows=[{"row": row, "pooling": _POOLINGS.get(row.pooling, row.pooling)} for row in record.rows],
    )


def persona_headline(record: ExtractionRecord) -> str:
    """One sentence: where the trait is best brought out, and how well it is told apart there."""
    held_out = record.chosen.separation
    apart = (
        f"held-out answers are told apart there with an AUROC of {number(held_out.auroc)} "
        f"(at least {number(held_out.low, 2)})"
    )
    if held_out.includes_chance:
        apart = "held-out answers are not told apart there"
    if record.sweep is None:
        return f"{record.trait.capitalize()} is read at {record.site}: {apart}."
    if record.sweep.chosen.trait_gain.mean <= 0:
        return f"No layer brings {record.trait} out of the model; at {record.site} it harms least, and {apart}."
    return (
        f"Adding {number(record.sweep.strength)} {'gap' if record.sweep.strength == 1 else 'gaps'} at {record.site} "
        f"brings {record.trait} out best; {apart}."
    )


def _kept_view(what: str, kept: Kept) -> dict[str, Any]:
    reasons = sorted(kept.reasons.items(), key=lambda item: -item[1])
    return {"what": what, "kept": kept, "reasons": reasons}


def _steering_chart(sweep: LayerSweep) -> Markup:
    sites = _sites([point.site for point in sweep.points])
    lines = []
    for strength in sorted({point.strength for point in sweep.points}):
        by_site = {point.site: point for point in sweep.points if point.strength == strength}
        found = [by_site.get(site) for site in sites]
        is_chosen = strength == sweep.strength
        lines.append(
            LayerLine(
                f"{number(strength)} {'gap' if strength == 1 else 'gaps'}",
                [math.nan if point is None else point.log_odds.mean for point in found],
                *(_ends([None if point is None else point.log_odds for point in found]) if is_chosen else ((), ())),
                tone="tuned" if is_chosen else "quiet",
                strong=is_chosen,
            )
        )
    lines.sort(key=lambda line: line.strong)
    return layer_chart(
        sites,
        lines,
        title="Log-odds of trait answers by layer and strength",
        description=f"One line a strength over {len(sites)} layers; the chosen point is {sweep.site}.",
        chosen=sweep.site,
        floor=sweep.random_most,
        floor_label=f"most that {sweep.n_random} random directions reach",
    )


def _judged_chart(sweep: LayerSweep) -> Markup | None:
    judged = [point for point in sweep.points if point.trait_score is not None]
    if not judged:
        return None
    strengths = sorted({point.strength for point in judged})
    lines = []
    for site in _sites([point.site for point in judged]):
        by_strength = {point.strength: point for point in judged if point.site == site}
        found = [by_strength[strength].trait_score if strength in by_strength else None for strength in strengths]
        is_chosen = site == sweep.site
        ends = _ends(found, start=sweep.unsteered_trait) if is_chosen else ((), ())
        values = [_mean(sweep.unsteered_trait), *map(_mean, found)]
        lines.append(LayerLine(site, values, *ends, tone="tuned" if is_chosen else "quiet", strong=is_chosen))
    lines.sort(key=lambda line: line.strong)
    return layer_chart(
        ["0", *(number(strength) for strength in strengths)],
        lines,
        title="Judged trait score by strength",
        description=f"Mean trait score of steered answers at {len(lines)} layers.",
        chosen=number(sweep.strength),
        include=(0.0, 100.0),
        axis="strength, gaps",
    )


def _point_view(point: SweepPoint, sweep: LayerSweep) -> dict[str, Any]:
    return {
        "point": point,
        "is_chosen": (point.site, point.strength) == (sweep.site, sweep.strength),
        "harms": point.trait_gain.mean <= 0,
        "log_odds": _written(point.log_odds),
        "gain": _written(point.trait_gain),
    }


def _written(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return signed(estimate.mean)
    return f"{signed(estimate.mean)} [{signed(estimate.low)}, {signed(estimate.high)}]"


def _separation_charts(record: ExtractionRecord) -> list[dict[str, Any]]:
    charts = []
    for pooling, words in _POOLINGS.items():
        rows = [row for row in record.rows if row.pooling == pooling]
        if rows:
            charts.append({"words": words, "chart": _separation_chart(rows, record, words)})
    return charts


def _separation_chart(rows: Sequence[VectorRow], record: ExtractionRecord, words: str) -> Markup:
    lines = [
        LayerLine(
            "random, 95 %",
            [math.nan if row.null is None else row.null.random_auroc_95 for row in rows],
            tone="quiet",
        ),
        LayerLine(
            record.trait,
            [row.separation.auroc for row in rows],
            [row.separation.low for row in rows],
            [row.separation.high for row in rows],
            tone="tuned",
            strong=True,
        ),
    ]
    return layer_chart(
        [row.site for row in rows],
        lines,
        title=f"Separation of held-out answers by layer, {words}",
        description=f"AUROC with 95 % intervals over {len(rows)} layers.",
        chosen=record.site if rows[0].pooling == record.pooling else None,
        include=(0.5, 1.0),
        floor=0.5,
        floor_label="chance",
    )


def _ends(
    estimates: Sequence[Estimate | None], *, start: Estimate | None = None
) -> tuple[Sequence[float], Sequence[float]]:
    every = [start, *estimates] if start is not None else list(estimates)
    ends = [
        (math.nan, math.nan) if one is None or one.low is None or one.high is None else (one.low, one.high)
        for one in every
    ]
    return [low for low, _ in ends], [high for _, high in ends]


def _mean(estimate: Estimate | None) -> float:
    return math.nan if estimate is None else estimate.mean


def _sites(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))
