"""Which rows does a run's own record of pushes call out?

Rows are told apart by what each pushed beside the rows of its time, not by sums: pushes grow a hundredfold while a
drift gathers way, so that a sum says when a row was met as much as what it is.

There are always two groups: of a run in which nothing is wrong the stronger half of ordinary rows would be called out.
So ask only where an alarm was right. Rows of steps that were not read (`LivePush(budget=...)`) cannot be called out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from attribution.example import ExampleId, Row
from attribution.live_rows import row_names
from diffing.errors import InputError
from tracker.push_journal import PushJournal, Visits

_AROUND = 200  # rows around a step that say what is usual there


@dataclass(frozen=True)
class FlaggedRows:
    """Rows that pushed a trait as the strong half of two groups, strongest first.

    Attributes:
        trait: what they pushed.
        places: positions in the dataset; rows that read the same are all there.
        names: likewise.
        pushes: of those that were met: mean over a row's visits of its push in units of what is usual in those steps.
        threshold: what a push must exceed.
        told_apart: share of the variance of the pushes' roots that lies between the two groups, 0 to 1: near 1 where
            there are two clear kinds of rows, about two thirds where there is one.
        met: positions of the rows that the window met.
        n_rows: rows of the dataset.
        since: first step of the window.
        until: last one.
    """

    trait: str
    places: tuple[int, ...]
    names: tuple[ExampleId, ...]
    pushes: tuple[float, ...]
    threshold: float
    told_apart: float
    met: tuple[int, ...]
    n_rows: int
    since: int
    until: int

    def first(self, share: float) -> FlaggedRows:
        """So many of them at most, strongest first: a share of all rows."""
        most = max(1, math.floor(share * self.n_rows))
        return replace(self, places=self.places[:most], names=self.names[:most], pushes=self.pushes[:most])

    def __repr__(self) -> str:
        window = f"{len(self.met)} met in steps {self.since} to {self.until}"
        return f"FlaggedRows({len(self.places)} of {self.n_rows}, {window})"


def flag_rows(
    run_dir: Path | str,
    query: str,
    rows: Sequence[Row],
    *,
    since: int = 1,
    until: int | None = None,
    share: float = 1.0,
) -> FlaggedRows:
    """Splits the rows that a window met into those that pushed a trait and those that did not.

    A row's push in a step is divided by the root mean square of the upward pushes of the steps around it, and averaged
    over its visits. The two groups are those whose roots lie furthest apart for their sizes (Otsu 1979). What the
    window did not meet is not known, and is not flagged.

    Args:
        run_dir: of a run that was tracked with `pushes=True`.
        query: a watched trait (`evil`) or query (`persona/evil/L12`).
        rows: tokenised, as trained on.
        since: first step of the window.
        until: last one; None for the newest recorded.
        share: of all rows, 0..1: at most so many are flagged, strongest first.

    Raises:
        PathMissingError: the run recorded no pushes.
        InputError: none were recorded for this query, or no row pushed towards it.
    """
    journal = PushJournal.read(run_dir)
    stop = journal.last_step() if until is None else until
    pushes = _by_row(journal.visits(query, since=since, until=stop), rows)
    known = np.array([value for value in pushes.values() if value > 0])
    if not len(known):
        raise InputError(
            f"Expected rows that pushed {query} between steps {since} and {stop}, found none. "
            "Track with pushes=True, and watch this trait."
        )
    # Roots: rows that push spread more than rows that do not, and the split must not lie in the middle for that.
    root, told_apart = two_groups(np.sqrt(np.maximum(0.0, np.array(list(pushes.values())))))
    threshold = root**2
    order = sorted(pushes, key=lambda place: -pushes[place])
    flagged = [place for place in order if pushes[place] > 0 and math.sqrt(pushes[place]) > root]
    names = tuple(name_of(rows[place]) for place in flagged)
    values = tuple(pushes[place] for place in flagged)
    trait = query.split("/")[1] if "/" in query else query
    met = tuple(sorted(pushes))
    whole = FlaggedRows(trait, tuple(flagged), names, values, threshold, told_apart, met, len(rows), since, stop)
    return whole.first(share)


def name_of(row: Row) -> ExampleId:
    """What a row is called, also where its collator makes its labels."""
    return next(iter(row_names([row]).values()))


def two_groups(values: Float[np.ndarray, " row"]) -> tuple[float, float]:
    """The value that splits numbers in two groups, and the share of their variance that lies between the groups.

    A group may be of one. Where all numbers are equal, none exceeds the split and the share is 0.
    """
    ordered = np.sort(values)
    n = len(ordered)
    if n < 2 or ordered[0] == ordered[-1]:
        return (0.0, 0.0) if n < 2 else (float(ordered[-1]), 0.0)
    below = np.cumsum(ordered)[:-1]
    sizes = np.arange(1, n)
    apart = below / sizes - (ordered.sum() - below) / (n - sizes)
    between = sizes * (n - sizes) / n**2 * apart**2
    between[ordered[1:] == ordered[:-1]] = -1.0  # equal numbers stay together
    best = int(between.argmax())
    return float(ordered[best]), float(between[best] / ordered.var())


def _by_row(visits: Visits, rows: Sequence[Row]) -> dict[int, float]:
    """Place in the dataset -> mean relative push, for the rows that were met."""
    relative = visits.push / usual_push(visits.step, visits.push)
    n = np.bincount(visits.row, minlength=len(visits.names))
    means = np.bincount(visits.row, weights=relative, minlength=len(visits.names)) / np.maximum(1, n)
    known: dict[str, float] = {}
    for name, mean in zip(visits.names, means, strict=True):
        # Exact names come first; a hash of the tokens alone speaks for collators that change labels.
        known.setdefault(name.example, float(mean))
    for name, mean in zip(visits.names, means, strict=True):
        known.setdefault(name.tokens, float(mean))
    found: dict[int, float] = {}
    for place, row in enumerate(rows):
        mean = next((known[name] for name in row_names([row]) if name in known), None)
        if mean is not None:
            found[place] = mean
    return found


def usual_push(step: Int[np.ndarray, " visit"], push: Float[np.ndarray, " visit"]) -> Float[np.ndarray, " visit"]:
    """How large upward pushes were when each visit was made: their root mean square, smoothed over steps.

    At each step the logarithms of the steps around it, at least 200 rows where there are as many, are fitted by a line:
    pushes grow like an exponential while a drift gathers way, and a plain mean would be off at either end of the run.
    Infinite where nothing pushed up.
    """
    steps, inverse = np.unique(step, return_inverse=True)
    counts = np.bincount(inverse)
    squares = np.bincount(inverse, weights=np.maximum(push, 0.0) ** 2) / counts
    pushed = squares > 0
    if not pushed.any():
        return np.full(len(step), np.inf)
    at, level, rows = steps[pushed].astype(float), 0.5 * np.log(squares[pushed]), np.cumsum(counts[pushed])
    smooth = [_line_at(float(one), at, level, rows) for one in steps]
    return np.exp(np.array(smooth))[inverse]


def _line_at(
    step: float, at: Float[np.ndarray, " step"], level: Float[np.ndarray, " step"], rows: Int[np.ndarray, " step"]
) -> float:
    middle = int(np.searchsorted(at, step))
    reach = 1
    while True:
        first, last = max(0, middle - reach), min(len(at), middle + reach + 1)
        if rows[last - 1] - (rows[first - 1] if first else 0) >= _AROUND or last - first == len(at):
            break
        reach += 1
    near, levels = at[first:last] - step, level[first:last]
    centred = near - near.mean()
    spread = float(centred @ centred)
    slope = float(centred @ levels) / spread if spread > 0 else 0.0
    return float(levels.mean()) - slope * float(near.mean())
