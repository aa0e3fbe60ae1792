"""A forecast is the slow inner product of gradients, and what training's first step then does."""

import json

import numpy as np
import pytest
import torch

from attribution import CompletionQuery
from attribution.forecast import ForecastSettings, forecast
from attribution.pushes import measure_pushes
from diffing.errors import InputError
from tests.attribution.models import random_rows, row_gradient, tiny_gpt2, tiny_llama, tiny_lora

MODELS = {"llama": tiny_llama, "tied": lambda: tiny_llama(tied=True), "gpt2": tiny_gpt2, "lora": tiny_lora}


def slow(model, rows, query, blocks):
    wanted = dict(model.named_parameters())
    parameters = [wanted[name] for name in blocks]
    aim = torch.autograd.grad(query.value(model), parameters, allow_unused=True)
    aim = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(aim, parameters, strict=True)])
    rows = torch.stack([torch.cat([g.flatten() for g in row_gradient(model, row, parameters)]) for row in rows])
    return aim, rows


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_pushes_are_the_slow_inner_products(name, batch_size):
    model = MODELS[name]().eval()
    rows, query = random_rows(7), CompletionQuery(random_rows(2, seed=5))
    found = measure_pushes(model, rows, [query], centre=True, batch_size=batch_size, embeddings=name == "tied")
    aim, gradients = slow(model, rows, query, found.blocks)
    mean = gradients.mean(0)
    np.testing.assert_allclose(found.scores[0], -(gradients @ aim).detach().numpy(), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.squares, gradients.square().sum(1).numpy(), rtol=1e-6)
    np.testing.assert_allclose(found.along_mean, (gradients @ mean).numpy(), rtol=1e-6)
    assert found.mean_norm == pytest.approx(float(mean.norm()), rel=1e-6)
    centred = gradients - mean
    cosines = -(centred @ aim) / (centred.norm(dim=1) * aim.norm())
    np.testing.assert_allclose(found.centred()[0], cosines.detach().numpy(), rtol=1e-5)


def test_embeddings_heads_and_norms_are_left_out_unless_asked_for():
    found = measure_pushes(tiny_llama(), random_rows(3), [CompletionQuery(random_rows(1, seed=3))])
    assert all("layers" in name and "norm" not in name for name in found.blocks)
    every = measure_pushes(tiny_llama(), random_rows(3), [CompletionQuery(random_rows(1, seed=3))], embeddings=True)
    assert any("embed" in name for name in every.blocks)


def test_one_small_step_of_descent_does_what_was_forecast():
    model, rows = tiny_llama().eval(), random_rows(12)
    query, rate = CompletionQuery(random_rows(3, seed=9)), 1e-5
    settings = ForecastSettings(learning_rate=rate, batch_size=12)
    result, pushes = forecast(model, rows, [query], settings=settings)
    wanted = dict(model.named_parameters())
    parameters = [wanted[name] for name in pushes.blocks]
    tokens = int(pushes.tokens.sum())
    gradients = [sum(parts) / tokens for parts in zip(*(row_gradient(model, r, parameters) for r in rows), strict=True)]
    before = float(query.value(model).detach())
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= rate * gradient
    (trait,) = result.traits
    assert result.steps == 1
    assert trait.now == pytest.approx(before)
    assert float(query.value(model).detach()) - before == pytest.approx(trait.movement, rel=0.02)
    assert trait.low < trait.slope < trait.high
    # What a row of the query itself pushes is up, and training on its opposite is down.
    assert trait.slope * trait.alignment > 0


def test_a_dataset_of_the_query_itself_is_the_path_of_least_resistance():
    wanted, other = random_rows(6, seed=1), random_rows(6, seed=2)
    queries = [CompletionQuery(other, name="other"), CompletionQuery(wanted, name="itself")]
    result, _ = forecast(tiny_llama(), wanted, queries)
    assert [trait.name for trait in result.traits] == ["itself", "other"]
    assert result.traits[0].alignment == pytest.approx(1.0, abs=1e-6)
    assert result.traits[0].slope > 0 and result.traits[0].is_sure


def test_batches_do_not_matter_to_slope_interval_or_rows():
    rows, query = random_rows(9), [CompletionQuery(random_rows(2, seed=5))]
    one, _ = forecast(tiny_lora(), rows, query, batch_size=1)
    all_, _ = forecast(tiny_lora(), rows, query, batch_size=9)
    assert one.weights == "LoRA"
    for name in ("slope", "low", "high", "alignment", "now"):
        assert getattr(one.traits[0], name) == pytest.approx(getattr(all_.traits[0], name), rel=1e-6)
    assert [r.example_id for r in one.rows[query[0].name]] == [r.example_id for r in all_.rows[query[0].name]]


def test_the_model_is_left_as_it_was_and_json_is_strict(tmp_path):
    model = tiny_llama().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result, _ = forecast(model, random_rows(3), [CompletionQuery(random_rows(1, seed=2))])
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    kept = json.loads(result.save(tmp_path).read_text())
    assert kept["traits"][0]["low"] is None  # three rows have no interval
    assert len(kept["rows"]["completion log-probability"]) == 3


def test_wrong_input_is_explained():
    rows, query = random_rows(3), CompletionQuery(random_rows(1))
    with pytest.raises(InputError, match="at least one query"):
        measure_pushes(tiny_llama(), rows, [])
    with pytest.raises(InputError, match="centre=True"):
        measure_pushes(tiny_llama(), rows, [query]).centred()
    with pytest.raises(InputError, match="learning rate"):
        ForecastSettings(learning_rate=0)
