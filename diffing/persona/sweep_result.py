"""What did adding the vector do at each layer and strength, and which of them is chosen?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from diffing.persona.project import mean_interval


@dataclass(frozen=True)
class Estimate:
    """A mean over questions.

    Attributes:
        mean: over questions.
        low: lower end of the 95 % t interval; None for one question.
        high: upper end.
        n: questions.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: Float[np.ndarray, " question"], *, largest: float | None = None) -> Estimate:
        """The mean of one value a question; its interval stays within 0 and `largest`, where that is given."""
        mean, low, high = mean_interval(values.astype(np.float64))
        if largest is not None and low is not None and high is not None:
            low, high = max(0.0, low), min(largest, high)
        return cls(mean, low, high, len(values))


@dataclass(frozen=True)
class SweepPoint:
    """One layer at one strength.

    Attributes:
        site: where the vector was added.
        strength: in gaps of that layer; 1 is the distance between plain and trait answers.
        log_odds: change of the log-odds of trait against plain answers, nats a token; positive: towards the trait.
        trait_gain: change of the trait answers' log-probability, nats a token; negative where steering breaks them.
        trait_score: the judge's mean trait score of the steered answers, 0..100; None where it was not asked.
        coherence: the judge's mean coherence of the steered answers, 0..100; None where it was not asked.
    """

    site: str
    strength: float
    log_odds: Estimate
    trait_gain: Estimate
    trait_score: Estimate | None = None
    coherence: Estimate | None = None


@dataclass(frozen=True)
class LayerSweep:
    """Every point tried, and the one chosen.

    Attributes:
        trait: the trait's name.
        points: by site, then strength.
        site: where the trait is brought out best.
        strength: the strength at which it is, gaps.
        scored_by: `log-odds`, or the judge's name.
        why: one sentence about the choice.
        random_most: largest mean log-odds change of random directions of the same length at the chosen point.
        n_random: how many of those.
        unsteered_trait: trait score without steering; None without a judge.
        unsteered_coherence: coherence without steering.
        confirmed_trait: trait score of answers drawn again at the chosen point. The best of many points is partly luck;
            this one was not chosen by.
        confirmed_coherence: their coherence.
        n_scored: questions behind every point.
        least_coherence: mean coherence below which a judged point was not chosen.
    """

    trait: str
    points: tuple[SweepPoint, ...]
    site: str
    strength: float
    scored_by: str
    why: str
    random_most: float
    n_random: int
    unsteered_trait: Estimate | None = None
    unsteered_coherence: Estimate | None = None
    confirmed_trait: Estimate | None = None
    confirmed_coherence: Estimate | None = None
    n_scored: int = 0
    least_coherence: float = 50.0

    @property
    def chosen(self) -> SweepPoint:
        """The point at which the trait is brought out best."""
        return next(point for point in self.points if (point.site, point.strength) == (self.site, self.strength))

    def best_at(self, site: str) -> SweepPoint | None:
        """The best strength at one site, by the same rule as the choice; None where it was not tried."""
        points = [point for point in self.points if point.site == site]
        return choose_point(points, self.least_coherence)[0] if points else None


def best_sites(points: Sequence[SweepPoint], n: int) -> set[str]:
    """The sites at which log-odds rise most without breaking the trait answers."""
    best: dict[str, float] = {}
    for point in points:
        harmless = point.trait_gain.mean > 0
        best[point.site] = max(best.get(point.site, -math.inf), point.log_odds.mean if harmless else -math.inf)
    return set(sorted(best, key=lambda site: -best[site])[:n])


def choose_point(points: Sequence[SweepPoint], least_coherence: float) -> tuple[SweepPoint, str]:
    """The best point, and why: by the judge where it was asked, else by log-odds."""
    judged = [point for point in points if point.trait_score is not None]
    if judged:
        coherent = [p for p in judged if p.coherence is None or p.coherence.mean >= least_coherence]
        best = max(coherent or judged, key=lambda p: (_mean(p.trait_score), -p.strength, p.log_odds.mean))
        if not coherent:
            return best, f"No judged point kept a mean coherence of {least_coherence:g}; this one shows the trait most."
        return best, (
            f"Of {len(judged)} judged points the steered answers show the trait most here "
            f"(score {_mean(best.trait_score):.0f})."
        )
    helped = [point for point in points if point.trait_gain.mean > 0]
    if not helped:
        best = max(points, key=lambda point: point.trait_gain.mean)
        return best, "At no point did the trait answers become likelier; this one harms them least. Do not steer by it."
    best = max(helped, key=lambda point: (point.log_odds.mean, -point.strength))
    return best, (
        f"Of {len(helped)} points (of {len(points)}) at which the trait answers became likelier, the log-odds rose "
        f"most here ({best.log_odds.mean:+.2f} nats a token)."
    )


def _mean(estimate: Estimate | None) -> float:
    return -math.inf if estimate is None else estimate.mean
