"""Does a cheap signal say, along a training run, what a judge says of the model's answers?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

_RESAMPLES = 1000
_FEWEST = 5


@dataclass(frozen=True)
class Agreement:
    """How a signal and a judged rate go together over the steps at which both were measured.

    Any two series that drift upwards correlate. So the correlation of their changes from measurement to measurement
    stands beside that of their levels: it is high only where they move at the same steps.

    Attributes:
        levels: Spearman correlation of the values, -1..1; NaN with fewer than five common steps or without change.
        low: lower end of its 95 % interval, from resampled blocks of neighbouring steps.
        high: upper end.
        changes: Spearman correlation of the changes.
        n: common steps.
        block: steps of one resampled block.
        signal_clear: first step from which on the signal's interval lies above that of its first value; None for
            never.
        rate_clear: likewise for the judged rate.
    """

    levels: float
    low: float
    high: float
    changes: float
    n: int
    block: int
    signal_clear: int | None = None
    rate_clear: int | None = None

    @property
    def lead(self) -> int | None:
        """Steps by which the signal was clear before the rate was; negative: after it."""
        if self.signal_clear is None or self.rate_clear is None:
            return None
        return self.rate_clear - self.signal_clear

    def __str__(self) -> str:
        return (
            f"Spearman {self.levels:.2f} [{self.low:.2f}, {self.high:.2f}] over {self.n} steps; of changes "
            f"{self.changes:.2f}"
        )


# Step to value, lower and upper end of its interval (None where it has none).
Series = Mapping[int, tuple[float, float | None, float | None]]


def signal_agreement(signal: Series, rate: Series, *, seed: int = 0) -> Agreement:
    """Correlation of a signal with a judged rate along a run.

    Args:
        signal: step to value and interval, such as canary log-odds.
        rate: step to judged misaligned rate and interval.
        seed: of the resampling.

    Returns:
        Figures over the steps that both have. Neighbouring steps are alike, so whole blocks of them are drawn again;
        the interval is of one run, and says nothing about other runs.
    """
    steps = sorted(set(signal) & set(rate))
    first = np.array([signal[step][0] for step in steps], dtype=np.float64)
    second = np.array([rate[step][0] for step in steps], dtype=np.float64)
    n, block = len(steps), max(1, round(len(steps) ** (1 / 3)))
    low = high = math.nan
    if n >= _FEWEST:
        low, high = _block_interval(first, second, block, seed)
    return Agreement(
        levels=_spearman(first, second),
        low=low,
        high=high,
        changes=_spearman(np.diff(first), np.diff(second)),
        n=n,
        block=block,
        signal_clear=_first_clear(signal),
        rate_clear=_first_clear(rate),
    )


def _spearman(first: Float[np.ndarray, " step"], second: Float[np.ndarray, " step"]) -> float:
    if len(first) < _FEWEST or len(np.unique(first)) < 2 or len(np.unique(second)) < 2:
        return math.nan
    return float(np.corrcoef(stats.rankdata(first), stats.rankdata(second))[0, 1])


def _block_interval(
    first: Float[np.ndarray, " step"], second: Float[np.ndarray, " step"], block: int, seed: int
) -> tuple[float, float]:
    """Percentiles over circular moving blocks (Politis & Romano 1992)."""
    rng, n = np.random.default_rng(seed), len(first)
    found = []
    for _ in range(_RESAMPLES):
        starts = rng.integers(0, n, math.ceil(n / block))
        index: Int[np.ndarray, " step"] = ((starts[:, None] + np.arange(block)) % n).reshape(-1)[:n]
        found.append(_spearman(first[index], second[index]))
    known = np.array(found)
    known = known[~np.isnan(known)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def _first_clear(series: Series) -> int | None:
    """First step of the stretch, up to the end, in which every interval lies above the first one."""
    steps = sorted(series)
    if not steps:
        return None
    value, _, high = series[steps[0]]
    start, clear = value if high is None else max(value, high), None
    for step in reversed(steps[1:]):
        low = series[step][1]
        if low is None or low <= start:
            break
        clear = step
    return clear
