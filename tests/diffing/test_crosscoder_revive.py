"""Do idle latents take over what nobody explains?"""

from __future__ import annotations

import pytest
import torch

from diffing import CrosscoderConfig
from diffing.crosscoder.revive import find_missing_directions
from diffing.crosscoder.training import Training, Weights
from diffing.errors import InputError


def test_the_directions_that_residuals_share_are_found_most_shared_first():
    generator = torch.Generator().manual_seed(0)
    truth = torch.eye(40)[:3]
    counts, rows = (30, 12, 5), []
    for direction, count in zip(truth, counts, strict=True):
        rows.append(2.0 * direction + 0.05 * torch.randn(count, 40, generator=generator))
    residuals = torch.cat([*rows, 0.5 * torch.randn(20, 40, generator=generator)])
    found, lengths = find_missing_directions(residuals, 10)
    assert len(found) == 3
    assert torch.allclose((found * truth).sum(dim=1), torch.ones(3), atol=0.02)
    assert lengths.tolist() == pytest.approx([2.0] * 3, abs=0.1)
    assert len(find_missing_directions(residuals, 1)[0]) == 1


def test_no_common_direction_and_no_residual_give_none():
    assert len(find_missing_directions(torch.eye(8), 5)[0]) == 0
    assert len(find_missing_directions(torch.zeros(8, 4), 5)[0]) == 0


def test_a_direction_under_noise_is_found_where_less_alike_residuals_count():
    generator = torch.Generator().manual_seed(0)
    # Two residuals that miss it have a cosine of about 1 / (1 + 1.5²) = 0.31; chance gives 1 / √1000 = 0.03.
    truth = torch.eye(1000)[0]
    residuals = truth + 1.5 / 1000**0.5 * torch.randn(40, 1000, generator=generator)
    assert len(find_missing_directions(residuals, 1)[0]) == 0
    (found,), _ = find_missing_directions(residuals, 1, alike=0.25)
    assert float(found @ truth) > 0.9
    noise = torch.randn(40, 1000, generator=generator)
    assert len(find_missing_directions(noise, 1, alike=0.25)[0]) == 0


def test_how_alike_is_a_setting_of_the_fit(monkeypatch):
    asked: list[float] = []

    def record(residuals, n, *, alike):
        asked.append(alike)
        return find_missing_directions(residuals, n, alike=alike)

    monkeypatch.setattr("diffing.crosscoder.training.find_missing_directions", record)
    settings = {"n_latents": 8, "k": 2, "steps": 60, "batch_size": 256, "revivals": 2}
    for config in (CrosscoderConfig(**settings), CrosscoderConfig(**settings, revive_alike=0.3)):
        training = Training(config, Weights.initial(8, 2, 16, seed=0))
        for _ in range(config.revival_interval):
            training.advance(torch.randn(256, 32, generator=torch.Generator().manual_seed(1)))
    assert asked == [0.5, 0.3]
    with pytest.raises(InputError, match="revive_alike"):
        CrosscoderConfig(**settings, revive_alike=0.0)


def test_revival_finds_features_that_no_latent_would_have_found():
    # Over seeds 10 to 21 the ratio is 0.57, and ten of the twelve are better off; one seed alone says little.
    unexplained = {revivals: [_with_a_silent_latent(seed, revivals) for seed in range(10, 16)] for revivals in (4, 0)}
    assert sum(unexplained[4]) < 0.75 * sum(unexplained[0])


def _with_a_silent_latent(seed: int, revivals: int) -> float:
    """Six features, six latents, of which one can never fire again by itself."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(6, 32, generator=generator)
    config = CrosscoderConfig(n_latents=6, k=2, steps=200, batch_size=256, revivals=revivals, idle_below=0.2)
    weights = Weights.initial(6, 2, 16, seed=0)
    with torch.no_grad():
        weights.encoder_bias[3] = -1e6
    training = Training(config, weights)
    for _ in range(200):
        codes = (torch.rand(256, 6, generator=generator) < 0.3).float()
        training.advance(codes @ directions + 0.01 * torch.randn(256, 32, generator=generator))
    assert (weights.encoder_bias[3] > -1e5) == bool(revivals)
    return training.trace[-1].unexplained


def test_latents_that_had_no_time_to_fire_are_not_revived():
    few, many = (CrosscoderConfig(n_latents=n, k=10, steps=200, batch_size=512) for n in (512, 32_768))
    assert few.revival_interval == 12
    assert many.revival_interval > 200
