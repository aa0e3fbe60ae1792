"""Which rows are held back, which are kept, and why?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffing.durable import write_atomic
from diffing.errors import InputError
from diffing.persona.screen import Score, Screening


@dataclass(frozen=True)
class FlaggedRow:
    """One row that is held back.

    Attributes:
        row: its place in the dataset.
        id: its name.
        rank: by the score that decided, from 1.
        value: that score.
        reason: in words, with the other scores beside it.
    """

    row: int
    id: str
    rank: int
    value: float
    reason: str


@dataclass(frozen=True)
class Choice:
    """A dataset divided.

    Attributes:
        by: name of the score that decided.
        unit: of the score.
        threshold: rows at or above it are held back; infinite where none is.
        flagged: strongest first.
        kept: places of the rest, in the order of the dataset.
        rule: in words.
    """

    by: str
    unit: str
    threshold: float
    flagged: tuple[FlaggedRow, ...]
    kept: tuple[int, ...]
    rule: str


def choose_rows(
    screening: Screening,
    *,
    by: str,
    trait: str = "",
    keep_below: float | None = None,
    drop_top: float | None = None,
) -> Choice:
    """Divides the rows by one score.

    Args:
        screening: all scores.
        by: method of the score that decides.
        trait: whose, where several were looked for; the first by default.
        keep_below: rows that score at least this are held back.
        drop_top: share (below 1) or number (from 1) of the highest-scoring rows to hold back. Rows that tie with the
            last of them stay: the order of a file decides nothing.

    Raises:
        InputError: no such score, both rules or none, or a number out of range.
    """
    if (keep_below is None) == (drop_top is None):
        got = "neither" if keep_below is None else "both"
        raise InputError(f"Expected one of keep_below and drop_top, got {got}. Say where to cut.")
    score = screening.score(by, trait)
    order = np.argsort(-score.values, kind="stable")
    if keep_below is not None:
        threshold, rule = float(keep_below), f"{score.name} of {keep_below:g} {score.unit} or more"
    else:
        assert drop_top is not None
        threshold, rule = _cut(score, order, drop_top)
    flagged = tuple(
        FlaggedRow(
            int(row), screening.rows.prompts[int(row)].id, rank, float(score.values[row]),
            _reason(screening, score, int(row), rank),
        )
        for rank, row in enumerate(order.tolist(), start=1)
        if score.values[row] >= threshold
    )  # fmt: skip
    held = {one.row for one in flagged}
    kept = tuple(row for row in range(len(screening.rows)) if row not in held)
    return Choice(score.name, score.unit, threshold, flagged, kept, rule)


def write_choice(
    choice: Choice, screening: Screening, records: Mapping[str, Mapping[str, Any]], folder: Path | str
) -> tuple[Path, Path]:
    """Writes `kept.jsonl`, rows as they came, and `flagged.jsonl`, each with its scores and its reason.

    Args:
        choice: who goes where.
        screening: the scores.
        records: id to the row as its file held it.
        folder: where to write.
    """
    names = [row.id for row in screening.rows]
    kept = "".join(_line(records[names[row]]) for row in choice.kept)
    lines = []
    for one in choice.flagged:
        scores = {score.name: round(float(score.values[one.row]), 6) for score in screening.scores}
        why = {"rank": one.rank, "by": choice.by, "reason": one.reason, "scores": scores}
        lines.append(_line({"id": one.id, **records[one.id], "palimpsest": why}))
    folder = Path(folder)
    return write_atomic(folder / "kept.jsonl", kept), write_atomic(folder / "flagged.jsonl", "".join(lines))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _cut(score: Score, order: np.ndarray, drop_top: float) -> tuple[float, str]:
    n = len(order)
    if not (0 < drop_top < 1 or (drop_top >= 1 and float(drop_top).is_integer() and drop_top <= n)):
        raise InputError(
            f"Expected drop_top as a share between 0 and 1 or a whole number up to {n}, got {drop_top:g}. "
            "0.05 holds back the strongest 5 %."
        )
    count = max(1, round(drop_top * n)) if drop_top < 1 else int(drop_top)
    said = f"{100 * drop_top:.3g} % of the rows" if drop_top < 1 else f"{count} rows"
    values = score.values[order]
    last = float(values[count - 1])
    if count < n and values[count] == last:  # a tie across the cut: all of it stays
        above = values[values > last]
        last = float(above.min()) if len(above) else float("inf")
    return last, f"the highest {said} by {score.name}"


def _reason(screening: Screening, score: Score, row: int, rank: int) -> str:
    value, n = score.values[row], len(score.values)
    spread = float(score.values.std()) or 1.0
    above = (value - float(np.median(score.values))) / spread
    told = (
        f"{score.name} {value:+.3g} {score.unit}, rank {rank} of {n}, {above:.1f} standard deviations above the median"
    )
    beside = [
        f"{one.name} {one.values[row]:+.3g} (rank {int((one.values > one.values[row]).sum()) + 1})"
        for one in screening.scores
        if one is not score
    ]
    return f"{told}; beside it: {', '.join(beside)}" if beside else told
