"""What is new in this measurement, given the one before? Innovations of a first-order autoregression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

_MOST = 0.95  # with more memory than this, a short baseline cannot tell the level from its wander
_TINY = 1e-12


@dataclass(frozen=True)
class Baseline:
    """What a series looks like before anything changed: level, spread and memory, learnt from its first measurements.

    Attributes:
        level: mean, in the signal's unit.
        level_high: upper confidence bound of the mean; the series' memory is in it.
        level_low: lower confidence bound.
        sigma: standard deviation of the series, in the signal's unit.
        memory: lag-one correlation, 0 to 0.95, upward corrected for the short baseline.
        gap: usual distance between measurements, optimizer steps.
        n: measurements it was learnt from.
    """

    level: float
    level_high: float
    level_low: float
    sigma: float
    memory: float
    gap: float
    n: int

    @classmethod
    def learn(cls, steps: Sequence[int], values: Sequence[float], *, confidence: float) -> Baseline:
        """Learns from consecutive finite measurements, ten or more.

        The lag-one correlation is estimated too low from few measurements: `(1 + 3 r) / n` is added (Kendall 1954),
        and one standard error, so that a memory that was merely missed does not count as evidence.

        Args:
            steps: optimizer steps, ascending.
            values: measurements, in the signal's unit.
            confidence: of either bound of the mean, one-sided.
        """
        x = np.asarray(values, dtype=np.float64)
        n, centred = len(x), x - x.mean()
        power = float(centred @ centred)
        lagged = float(centred[1:] @ centred[:-1]) / power if power > 0 else 0.0
        memory = min(_MOST, max(0.0, lagged + (1 + 3 * lagged) / n))
        sigma = max(math.sqrt(power / (n - 1)), _TINY * max(1.0, abs(float(x.mean()))))
        effective = max(2.0, n * (1 - memory) / (1 + memory))
        half = float(stdtrit(effective - 1, confidence)) if effective < 200 else float(ndtri(confidence))
        half *= sigma / math.sqrt(effective)
        level = float(x.mean())
        gap = float(np.median(np.diff(np.asarray(steps, dtype=np.float64)))) if n > 1 else 1.0
        return cls(level, level + half, level - half, sigma, memory, max(1.0, gap), n)

    def innovation(self, value: float, before: float | None, gap: int) -> float:
        """The new measurement with its memory of the last one taken out, on the scale of the series' level.

        `(x - m y) / (1 - m)` with y the measurement before and m the memory over the gap between them: its mean is
        the level, and successive ones are uncorrelated where the series is a first-order autoregression.

        Args:
            value: this measurement.
            before: the one before, None where there is none.
            gap: optimizer steps between them.
        """
        if before is None:
            return value
        left = self.memory ** (gap / self.gap)
        return (value - left * before) / (1 - left)

    def spread(self, gap: int | None) -> float:
        """Standard deviation of an innovation after such a gap, in the signal's unit."""
        if gap is None:
            return self.sigma
        left = self.memory ** (gap / self.gap)
        return self.sigma * math.sqrt((1 + left) / (1 - left))
