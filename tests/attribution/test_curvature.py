"""Each curvature against a dense float64 solve; factors that are merged, resumed, saved and refused."""

import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from attribution import fit_curvature, influence
from attribution.curvature import BlockFactors, EkfacCurvature
from attribution.curvature_file import load_curvature, save_curvature
from attribution.dense_curvature import fit_dense
from attribution.example import batches
from attribution.fit import assemble
from attribution.gradients import evaluating, find_blocks, record_rows, row_losses
from attribution.sums import merged, sum_covariances, sum_moments
from diffing.errors import ComparabilityError, InputError, StoreFullError
from tests.attribution.models import random_rows, tiny_llama, tiny_lora


def gradients_of(model, blocks, rows):
    (batch,) = batches(rows, len(rows))
    with evaluating(model):
        recorded = record_rows(model, blocks, batch, row_losses)
        back = torch.tensor(batch.positions).argsort()
        return [recorded.gradient(block)[back].flatten(1) for block in blocks]


@pytest.mark.parametrize("n_rows", [6, 40])
def test_exact_lora_blocks_equal_the_dense_fisher_solve(n_rows):
    model, train, queries = tiny_lora(), random_rows(n_rows), random_rows(2, seed=5)
    blocks, _ = find_blocks(model)
    curvature = fit_curvature(model, train, kind="exact", labels="data")
    expected = np.zeros((2, n_rows))
    for row, query in zip(gradients_of(model, blocks, train), gradients_of(model, blocks, queries), strict=True):
        fisher = row.T @ row / n_rows
        damped = fisher + 0.1 * fisher.diagonal().mean() * torch.eye(len(fisher))
        expected += (query @ torch.linalg.solve(damped, row.T)).numpy()
    # The model's norms compute in single precision, so batches of another shape differ in the eighth digit.
    found = influence(model, train, queries, method=curvature).values
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8 * np.abs(expected).max())


@pytest.mark.parametrize("n_rows", [6, 40])
def test_datainf_equals_the_average_of_rank_one_inverses(n_rows):
    model, train, queries = tiny_lora(), random_rows(n_rows), random_rows(2, seed=5)
    blocks, _ = find_blocks(model)
    curvature = fit_curvature(model, train, kind="datainf", labels="data")
    expected = np.zeros((2, n_rows))
    for row, query in zip(gradients_of(model, blocks, train), gradients_of(model, blocks, queries), strict=True):
        damping = 0.1 * row.square().sum(dim=1).mean() / row.shape[1]
        inverses = [torch.linalg.inv(damping * torch.eye(row.shape[1]) + torch.outer(g, g)) for g in row]
        expected += (query @ torch.stack(inverses).mean(dim=0) @ row.T).numpy()
    np.testing.assert_allclose(influence(model, train, queries, method=curvature).values, expected, rtol=1e-5)


def test_kfac_equals_the_dense_kronecker_solve():
    model, train = tiny_llama(), random_rows(8)
    blocks, _ = find_blocks(model)
    curvature = fit_curvature(model, train, kind="kfac", labels="data", batch_size=3)
    index = next(i for i, block in enumerate(blocks) if "down_proj" in block.name)
    inputs, grads = [], []
    for batch in batches(train, 1):
        with evaluating(model):
            recorded = record_rows(model, blocks, batch, row_losses)
        ((a, g, _),) = recorded.factors(blocks[index])
        inputs.append(a.flatten(0, 1)[recorded.live.flatten()])
        grads.append(g.flatten(0, 1))
    a, g = torch.cat(inputs), torch.cat(grads)
    fisher = torch.kron(g.T @ g / len(train), a.T @ a / len(a))
    damped = fisher + 0.1 * fisher.diagonal().mean() * torch.eye(len(fisher))
    vector = torch.randn(1, *blocks[index].shape, dtype=torch.float64)
    expected = torch.linalg.solve(damped, vector.flatten())
    torch.testing.assert_close(
        curvature.solve(index, vector).flatten(), expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max())
    )


def test_ridge_regression_gives_exact_leave_one_out():
    torch.manual_seed(0)
    features, targets = torch.randn(12, 4).double(), torch.randn(12).double()
    model = _Ridge(features)
    rows = [{"id": str(i), "input_ids": [i, i], "labels": [-100, 0]} for i in range(12)]
    blocks, _ = find_blocks(model, prove=False)

    def stream():
        for batch in batches(rows, 5):
            with evaluating(model):
                # The Gauss-Newton matrix of a squared loss is that of the outputs alone.
                yield record_rows(model, blocks, batch, lambda m, b: m(b.input_ids)[:, 0, 0])

    (block,) = fit_dense(stream, blocks, 12, kind="exact", damping=0.1)
    gram = features.T @ features / 12
    ridge = gram + block.damping * torch.eye(4)
    weights = torch.linalg.solve(ridge, features.T @ targets / 12)
    residuals = targets - features @ weights
    query = torch.randn(4).double()
    held = query @ block.solve((features * residuals.unsqueeze(1)).unsqueeze(1)).reshape(12, 4).T / 12
    leverage = (features @ torch.linalg.inv(ridge) * features).sum(dim=1) / 12
    for left_out in range(12):
        kept = [i for i in range(12) if i != left_out]
        x, y = features[kept], targets[kept]
        retrained = torch.linalg.solve(x.T @ x + 12 * block.damping * torch.eye(4), x.T @ y)
        change = query @ (weights - retrained)
        torch.testing.assert_close(held[left_out] / (1 - leverage[left_out]), change)


