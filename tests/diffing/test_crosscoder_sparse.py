"""Is the sparse path the dense one, forwards and backwards?"""

from __future__ import annotations

import pytest
import torch

from diffing import CrosscoderConfig
from diffing.crosscoder.select import find_cut, select_above, select_top
from diffing.crosscoder.sparse import decode_entries, encode_entries
from diffing.crosscoder.training import Training
from diffing.crosscoder.weights import Weights


def _problem(n_tokens: int = 40, n_latents: int = 24, width: int = 6):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(n_tokens, width), draw(n_latents, width), draw(n_latents) * 0.1, draw(n_latents, width)


def test_gradients_equal_those_of_the_dense_masked_product_in_float64():
    inputs, encoder, bias, decoder = _problem()
    gate = torch.full((24,), 0.7, dtype=torch.float64)
    results = {}
    for path in ("sparse", "dense"):
        weights = [tensor.clone().requires_grad_(True) for tensor in (encoder, bias, decoder)]
        if path == "sparse":
            with torch.no_grad():
                support, values = select_above(inputs, weights[0], weights[1], gate)
            values = encode_entries(values, inputs, weights[0], weights[1], support)
            written = decode_entries(values, weights[2], support)
        else:
            pre = inputs @ weights[0].T + weights[1]
            written = (pre * (pre > gate)) @ weights[2]
        loss = (inputs - written).pow(2).sum()
        loss.backward()
        results[path] = [loss.detach(), *(weight.grad for weight in weights)]
    for sparse, dense in zip(results["sparse"], results["dense"], strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-12)


def test_the_cut_is_the_exact_value_that_k_latents_a_token_exceed():
    inputs, encoder, bias, _ = _problem()
    norms = torch.linspace(0.5, 2.0, 24, dtype=torch.float64)
    weighted = ((inputs @ encoder.T + bias) * norms).flatten()
    assert find_cut(inputs, encoder, bias, norms, k=3) == pytest.approx(float(weighted.topk(120).values[-1]))


def test_the_cut_does_not_depend_on_how_many_rows_are_held_at_once(monkeypatch):
    inputs, encoder, bias, _ = _problem()
    norms = torch.ones(24, dtype=torch.float64)
    whole = find_cut(inputs, encoder, bias, norms, k=3)
    monkeypatch.setattr("diffing.crosscoder.select._HELD_ENTRIES", 24 * 7)
    assert find_cut(inputs, encoder, bias, norms, k=3) == whole
    held = select_above(inputs, encoder, bias, whole / norms)
    monkeypatch.undo()
    together = select_above(inputs, encoder, bias, whole / norms)
    assert torch.equal(held[0].rows, together[0].rows)
    torch.testing.assert_close(held[1], together[1])


def test_fewer_positive_values_than_asked_for_means_everything_positive():
    inputs, encoder, bias, _ = _problem(n_tokens=4)
    norms = torch.ones(24, dtype=torch.float64)
    support, values, cut = select_top(inputs, encoder, bias, norms, k=24)
    assert cut == 0.0
    assert (values > 0).all() and len(values) == int((inputs @ encoder.T + bias > 0).sum())
    assert support.n_rows == 4


def test_selection_keeps_about_k_a_token_and_prefers_large_decoders():
    inputs, encoder, bias, _ = _problem(n_tokens=4000)
    norms = torch.ones(24, dtype=torch.float64)
    norms[0] = 100.0
    support, _, _ = select_top(inputs, encoder, bias, norms, k=3)
    counts = torch.bincount(support.columns, minlength=24)
    assert len(support.rows) / 4000 == pytest.approx(3.0, rel=0.1)
    assert counts[0] == counts.max()


def test_a_token_without_active_latents_is_written_as_nothing():
    inputs, encoder, bias, decoder = _problem(n_tokens=3)
    gate = torch.full((24,), 1e9, dtype=torch.float64)
    support, values = select_above(inputs, encoder, bias, gate)
    assert torch.equal(decode_entries(values, decoder, support), torch.zeros(3, 6, dtype=torch.float64))


def test_the_first_decoder_is_as_long_as_explains_most_of_the_first_batch():
    batch = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    config = CrosscoderConfig(n_latents=512, k=8, steps=10, batch_size=256)

    def unexplained(multiple: float, *, scaled: bool = True) -> float:
        training = Training(config, Weights.initial(512, 2, 16, seed=0))
        if scaled:
            training.scale_decoder(batch)
        with torch.no_grad():
            training.weights.decoder *= multiple
            return float(training.loss(batch).unexplained)

    assert unexplained(1.0, scaled=False) > 1.0
    assert unexplained(1.0) < min(unexplained(0.95), unexplained(1.05), 0.9)


def test_priced_latents_keep_unit_rows():
    weights = Weights.initial(64, 2, 16, seed=0)
    before = weights.decoder.clone()
    training = Training(CrosscoderConfig(n_latents=64, k=8, sparsity="l1"), weights)
    training.scale_decoder(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(training.weights.decoder, before)
