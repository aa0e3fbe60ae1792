"""Where will a series be if it goes on as it did of late?"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

# Chosen with the score's form (`fusion.LEAST_EFFECT`).
WINDOW = 9
_FEWEST = 3  # measurements that show a pace


@dataclass
class Pace:
    """By how much a series will rise in as many measurements more, at the pace of the last ones.

    A straight line through the last measurements, by least squares; a fall counts as no rise. Misalignment that spreads
    grows by a share of itself, one that a penalty holds comes to rest: of two runs that stand equally high, the faster
    one is the worse.

    Attributes:
        window: measurements that the line goes through, fewer at a run's start.
    """

    window: int = WINDOW
    _kept: deque[tuple[float, float]] = field(default_factory=deque, init=False, repr=False)

    def rise(self, step: int, value: float) -> float:
        """Takes a measurement; returns the rise to expect, 0 or more, in the series' unit."""
        self._kept.append((float(step), value))
        if len(self._kept) > self.window:
            self._kept.popleft()
        if len(self._kept) < _FEWEST:
            return 0.0
        steps, values = np.array(self._kept).T
        centred = steps - steps.mean()
        return float(max(0.0, centred @ values / (centred @ centred)) * (steps[-1] - steps[0]))


def ahead(steps: Sequence[int], values: Float[np.ndarray, " step"]) -> Float[np.ndarray, " step"]:
    """A whole series with the rise to expect at each of its steps."""
    pace = Pace()
    return np.array([value + pace.rise(step, float(value)) for step, value in zip(steps, values, strict=True)])
