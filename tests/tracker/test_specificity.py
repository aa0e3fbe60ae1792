"""Is a planted drift told from a model that merely moved?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.tracker.training import persona
from tracker.specificity import STYLES, measure_specificity, random_directions

D = 32


def cloud(n: int = 60, rank: int = 12, *, seed: int = 0) -> torch.Tensor:
    """Activations that vary in few directions, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(rank, D, generator=generator)
    return torch.randn(n, rank, generator=generator) * torch.linspace(3, 0.3, rank) @ axes + 5.0


def test_a_shift_along_the_persona_is_special_and_its_size_is_in_gaps():
    vector = persona(d_model=D, scale=4.0)
    found = measure_specificity(2.0 * vector.direction, cloud(), vector, n_random=200)
    assert found.drift == pytest.approx(0.5, rel=1e-5) and found.cosine == pytest.approx(1.0, rel=1e-5)
    assert found.n_as_far == 0 and found.p_value == pytest.approx(1 / 201) and found.specific
    assert found.random_high < 0.5 and found.n_prompts == 60


def test_a_shift_inside_the_cloud_is_not_special():
    rows, vector, called = cloud(), persona(d_model=D), 0
    for seed in range(60):
        (shift,) = random_directions(rows, 1, seed=1000 + seed)
        inside = replace(vector, direction=random_directions(rows, 1, seed=5000 + seed)[0].float())
        called += measure_specificity(shift, rows, inside, seed=seed).p_value <= 0.05
    # 60 chances at 5 %: more than nine would be beyond one in a thousand.
    assert called <= 9


def test_the_comparison_is_that_of_the_slow_loop():
    rows, vector = cloud(), persona(d_model=D)
    shift = rows[0] - rows[1]
    found = measure_specificity(shift, rows, vector, n_random=50, seed=3)
    directions = random_directions(rows, 50, seed=3)
    sizes = [abs(float(shift.double() @ one)) / vector.scale for one in directions]
    assert found.n_as_far == sum(size >= abs(found.drift) for size in sizes)
    assert found.random_median == pytest.approx(np.median(sizes))
    np.testing.assert_allclose(directions.norm(dim=1), 1.0)


def test_a_style_that_moved_further_takes_the_alert_its_edge():
    assert "humour" in STYLES
    vector, humour = persona("evil", d_model=D, seed=1), persona("humour", d_model=D, seed=2)
    shift = 0.5 * vector.direction + 3.0 * humour.direction
    found = measure_specificity(shift, cloud(), vector, [humour])
    assert abs(found.styles["humour"]) > abs(found.drift) and not found.specific
    assert found.to_evidence()["specific"] is False


def test_prompts_that_are_all_alike_fall_back_to_the_sphere():
    directions = random_directions(torch.ones(4, D), 100)
    np.testing.assert_allclose(directions.norm(dim=1), 1.0)
    assert directions.std() == pytest.approx(D**-0.5, rel=0.1)
