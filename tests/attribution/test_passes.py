"""What the front door promises: its signature, one backward a batch, one pass over the rows, an exact diagonal."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from attribution import influence, prepare_rows
from attribution.curvature import Identity
from attribution.example import batches
from attribution.fit import fit_curvature
from attribution.gradients import evaluating, find_blocks, record_rows, row_losses
from attribution.index import GradientIndex
from attribution.influence import score_query
from attribution.queries import CompletionQuery
from tests.attribution.models import random_rows, row_gradient, tiny_gpt2, tiny_llama, tiny_lora


def test_the_front_door_takes_what_others_benchmarks_give_it():
    parameters = inspect.signature(influence).parameters
    assert list(parameters)[:3] == ["model", "train_rows", "query_rows"]
    keywords = {name: one for name, one in parameters.items() if one.kind is inspect.Parameter.KEYWORD_ONLY}
    assert {"method", "batch_size", "seed"} <= keywords.keys()
    assert keywords["method"].default == "ekfac" and keywords["seed"].default == 0
    rows = [{"input_ids": torch.tensor([1, 2, 3, 4]), "attention_mask": torch.ones(4, dtype=torch.long),
             "labels": torch.tensor([-100, 2, 3, 4])} for _ in range(2)]  # fmt: skip
    scores = influence(tiny_llama(), rows, rows[:1], method="ekfac", batch_size=2, seed=0)
    assert scores.values.shape == (1, 2)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_lora])
def test_a_batch_takes_one_backward_whatever_its_size(make, monkeypatch):
    model = make()
    blocks, _ = find_blocks(model)
    backward, calls = torch.autograd.grad, []

    def counted(*arguments, **more):
        calls.append(arguments)
        return backward(*arguments, **more)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    (batch,) = batches(random_rows(6), 6)
    with evaluating(model):
        recorded = record_rows(model, blocks, batch, row_losses)
        assert len(calls) == 1
        for block in blocks:
            assert len(recorded.gradient(block)) == 6
    assert len(calls) == 1, "a block asked for a backward of its own"


def test_all_queries_are_scored_in_one_pass_over_the_rows():
    model, rows, seen = tiny_llama(), random_rows(12), []
    scorer = prepare_rows(model, random_rows(5, seed=3), curvature=Identity(), batch_size=4)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    values = scorer.scores(rows)
    assert values.shape == (5, 12) and sum(seen) == 12


def test_a_diagonal_is_the_mean_squared_gradient_damped_by_its_mean():
    model, rows = tiny_llama(), random_rows(6)
    query = CompletionQuery(random_rows(1, seed=8))
    blocks, _ = find_blocks(model)
    curvature = fit_curvature(model, rows, kind="diagonal", labels="data")
    assert "damping 0.1 x mean eigenvalue by block" in curvature.description
    parameters = [block.parameter for block in blocks]
    gradients = [row_gradient(model, row, parameters) for row in rows]
    wanted = torch.autograd.grad(query.value(model), parameters)
    found = score_query(model, rows, [query], method=curvature).values[0]
    for place, gradient in enumerate(gradients):
        slow = 0.0
        for index, (q, g) in enumerate(zip(wanted, gradient, strict=True)):
            second = torch.stack([row[index].double().square() for row in gradients]).mean(dim=0)
            slow -= float((q * g / (second + 0.1 * second.mean())).sum())
        assert found[place] == pytest.approx(slow, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    "kind", ["random", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("rows", "eigen"))]
)
def test_every_kind_of_sketch_states_its_agreement(kind, tmp_path):
    model, rows = tiny_llama().float(), random_rows(48)
    curvature = fit_curvature(model, rows, kind="diagonal")
    index = GradientIndex.build(model, rows, curvature, tmp_path, dim=24, head=8, kind=kind, sample=32,
                                check_queries=4, checked_rows=16)  # fmt: skip
    assert -1 <= index.agreement.lowest <= index.agreement.rank_correlation <= 1
    assert f"{index.agreement.rank_correlation:.3f}" in repr(index)
    assert np.isfinite(index.scores(rows[:1])).all()
