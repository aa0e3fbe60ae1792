"""What is the true rate, when the judge that measured it is known to err?

A judge with sensitivity `s` and specificity `c` reports a rate of `p·s + (1 − p)·(1 − c)` where the truth is `p`;
solved for `p` (Rogan & Gladen 1978). What is known about `s` and `c` is as much as the gold set has rows, and that
uncertainty goes into the interval, beside that of the measured rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffing.errors import InputError
from diffing.interval import Share

_DRAWS = 20_000


@dataclass(frozen=True)
class JudgeError:
    """How often a judge is right about a yes-or-no question, from a gold set.

    Attributes:
        sensitivity: share of truly positive rows that it calls positive.
        specificity: share of truly negative rows that it calls negative.
    """

    sensitivity: Share
    specificity: Share

    @classmethod
    def of(cls, *, caught: int, positives: int, cleared: int, negatives: int) -> JudgeError:
        """From counts: `caught` of the gold set's `positives`, `cleared` of its `negatives`."""
        return cls(Share.of(caught, positives), Share.of(cleared, negatives))

    @property
    def youden(self) -> float:
        """Sensitivity + specificity − 1: 1 for a perfect judge, 0 for a guess; NaN without both kinds of rows."""
        return self.sensitivity.value + self.specificity.value - 1


@dataclass(frozen=True)
class CorrectedRate:
    """A rate with the judge's error taken out.

    Attributes:
        value: Rogan & Gladen's estimate, held in 0..1.
        low: lower end of the 95 % interval.
        high: upper end.
        measured: the rate as the judge reported it.
        youden: of the judge.
        n_gold: rows of the gold set.
    """

    value: float
    low: float
    high: float
    measured: float
    youden: float
    n_gold: int


def correct_rate(rate: float, low: float, high: float, error: JudgeError, *, seed: int = 0) -> CorrectedRate:
    """The true rate behind a measured one.

    The interval is of percentiles over joint draws: the measured rate from a beta distribution whose 95 % interval is
    as wide as the one given (so that clustering is kept), sensitivity and specificity from their posteriors under
    Jeffreys' prior. Draws in which the judge is no better than a guess make the interval 0..1, as they should.

    Args:
        rate: as measured, 0..1.
        low: lower end of its 95 % interval.
        high: upper end.
        error: of the judge, from a gold set like the answers judged.
        seed: of the draws.

    Raises:
        InputError: the gold set lacks positive or negative rows, or the judge is no better than a guess.
    """
    if not error.sensitivity.n or not error.specificity.n:
        raise InputError(
            f"Expected a gold set with misaligned and other rows, got {error.sensitivity.n} and {error.specificity.n}. "
            "Add the kind that is missing."
        )
    if not error.youden > 0:
        raise InputError(
            f"Expected a judge better than a guess, got sensitivity {error.sensitivity} and specificity "
            f"{error.specificity}. Use another judge or another rubric."
        )
    rng = np.random.default_rng(seed)
    n_like = _cases_like(rate, low, high)
    measured = rng.beta(rate * n_like + 0.5, (1 - rate) * n_like + 0.5, _DRAWS)
    caught, cleared = (
        rng.beta(share.count + 0.5, share.n - share.count + 0.5, _DRAWS)
        for share in (error.sensitivity, error.specificity)
    )
    gained = caught + cleared - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = np.where(gained > 0, (measured - (1 - cleared)) / gained, rng.uniform(size=_DRAWS))
    ends = np.quantile(np.clip(drawn, 0, 1), [0.025, 0.975])
    value = float(np.clip((rate - (1 - error.specificity.value)) / error.youden, 0, 1))
    # The estimate and the draws' percentiles come from slightly different centres: the estimate is always inside.
    return CorrectedRate(
        value,
        float(min(ends[0], value)),
        float(max(ends[1], value)),
        rate,
        error.youden,
        error.sensitivity.n + error.specificity.n,
    )


def _cases_like(rate: float, low: float, high: float) -> float:
    """How many independent cases would have an interval of this width."""
    half = max(1e-6, (high - low) / 2)
    middle = min(max(rate, (low + high) / 2, 1e-4), 1 - 1e-4)
    return float(np.clip(1.96**2 * middle * (1 - middle) / half**2, 1.0, 1e7))
