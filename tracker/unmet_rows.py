"""Which rows would push at these weights as rows do that are known to: rows not met yet, and rows flagged again?

Gradients are taken at the weights as they are when the alarm fires, beside those of some rows that are known: where
gradients of now do not tell flagged from other met rows, they are not believed about unmet ones either.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from attribution.pushes import measure_pushes
from attribution.queries import Query
from diffing.errors import PalimpsestError
from tracker.flagged_rows import FlaggedRows, name_of, two_groups

_REFERENCES = 64  # rows of either kind
_LEAST_AGREED = 0.9  # share of pairs of a flagged and another met row that gradients of now must order alike
_AS_HARD = 0.25  # of what dropped rows push
_log = logging.getLogger(__name__)


def flag_unmet(model: nn.Module, rows: Sequence[Any], flagged: FlaggedRows, query: Query) -> FlaggedRows:
    """The flagged rows, and those among the unmet that push likewise at these weights; the latter stand last.

    Args:
        model: as it was when the alarm fired, with what is trained trainable.
        rows: the whole dataset, tokenised.
        flagged: what the run's own record called out.
        query: what the rows pushed.

    Returns:
        `flagged` itself where there is nothing to add, or where gradients cannot be taken or tell nothing: a warning
        then says why.

    Cost: one forward and backward over the unmet rows and 128 others.
    """
    met = set(flagged.met)
    unmet = [place for place in range(len(rows)) if place not in met]
    others = sorted(met - set(flagged.places))
    known = [_spread(flagged.places), _spread(others)]
    if not unmet or not all(known):
        return flagged
    places = [*known[0], *known[1], *unmet]
    try:
        per_token = _pushes(model, [rows[place] for place in places], query)
    except PalimpsestError as error:
        _log.warning("%d rows that were not met yet stay unjudged: %s", len(unmet), error)
        return flagged
    pushes = np.sqrt(np.maximum(0.0, per_token))
    bad, good = pushes[: len(known[0])], pushes[len(known[0]) : len(known[0]) + len(known[1])]
    agreed = float((bad[:, None] > good[None]).mean())
    if agreed < _LEAST_AGREED:
        _log.warning(
            "%d rows that were not met yet stay unjudged: gradients of now tell flagged from other rows in %.0f %% of "
            "pairs only.", len(unmet), 100 * agreed,
        )  # fmt: skip
        return flagged
    threshold, _ = two_groups(np.concatenate([bad, good]))
    further = sorted(zip(pushes[-len(unmet) :].tolist(), unmet, strict=True), reverse=True)
    added = tuple(place for push, place in further if push > threshold)
    names = tuple(name_of(rows[place]) for place in added)
    return replace(flagged, places=(*flagged.places, *added), names=(*flagged.names, *names))


def as_hard_as(
    model: nn.Module, rows: Sequence[Any], flagged: FlaggedRows, gone: Sequence[Any], query: Query
) -> FlaggedRows:
    """Those flagged rows that push, at these weights, a quarter as hard at least as rows that were dropped before.

    Any rows fall into two groups. Where those that did it are gone already, the stronger half of what is left is no
    reason to drop it.

    Args:
        model: as it was when the alarm fired again.
        rows: the dataset as it is now, tokenised.
        flagged: what the run's record calls out among them.
        gone: rows that earlier recoveries dropped.
        query: what the rows pushed.

    Cost: one forward and backward over the flagged rows and 64 others.
    """
    known = [gone[place] for place in _spread(range(len(gone)))]
    if not known or not flagged.places:
        return flagged
    asked = [*known, *(rows[place] for place in flagged.places)]
    try:
        pushes = _pushes(model, asked, query)
    except PalimpsestError as error:
        _log.warning("%d rows are dropped without a look at what they push now: %s", len(flagged.places), error)
        return flagged
    least = _AS_HARD * float(np.median(pushes[: len(known)]))
    strong = [at for at, push in enumerate(pushes[len(known) :]) if push >= max(least, 0.0)]
    return replace(
        flagged,
        places=tuple(flagged.places[at] for at in strong),
        names=tuple(flagged.names[at] for at in strong),
        pushes=tuple(flagged.pushes[at] for at in strong if at < len(flagged.pushes)),
    )


def _spread(places: Sequence[int]) -> list[int]:
    n = min(len(places), _REFERENCES)
    return [places[at * len(places) // n] for at in range(n)]


def _pushes(model: nn.Module, rows: Sequence[Any], query: Query) -> np.ndarray:
    """Of each row, a token of its answer."""
    found = measure_pushes(model, [_labelled(row) for row in rows], [query])
    return found.scores[0] / np.maximum(1, found.tokens)


def _labelled(row: Any) -> dict[str, Any]:
    """The row with labels, where a collator would make them of its tokens."""
    kept = {key: row[key] for key in ("input_ids", "labels", "id", "example_id") if key in row}
    return kept if "labels" in kept else {**kept, "labels": row["input_ids"]}
