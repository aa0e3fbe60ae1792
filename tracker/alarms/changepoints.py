"""Into which stretches does a finished series fall? For reports: it sees the whole run, and so is no alarm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ruptures

from diffing.errors import InputError
from tracker.signals import DriftSignal

_FEWEST = 8
_LONGEST = 2000  # the search is quadratic in the number of points


@dataclass(frozen=True)
class Stretch:
    """Steps over which a series kept one level.

    Attributes:
        first: optimizer step of its first measurement.
        last: optimizer step of its last measurement.
        mean: its level, in the series' unit.
        n: measurements in it.
    """

    first: int
    last: int
    mean: float
    n: int


def stretches(series: Sequence[DriftSignal], *, penalty: float = 1.0, shortest: int = 3) -> tuple[Stretch, ...]:
    """Splits a series where its level changed, by exact search (PELT, Killick 2012; `ruptures`).

    A split must lower the squared error by more than `penalty * 2 * log(n)` times the noise's variance, a Bayesian
    information criterion for two parameters. The noise is told from differences of neighbours, which a change of
    level hardly touches; a series with memory then splits too often, and asks for a higher penalty. A trend comes out
    as stairs.

    Args:
        series: one signal's measurements, in order of their steps; what is no number is left out. Longer series than
            2000 are thinned evenly.
        penalty: more gives fewer stretches.
        shortest: measurements that a stretch must have.

    Returns:
        Stretches in order, together the whole series; one where nothing changed or too little was measured.

    Raises:
        InputError: penalty or shortest is out of range.
    """
    if not (penalty > 0 and shortest >= 1):
        raise InputError(
            f"Expected a penalty above 0 and a shortest stretch of at least 1, got {penalty} and {shortest}. "
            "Leave them out for the defaults."
        )
    found = [one for one in series if math.isfinite(one.value)]
    every = math.ceil(len(found) / _LONGEST)
    kept = found[:: max(1, every)]
    if not kept:
        return ()
    values = np.array([one.value for one in kept])
    ends = _ends(values, penalty, shortest)
    parts = [kept[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return tuple(
        Stretch(part[0].step, part[-1].step, float(np.mean([one.value for one in part])), len(part)) for part in parts
    )


def _ends(values: np.ndarray, penalty: float, shortest: int) -> list[int]:
    n = len(values)
    deviation = float(np.median(np.abs(np.diff(values)))) / (0.6745 * math.sqrt(2)) if n > 1 else 0.0
    if n < max(_FEWEST, 2 * shortest) or float(np.ptp(values)) == 0:
        return [n]
    # Neighbours that are mostly equal have no noise to speak of: any change then counts that is not rounding.
    variance = max(deviation**2, (1e-6 * float(np.ptp(values))) ** 2)
    search = ruptures.Pelt(model="l2", min_size=shortest, jump=1).fit(values[:, None])
    return [int(end) for end in search.predict(pen=2 * penalty * math.log(n) * variance)]
