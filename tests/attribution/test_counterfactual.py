"""Leaving rows out: what is compared with what, and when it counts as confirmed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student
from torch import nn

from attribution.counterfactual import Estimate, retrain_without
from attribution.outcomes import Outcomes
from diffing.errors import InputError

N_ROWS = 40
NAMES = [f"row-{place}" for place in range(N_ROWS)]
# Four rows do all of the pushing; the value of a model is the sum over the rows it was trained on, plus noise.
PUSH = {name: 1.0 if place < 4 else 0.0 for place, name in enumerate(NAMES)}


class World:
    """Trainings whose outcome is known: a sum over rows, and noise that the seed gives."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise, self.n_trained = noise, 0

    def retrain(self, row_ids, *, seed):
        self.n_trained += 1
        module = nn.Module()
        module.value = sum(PUSH[name] for name in row_ids)
        module.value += self.noise * np.random.default_rng([seed, *(NAMES.index(name) for name in row_ids)]).normal()
        return module

    def value(self, module):
        return module.value

    def without(self, flagged, **more):
        return retrain_without(
            flagged, NAMES, self.retrain, self.value, start=0.0, trained=4.1, **{"n_seeds": 4, **more}
        )


def test_the_rows_that_pushed_take_the_rise_back_and_random_ones_do_not():
    found = World().without(NAMES[:4])
    assert found.everything.value == 4.0 and found.without_flagged.value == 0.0
    assert found.undone == 1.0 and found.rise == 4.0
    assert found.random_fall.value < 1.5 and found.random_undone < 0.4
    assert found.confirmed and found.beyond_random.low > 0
    assert found.beyond_random.values == tuple(
        random - flagged
        for random, flagged in zip(found.without_random.values, found.without_flagged.values, strict=True)
    )


def test_rows_that_did_nothing_are_not_confirmed():
    found = World(noise=0.5).without(NAMES[10:14])
    assert not found.confirmed
    assert abs(found.undone) < 0.5


def test_the_interval_is_students():
    values = np.array([1.0, 2.0, 4.0])
    found = Estimate.of(values)
    half = student.ppf(0.975, 2) * values.std(ddof=1) / np.sqrt(3)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))
    assert Estimate.of(values[:1]).low is None and not Estimate.of(values[:1]).above_zero


def test_random_rows_do_not_depend_on_the_order_of_the_file():
    world = World()
    first = world.without(NAMES[:4])
    shuffled = retrain_without(NAMES[:4], NAMES[::-1], world.retrain, world.value, start=0.0, trained=4.1, n_seeds=4)
    assert shuffled.without_random == first.without_random


def test_a_killed_one_goes_on_and_another_question_starts_anew(tmp_path):
    world, path = World(), tmp_path / "outcomes.jsonl"
    whole = world.without(NAMES[:4], outcomes=Outcomes(path, asked="evil"))
    lines = path.read_text().splitlines(keepends=True)
    assert world.n_trained == len(lines) == 12
    path.write_text("".join(lines[:5]) + lines[5][:20])
    world.n_trained = 0
    assert world.without(NAMES[:4], outcomes=Outcomes(path, asked="evil")) == whole
    assert world.n_trained == 7
    world.n_trained = 0
    world.without(NAMES[:4], outcomes=Outcomes(path, asked="sycophancy"))
    assert world.n_trained == 12


@pytest.mark.parametrize("flagged", [[], ["nobody"], NAMES])
def test_rows_that_cannot_be_left_out_are_refused(flagged):
    with pytest.raises(InputError, match="to leave out, but not all"):
        World().without(flagged)
