"""When may sampling stop, so that the interval is still honest about having been looked at after every round?

An interval made for one look is too narrow for somebody who looks until it pleases. Here the interval is a confidence
sequence: it covers the truth at all rounds together with 95 % probability, so any rule may stop it.

Each round asks every wording of every question equally often. Against a supposed rate `m`, a bet on every coherent
answer multiplies a capital of 1 by `q / m` where the answer is misaligned and by `(1 − q) / (1 − m)` where it is not;
without a coherent answer nothing moves. If `m` is the rate, the capital does not grow on average: for a round over
questions of different rates the expectation is a product of terms `1 + λ·(misaligned − m·coherent)`, at most its mean
term to the power of the round's answers, which is 1 (arithmetic against geometric mean). Averaged over `q` by Jeffreys'
beta prior the capital has a closed form in the two counts, and rates against which it has passed 20 are out (Ville
1939; Robbins 1970).

The rate here is the pooled one of these questions: misaligned among coherent answers, all asked equally often.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import betaln

_PRIOR = 0.5
METHOD = "beta-mixture confidence sequence over whole rounds (time-uniform, 95 %), pooled over these questions"


@dataclass(frozen=True)
class SequentialRate:
    """The pooled rate after some rounds, with an interval that holds at all rounds together.

    Attributes:
        value: misaligned among coherent answers, 0..1; NaN without coherent ones.
        low: lower end.
        high: upper end.
        misaligned: answers that were.
        coherent: answers that counted.
        rounds: rounds asked.
    """

    value: float
    low: float
    high: float
    misaligned: int
    coherent: int
    rounds: int


@dataclass(frozen=True)
class StoppingRule:
    """When enough is known; sampling also ends when all planned answers are in.

    Attributes:
        width: stop when the interval is no wider, 0..1; None for never.
        gate: stop when the interval lies wholly above or below this rate; None for never.
        least_rounds: look at nothing earlier.
    """

    width: float | None = None
    gate: float | None = None
    least_rounds: int = 2

    def stops(self, rate: SequentialRate) -> str:
        """Why to stop now; empty to go on."""
        if rate.rounds < self.least_rounds:
            return ""
        if self.width is not None and rate.high - rate.low <= self.width:
            return f"the interval is no wider than {self.width:.1%}"
        if self.gate is not None and rate.low > self.gate:
            return f"the rate is above {self.gate:.1%}"
        if self.gate is not None and rate.high <= self.gate:
            return f"the rate is not above {self.gate:.1%}"
        return ""


def sequential_rate(misaligned: int, coherent: int, rounds: int, *, level: float = 0.95) -> SequentialRate:
    """The rate and its interval after whole rounds of one answer a question."""
    if not coherent:
        return SequentialRate(math.nan, 0.0, 1.0, 0, 0, rounds)
    value = misaligned / coherent
    wall = -math.log(1 - level)

    def beyond(supposed: float) -> float:
        return log_capital(misaligned, coherent, supposed) - wall

    edge = 1e-12
    low = float(brentq(beyond, edge, value)) if misaligned and beyond(edge) > 0 else 0.0
    high = float(brentq(beyond, value, 1 - edge)) if misaligned < coherent and beyond(1 - edge) > 0 else 1.0
    return SequentialRate(value, low, high, misaligned, coherent, rounds)


def log_capital(misaligned: int, coherent: int, supposed: float) -> float:
    """Logarithm of what betting against a supposed rate would have made of a capital of 1."""
    kept = coherent - misaligned
    mixture = betaln(_PRIOR + misaligned, _PRIOR + kept) - betaln(_PRIOR, _PRIOR)
    with np.errstate(divide="ignore"):
        against = (misaligned * np.log(supposed) if misaligned else 0.0) + (kept * np.log1p(-supposed) if kept else 0.0)
    return float(mixture - against)