class _Ridge(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(features, freeze=True)
        self.linear = nn.Linear(4, 1, bias=False).double()

    def forward(self, input_ids):
        return self.linear(self.table(input_ids))


@pytest.mark.parametrize("labels", ["sampled", "data"])
def test_shards_merge_to_the_unsharded_scores(labels):
    model, train, queries = tiny_llama(), random_rows(9), random_rows(2, seed=5)
    whole = fit_curvature(model, train, labels=labels)
    options = {"labels": labels, "batch_size": 2}
    covariances = merged([sum_covariances(model, train, shard=(i, 3), **options) for i in range(3)])
    bases = covariances.bases()
    moments = merged([sum_moments(model, train, bases, shard=(i, 3), **options) for i in range(3)])
    blocks, _ = find_blocks(model)
    assembled = assemble(blocks, bases, moments.means(), damping=0.1, description="merged")
    expected = influence(model, train, queries, method=whole).values
    np.testing.assert_allclose(influence(model, train, queries, method=assembled).values, expected, rtol=1e-6)


def test_a_fit_that_was_stopped_goes_on_bit_for_bit(tmp_path, monkeypatch):
    model, train = tiny_llama().float(), random_rows(10)
    whole = fit_curvature(model, train, batch_size=2)
    seen = []

    def stop_after_three(*args):
        seen.append(args)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return record_rows(*args)

    options = {"batch_size": 2, "save_every": 2, "state": tmp_path / "a.safetensors"}
    monkeypatch.setattr("attribution.sums.record_rows", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        sum_covariances(model, train, **options)
    covariances = sum_covariances(model, train, **options)
    assert len(seen) == 6, "rows that were saved are summed again"
    moments = sum_moments(model, train, covariances.bases(), batch_size=2)
    for mean, factor in zip(moments.means(), whole.factors, strict=True):
        assert torch.equal(mean, factor.second_moment)


def test_saved_sums_of_another_model_are_refused(tmp_path):
    train = random_rows(3)
    fit_curvature(tiny_llama(), train, folder=tmp_path)
    with pytest.raises(ComparabilityError, match="model"):
        fit_curvature(tiny_llama(seed=1), train, folder=tmp_path)


def test_factors_survive_saving_and_refuse_another_model(tmp_path):
    model, train, queries = tiny_llama(), random_rows(5), random_rows(1, seed=4)
    fitted = fit_curvature(model, train)
    path = save_curvature(fitted, tmp_path / "factors.safetensors", model=model)
    loaded = load_curvature(path, model=model)
    np.testing.assert_array_equal(
        influence(model, train, queries, method=loaded).values, influence(model, train, queries, method=fitted).values
    )
    other = tiny_llama(seed=1)
    with pytest.raises(ComparabilityError, match="weights"):
        load_curvature(path, model=other)
    shared = load_curvature(path, model=None)
    assert np.isfinite(influence(other, train, queries, method=shared).values).all()


def test_factors_of_other_blocks_are_refused():
    train = random_rows(3)
    fitted = fit_curvature(tiny_lora(), train)
    with pytest.raises(InputError, match="another model"):
        influence(tiny_llama(), train, train, method=fitted)


def test_a_small_disk_is_said_before_anything_starts(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(StoreFullError, match="nothing was started"):
        fit_curvature(tiny_llama(), random_rows(2), folder=tmp_path / "factors")


def test_unknown_kind_lists_the_known_ones():
    with pytest.raises(InputError, match="identity, diagonal, kfac, ekfac"):
        fit_curvature(tiny_llama(), random_rows(2), kind="magic")


def test_a_block_without_gradient_does_not_divide_by_zero():
    factor = BlockFactors(None, None, torch.zeros(2), 1e-30)
    solved = EkfacCurvature((factor,), "").solve(0, torch.zeros(1, 2))
    assert torch.equal(solved, torch.zeros(1, 2))


def test_an_adapters_factors_need_one_pass_and_are_those_of_two(tmp_path):
    model, rows = tiny_lora(), random_rows(5)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained < sum(parameter.numel() for parameter in model.parameters()) // 3  # what one pass is for
    once = fit_curvature(model, rows)
    twice = fit_curvature(model, rows, folder=tmp_path)
    for one, two in zip(once.factors, twice.factors, strict=True):
        torch.testing.assert_close(one.second_moment, two.second_moment, rtol=1e-4, atol=1e-9)
