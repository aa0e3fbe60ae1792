"""How strong is the evidence that a series rose above its baseline, at any moment one cares to look?

Each innovation z, in its standard deviations above the highest level that still counts as the baseline, is a bet:
`1 + b * clip(z / 3, -1, 1)`. Under the null its conditional mean is at most one, for every noise that is symmetric
around its level, however heavy its tails; no variance needs to be known for that. Products of such bets from one start
are evidence that the series rose there; sums over starts are evidence that it rose somewhere:

- the Shiryaev-Roberts sum, `S = (S + 1) * bet`: an e-detector (Shin, Ramdas & Rinaldo 2023). Stopping when it reaches
  A takes at least A measurements on average under the null, and within n measurements happens with probability n / A
  at most, since the mean of S is at most n;
- the same sum with weights over starts that add up to one, plus what is not yet placed: an e-process. It ever reaches
  1 / alpha with probability alpha at most (Ville), whatever the length of the run.

Both are averaged over several sizes of bet, in which they stay what they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tracker.alarms.whitening import Baseline

BETS = (0.1, 0.25, 0.5, 0.9)
_CLIP = 3.0
_STARTS = 0.1  # weights of starts fall like k^-1.1: late changes are hardly dearer than early ones
_LARGEST = 1e200


def start_weight(k: int) -> float:
    """Weight of a rise that begins at the k-th judged measurement, k from 1; all of them add up to one."""
    return float(k**-_STARTS - (k + 1) ** -_STARTS)


@dataclass
class Evidence:
    """Running evidence of one series; `update` takes one innovation after the other.

    Attributes:
        n: innovations judged.
        rising: innovations since the rise under way most likely began, 0 for none.
    """

    n: int = 0
    rising: int = 0
    _sums: list[float] = field(default_factory=lambda: [0.0] * len(BETS), repr=False)
    _placed: list[float] = field(default_factory=lambda: [0.0] * len(BETS), repr=False)
    _rise: float = 0.0

    @property
    def run_length_sum(self) -> float:
        """The Shiryaev-Roberts sum: in the null's mean at most `n`."""
        return sum(self._sums) / len(BETS)

    @property
    def e_process(self) -> float:
        """The e-process: in the null's mean at most 1 at any stopping time."""
        return sum(self._placed) / len(BETS) + (self.n + 1) ** -_STARTS

    def update(self, z: float, *, most: float = _LARGEST) -> None:
        """Takes one innovation, in standard deviations above the null's highest level; positive speaks for a rise.

        Args:
            z: the innovation.
            most: what the sum is held at, so that it falls again when the series does.
        """
        self.n += 1
        weight, share = start_weight(self.n), min(1.0, max(-1.0, z / _CLIP))
        for place, bet in enumerate(BETS):
            factor = 1.0 + bet * share
            self._sums[place] = min(most * len(BETS), (self._sums[place] + 1.0) * factor)
            self._placed[place] = min(_LARGEST, (self._placed[place] + weight) * factor)
        self._rise = max(0.0, self._rise) + math.log1p(BETS[1] * share)
        self.rising = self.rising + 1 if self._rise > 0 else 0


def standardise(baseline: Baseline, innovation: float, spread: float, *, floor: float, side: int) -> float:
    """An innovation in its standard deviations beyond the highest level that is no news.

    Args:
        baseline: of the series.
        innovation: on the scale of the level.
        spread: standard deviation of the innovation.
        floor: smallest shift that is news, in the signal's unit.
        side: 1 for rises, -1 for falls.
    """
    edge = baseline.level_high if side > 0 else baseline.level_low
    return (side * (innovation - edge) - floor) / spread
