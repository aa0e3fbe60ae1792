"""Do length and cosine of a drift say where the model went?"""

from __future__ import annotations

import math

import pytest
import torch

from tests.tiny_models import tiny_model
from tests.tracker.training import persona
from tracker.probes.axes import group_axes
from tracker.probes.drift_direction import drift_reference, drift_signals, mean_shifts


def _sites(seed: int = 0) -> list[torch.Tensor]:
    width = persona().direction.shape[0]
    return [torch.randn(12, width, generator=torch.Generator().manual_seed(seed))]


def test_a_shift_along_the_persona_has_a_cosine_of_one_and_its_own_length() -> None:
    vector = persona("villain", 1)
    axes = group_axes(tiny_model("llama"), [vector])
    before = _sites()
    reference = drift_reference(before)
    after = [before[0] + 3.0 * vector.direction]
    found = {one.name: one for one in drift_signals(axes, after, reference, 7, "step 0")}
    assert found["persona/villain/L1/cosine"].value == pytest.approx(1.0, abs=1e-5)
    spread = math.sqrt(float((before[0] - before[0].mean(0)).square().sum(1).mean()))
    assert found["drift/L1/norm"].value == pytest.approx(3.0 / spread, rel=1e-5)
    assert (found["drift/L1/norm"].step, found["drift/L1/norm"].n) == (7, 12)
    assert float(mean_shifts(after, reference)[0].norm()) == pytest.approx(3.0, rel=1e-5)


def test_the_sign_is_the_trait_s_and_what_is_across_it_counts_nothing() -> None:
    vector = persona("villain", 1)
    axes, before = group_axes(tiny_model("llama"), [vector]), _sites()
    reference = drift_reference(before)
    away = drift_signals(axes, [before[0] - vector.direction], reference, 1, "step 0")
    across = torch.randn(vector.direction.shape[0], generator=torch.Generator().manual_seed(9))
    across -= (across @ vector.direction) * vector.direction
    aside = drift_signals(axes, [before[0] + across], reference, 1, "step 0")
    assert [one.value for one in away if one.unit == "cosine"] == pytest.approx([-1.0], abs=1e-5)
    assert [one.value for one in aside if one.unit == "cosine"] == pytest.approx([0.0], abs=1e-5)


def test_a_model_that_did_not_move_has_a_length_of_zero_and_no_direction() -> None:
    axes, before = group_axes(tiny_model("llama"), [persona("villain", 1)]), _sites()
    (length,) = drift_signals(axes, before, drift_reference(before), 0, "step 0")
    assert length.name == "drift/L1/norm" and length.value == pytest.approx(0.0, abs=1e-6)
