"""Does a finished series fall into the stretches that were planted?"""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffing.errors import InputError
from tracker.alarms.changepoints import stretches
from tracker.signals import DriftSignal


def series(values: object, *, every: int = 5) -> list[DriftSignal]:
    return [DriftSignal("persona/evil/L2/batch", float(value), every * place) for place, value in enumerate(values)]  # type: ignore[arg-type]


def test_planted_levels_are_found_where_they_change() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(level, 0.1, 60) for level in (0.0, 1.0, 0.4)])
    found = stretches(series(values))
    assert [(one.first, one.last, one.n) for one in found] == [(0, 295, 60), (300, 595, 60), (600, 895, 60)]
    assert [one.mean for one in found] == pytest.approx([0.0, 1.0, 0.4], abs=0.05)


def test_noise_alone_is_mostly_one_stretch() -> None:
    rng = np.random.default_rng(1)
    counts = [len(stretches(series(rng.normal(0, 1, 120)))) for _ in range(30)]
    assert np.median(counts) == 1 and np.mean([count > 1 for count in counts]) <= 0.2


def test_missing_values_are_left_out_and_steps_keep_their_names() -> None:
    values = [0.0] * 20 + [math.nan] * 5 + [3.0] * 20 + [math.inf]
    first, second = stretches(series(values))
    assert (first.last, second.first, second.last) == (95, 125, 220)


def test_short_constant_and_empty_series_are_one_stretch_or_none() -> None:
    assert stretches([]) == ()
    assert len(stretches(series([1.0, 9.0, 1.0]))) == 1
    assert len(stretches(series([2.0] * 100))) == 1
    assert stretches(series([math.nan] * 20)) == ()


def test_long_series_are_thinned() -> None:
    values = np.r_[np.zeros(4000), np.ones(5000)] + np.random.default_rng(2).normal(0, 0.1, 9000)
    first, second = stretches(series(values, every=1))
    assert abs(second.first - 4000) <= 10 and first.n + second.n <= 2000


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="penalty above 0"):
        stretches(series([1.0]), penalty=0)
