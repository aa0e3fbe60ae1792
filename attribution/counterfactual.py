"""What would the run have become without these rows? Trained again without them, and without as many random ones.

A ranking says which rows pushed; this says what leaving them out is worth, in the units of what was asked. Every seed
orders the rows anew (and starts an adapter anew), so that the interval holds what chance does to a training run. The
random rows are drawn anew for every seed, from all rows: leaving out any rows at all changes something.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float
from scipy.stats import t as student
from torch import nn

from attribution.example import ExampleId
from attribution.outcomes import Outcomes
from attribution.validate import Retrain
from diffing.errors import InputError

Value = Callable[[nn.Module], float]
"""What was asked, as a number of one model: what the flagged rows are said to have pushed up."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, with Student's 95 % interval; the ends are None with one seed.

    Attributes:
        value: the mean.
        low: lower end.
        high: upper end.
        values: one a seed.
    """

    value: float
    low: float | None
    high: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Float[np.ndarray, " seed"]) -> Estimate:
        """From one value a seed."""
        mean, n = float(np.mean(values)), len(values)
        found = tuple(float(value) for value in values)
        if n < 2:
            return cls(mean, None, None, found)
        half = float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
        return cls(mean, mean - half, mean + half, found)

    @property
    def above_zero(self) -> bool:
        """The whole interval."""
        return self.low is not None and self.low > 0


@dataclass(frozen=True)
class Counterfactual:
    """What leaving the flagged rows out did, next to as many random rows.

    Attributes:
        query: what was asked.
        n_rows: how many rows there are.
        n_dropped: how many were left out.
        start: value of the model before training.
        trained: value of the run's own last checkpoint: how well the retrainings repeat the run.
        everything: value after training again on all rows.
        without_flagged: on all but the flagged rows.
        without_random: on all but as many random rows.
        fall: `everything` less `without_flagged`, seed by seed; positive: leaving them out lowers what was asked.
        random_fall: the same of random rows.
        beyond_random: `fall` less `random_fall`, seed by seed.
        settings: how it was trained again, in words.
    """

    query: str
    n_rows: int
    n_dropped: int
    start: float
    trained: float
    everything: Estimate
    without_flagged: Estimate
    without_random: Estimate
    fall: Estimate
    random_fall: Estimate
    beyond_random: Estimate
    settings: str = ""

    @property
    def rise(self) -> float:
        """How far training on all rows raised what was asked."""
        return self.everything.value - self.start

    @property
    def undone(self) -> float | None:
        """Share of the rise that leaving the flagged rows out takes back; None where nothing rose."""
        return self.fall.value / self.rise if self.rise > 0 else None

    @property
    def random_undone(self) -> float | None:
        """The same of random rows."""
        return self.random_fall.value / self.rise if self.rise > 0 else None

    @property
    def confirmed(self) -> bool:
        """Leaving the flagged rows out lowers what was asked surely more than leaving out random ones."""
        return self.beyond_random.above_zero

    def __str__(self) -> str:
        ends = self.beyond_random
        between = "one seed" if ends.low is None else f"95 % {ends.low:.3g} to {ends.high:.3g}"
        return (
            f"without {self.n_dropped} flagged rows {self.without_flagged.value:.3g}, without random ones "
            f"{self.without_random.value:.3g}, with all {self.everything.value:.3g}; beyond random "
            f"{ends.value:.3g} ({between}, n={len(ends.values)} seeds)"
        )


def retrain_without(
    flagged: Sequence[ExampleId],
    row_ids: Sequence[ExampleId],
    retrain: Retrain,
    value: Value,
    *,
    start: float,
    trained: float,
    query: str = "",
    n_seeds: int = 3,
    seed: int = 0,
    outcomes: Outcomes | None = None,
    settings: str = "",
) -> Counterfactual:
    """Trains three times a seed: on all rows, without the flagged ones, without as many random ones.

    Args:
        flagged: names of the rows to leave out.
        row_ids: names of all rows.
        retrain: trains on some of them.
        value: measures a model.
        start: the measure before training.
        trained: the measure of the run itself.
        query: what the measure is called.
        n_seeds: how often; the interval needs two at least, and is wide below five.
        seed: the first seed.
        outcomes: keeps every retraining's outcome on disk, so that a killed one goes on.
        settings: how `retrain` trains, in words.

    Raises:
        InputError: no flagged row, a flagged row that is none of the rows, or no row that would be left.

    Cost: `3 * n_seeds` trainings.
    """
    gone = set(flagged)
    unknown = sorted(gone - set(row_ids))
    if not gone or unknown or len(gone) >= len(row_ids):
        got = f"{unknown[0]!r}, which is none of them" if unknown else f"{len(gone)} of {len(row_ids)} rows"
        raise InputError(f"Expected some of the training rows to leave out, but not all; got {got}. Flag fewer rows.")
    kept = Outcomes() if outcomes is None else outcomes
    found = np.empty((3, n_seeds))
    for number in range(n_seeds):
        order = seed + number
        for place, left_out in enumerate((set[ExampleId](), gone, _random_rows(row_ids, len(gone), order))):
            names = [name for name in row_ids if name not in left_out]
            (found[place, number],) = kept.get_or_make(names, order, partial(_outcome, names, order, retrain, value))
    everything, flagged_out, random_out = found
    return Counterfactual(
        query=query,
        n_rows=len(row_ids),
        n_dropped=len(gone),
        start=start,
        trained=trained,
        everything=Estimate.of(everything),
        without_flagged=Estimate.of(flagged_out),
        without_random=Estimate.of(random_out),
        fall=Estimate.of(everything - flagged_out),
        random_fall=Estimate.of(everything - random_out),
        beyond_random=Estimate.of(random_out - flagged_out),
        settings=settings,
    )


def _outcome(names: Sequence[ExampleId], seed: int, retrain: Retrain, value: Value) -> Float[np.ndarray, " query"]:
    return np.array([value(retrain(names, seed=seed))])


def _random_rows(row_ids: Sequence[ExampleId], n: int, seed: int) -> set[ExampleId]:
    """Drawn by the rows' names, so that their order in the file does not matter."""
    ordered = sorted(row_ids, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    return set(ordered[:n])
