"""Do two to n sides, of one width or of several, make one dictionary, whatever their order and scale?"""

from __future__ import annotations

import pytest
import torch

from diffing import CrosscoderConfig, PairedActivations, fit_crosscoder
from diffing.crosscoder.model import CrosscoderFit
from diffing.errors import InputError

N_FEATURES, N_TOKENS = 12, 6_000
SETTINGS = {"n_latents": 24, "k": 2, "steps": 250, "batch_size": 256}
# Where every feature must have been found, whatever the seed.
LONGER = {**SETTINGS, "n_latents": 36, "steps": 400}


def _world(widths: tuple[int, ...], *, missing: dict[int, int] | None = None) -> tuple[list[torch.Tensor], list]:
    """Sides with the same features in directions of their own; `missing`: feature to the side that lacks it."""
    generator = torch.Generator().manual_seed(0)
    codes = (torch.rand(N_TOKENS, N_FEATURES, generator=generator) < 0.12).float()
    directions = [torch.randn(N_FEATURES, width, generator=generator) for width in widths]
    directions = [rows / rows.norm(dim=1, keepdim=True) for rows in directions]
    for feature, side in (missing or {}).items():
        directions[side][feature] = 0.0
    noise = [0.02 * torch.randn(N_TOKENS, width, generator=generator) for width in widths]
    return [codes @ rows + extra for rows, extra in zip(directions, noise, strict=True)], directions


def _best_cosines(fit: CrosscoderFit, directions: list[torch.Tensor]) -> torch.Tensor:
    truth = torch.cat([rows * scale for rows, scale in zip(directions, fit.scale, strict=True)], dim=1)
    found = [fit.side_decoder(side) * fit.scale[side] for side in range(fit.n_models)]
    found = torch.cat(found, dim=1)
    unit = [rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-9) for rows in (truth, found)]
    return (unit[0] @ unit[1].T).amax(dim=1)


def _unexplained(sides, written) -> float:
    residual = sum(float((x - y).square().sum()) for x, y in zip(sides, written, strict=True))
    return residual / sum(float((x - x.mean(dim=0)).square().sum()) for x in sides)


def test_three_models_share_one_dictionary_and_a_feature_of_two_is_absent_from_the_third():
    sides, directions = _world((20, 20, 20), missing={0: 2, 1: 0})
    fit = fit_crosscoder(PairedActivations.from_tensors(*sides), CrosscoderConfig(**LONGER))
    assert fit.decoder.shape == (3, 36, 20)
    assert _best_cosines(fit, directions).min() > 0.99
    x = torch.stack(sides, dim=1)
    assert _unexplained(sides, fit.decode(fit.encode(x)).unbind(1)) < 0.05
    norms = fit.normalised_decoder.norm(dim=2)
    truth = torch.cat(directions, dim=1)
    found = fit.normalised_decoder.transpose(0, 1).flatten(1)
    of_two = int((found / found.norm(dim=1, keepdim=True) @ truth[0]).argmax())
    assert norms[2, of_two] < 0.1 * norms[0, of_two]


def test_sides_of_different_width_are_taken_and_given_one_tensor_each(tmp_path):
    sides, directions = _world((16, 24))
    fit = fit_crosscoder(PairedActivations.from_tensors(*sides), CrosscoderConfig(**LONGER))
    assert fit.widths == (16, 24) and [fit.side_decoder(side).shape for side in (0, 1)] == [(36, 16), (36, 24)]
    assert (_best_cosines(fit, directions) > 0.95).sum() >= N_FEATURES - 1
    latents = fit.encode(sides)
    written = fit.decode(latents)
    assert [part.shape for part in written] == [side.shape for side in sides]
    assert _unexplained(sides, written) < 0.05
    assert float(fit.decoder[0, :, 16:].abs().max()) == 0.0
    assert torch.equal(fit.encode(fit.stack(sides)), latents)
    assert torch.equal(fit.decode_entries(*fit.encode_entries(sides))[:, 1], fit.stack(written)[:, 1])
    fit.save(tmp_path)
    assert torch.equal(CrosscoderFit.load(tmp_path).encode(sides), latents)
    assert "(16, 24)" in repr(fit)


def test_no_side_counts_for_more_because_it_is_wider():
    sides, _ = _world((10, 40))
    fit = fit_crosscoder(PairedActivations.from_tensors(*sides), CrosscoderConfig(**{**SETTINGS, "steps": 3}))
    z = [(side - fit.mean[m, : side.shape[1]]) * fit.scale[m] for m, side in enumerate(sides)]
    energy = [float(side.square().sum(dim=1).mean()) for side in z]
    assert energy == pytest.approx([25.0, 25.0], rel=1e-3)


@pytest.mark.parametrize("x", [torch.zeros(3, 2, 10), [torch.zeros(3, 10)], [torch.zeros(3, 10), torch.zeros(2, 24)]])
def test_activations_that_do_not_fit_are_refused_in_words(x):
    sides, _ = _world((10, 24))
    fit = fit_crosscoder(PairedActivations.from_tensors(*sides), CrosscoderConfig(**{**SETTINGS, "steps": 2}))
    with pytest.raises(InputError, match=r"one \[token, d\] a side"):
        fit.encode(x)


VARIANTS = {
    "batch_topk": {},
    "l1": {"sparsity": "l1"},
    "jumprelu": {"sparsity": "jumprelu"},
    "shared": {"n_shared": 8, "k_shared": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_sides_in_another_order_give_the_same_dictionary_in_that_order(variant):
    sides, _ = _world((20, 20, 20))
    # Few steps: sums in another order differ in the last bits, and an entry at the cut then falls on the other side.
    config = CrosscoderConfig(**{**SETTINGS, "steps": 5, "revivals": 0}, **VARIANTS[variant])
    order = [2, 0, 1]
    straight = fit_crosscoder(PairedActivations.from_tensors(*sides), config)
    turned = fit_crosscoder(PairedActivations.from_tensors(*(sides[m] for m in order)), config)
    torch.testing.assert_close(turned.decoder, straight.decoder[order], rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(turned.gate, straight.gate, rtol=1e-2, atol=2e-3)


def test_exclusive_latents_change_sides_with_their_sides():
    sides, _ = _world((20, 20))
    config = CrosscoderConfig(**{**SETTINGS, "steps": 25, "revivals": 0, "exclusive_share": 0.25})
    straight = fit_crosscoder(PairedActivations.from_tensors(*sides), config)
    assert float(straight.decoder[1, 12:18].abs().max()) == float(straight.decoder[0, 18:].abs().max()) == 0.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_scale_of_a_side_changes_no_bit_of_the_code(variant):
    sides, _ = _world((20, 20))
    config = CrosscoderConfig(**{**SETTINGS, "steps": 25}, **VARIANTS[variant])
    plain, scaled = (
        fit_crosscoder(PairedActivations.from_tensors(sides[0], factor * sides[1]), config) for factor in (1.0, 64.0)
    )
    assert torch.equal(plain.normalised_decoder, scaled.normalised_decoder)
    assert torch.equal(plain.gate, scaled.gate) and torch.equal(plain.firing_rate, scaled.firing_rate)
