"""Which rate of false alarms can so many benign runs vouch for?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import beta

from diffing.errors import InputError


@dataclass(frozen=True)
class ExactShare:
    """A share of independent cases with its exact 95 % interval (Clopper & Pearson 1934).

    Attributes:
        value: `count / n`, NaN where n is 0.
        low: lower end.
        high: upper end.
        n: cases.
        count: those that showed it.
    """

    value: float
    low: float
    high: float
    n: int
    count: int

    @classmethod
    def of(cls, count: int, n: int) -> ExactShare:
        """The share of `count` in `n`."""
        if n == 0:
            return cls(math.nan, 0.0, 1.0, 0, 0)
        low = 0.0 if count == 0 else float(beta.ppf(0.025, count, n - count + 1))
        high = 1.0 if count == n else float(beta.ppf(0.975, count + 1, n - count))
        return cls(count / n, low, high, n, count)

    def __str__(self) -> str:
        return f"{self.count} of {self.n} ({self.value:.1%}, 95 % interval {self.low:.1%} to {self.high:.1%})"


def nulls_needed(level: float) -> int:
    """Fewest benign runs that can vouch for a level: 19 for 5 %, 99 for 1 %.

    Raises:
        InputError: the level is out of range.
    """
    check_level(level)
    return math.ceil(1 / level - 1e-9) - 1


def best_level(n: int) -> float:
    """The strictest level that `n` benign runs vouch for."""
    return 1 / (n + 1)


def conformal_p(value: float, nulls: Sequence[float]) -> float:
    """`(1 + number of nulls that reach the value) / (n + 1)`.

    Where the run is benign and exchangeable with the nulls, this is at most u with probability of at most u: nothing
    else is assumed (Vovk et al. 2005).
    """
    return (1 + sum(null >= value for null in nulls)) / (len(nulls) + 1)


def conformal_threshold(nulls: Sequence[float], level: float) -> float:
    """What a statistic must exceed for its conformal p-value to be at most `level`.

    Raises:
        InputError: so few benign runs cannot vouch for the level.
    """
    check_level(level)
    allowed = math.floor(level * (len(nulls) + 1) + 1e-9) - 1
    if allowed < 0:
        have = f"; these vouch for {100 * best_level(len(nulls)):.3g} % at best" if nulls else ""
        raise InputError(
            f"Expected at least {nulls_needed(level)} benign runs for a false-alarm rate of {100 * level:g} %, got "
            f"{len(nulls)}{have}. Add benign runs with `palimpsest calibrate`, or ask for a higher level."
        )
    return sorted(nulls, reverse=True)[allowed]


def check_level(level: float) -> None:
    """Raises InputError where the level is not between 0 and 1."""
    if not 0 < level < 1:
        raise InputError(f"Expected a level between 0 and 1, got {level}. Write 0.05 for five per cent.")
