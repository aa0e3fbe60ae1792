"""One set of prepared queries asked in several ways gives one answer; stores go on where they stopped."""

import json

import numpy as np
import pytest
import torch

from attribution import fit_curvature, influence
from attribution.example import example_id, segments_of, split_packed
from attribution.score_store import ScoreStore, write_scores
from attribution.scorer import prepare_queries, prepare_rows
from diffing.errors import ComparabilityError, InputError, StoreCorruptError
from tests.attribution.models import random_rows, tiny_gpt2, tiny_llama, tiny_lora
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def scorer():
    model = tiny_gpt2()
    curvature = fit_curvature(model, random_rows(8), labels="data")
    return prepare_rows(model, random_rows(3, seed=4), curvature=curvature)


def test_modules_add_up_to_the_scores(scorer):
    rows = random_rows(7)
    by_module = scorer.by_module(rows)
    assert by_module.shape == (len(scorer.blocks), 3, 7)
    np.testing.assert_allclose(by_module.sum(axis=0), scorer.scores(rows), rtol=1e-8)


def test_tokens_add_up_to_the_scores(scorer):
    rows = random_rows(4)
    scores = scorer.scores(rows)
    for index, one in enumerate(scorer.by_token(rows)):
        assert one.values.shape == (3, len(rows[index]["input_ids"]))
        np.testing.assert_allclose(one.values.sum(axis=1) + one.rest, scores[:, index], rtol=1e-5)


def test_nothing_is_learned_at_a_rows_last_token(scorer):
    (one,) = scorer.by_token(random_rows(1))
    assert np.abs(one.values[:, -1]).max() == 0
    assert np.abs(one.values[:, 0]).max() > 0


def test_top_rows_are_those_of_the_whole_matrix(scorer):
    rows = random_rows(9)
    values = scorer.scores(rows)
    for query, top in enumerate(scorer.top(rows, 4)):
        order = np.argsort(-values[query])[:4]
        assert top.positions == tuple(order.tolist())
        assert top.examples == tuple(rows[place]["id"] for place in order)
        np.testing.assert_allclose(top.values, values[query, order])


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_lora])
def test_a_rank_as_large_as_the_matrix_loses_nothing(make):
    model, train, queries = make(), random_rows(6), random_rows(2, seed=5)
    curvature = fit_curvature(model, train, labels="data")
    whole = prepare_rows(model, queries, curvature=curvature).scores(train)
    low = prepare_rows(model, queries, curvature=curvature, rank=7)
    assert low.kept > 0.95
    assert np.corrcoef(low.scores(train).ravel(), whole.ravel())[0, 1] > 0.98
    full = prepare_rows(model, queries, curvature=curvature, rank=64)
    np.testing.assert_allclose(full.scores(train), whole, rtol=1e-6)


def test_what_a_low_rank_loses_is_measured(scorer):
    low = prepare_rows(scorer.model, random_rows(3, seed=4), curvature=scorer.curvature, rank=1)
    assert 0 < low.kept < 1
    assert "low-rank" in low.description
    with pytest.raises(InputError, match="by token"):
        low.by_token(random_rows(1))


def test_packed_rows_score_as_their_segments_do():
    model, rows, query = tiny_llama(), random_rows(4), random_rows(1, seed=8)
    packed = {
        "id": "pack",
        "ids": [row["id"] for row in rows],
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in row["labels"]],
        "position_ids": [place for row in rows for place in range(len(row["input_ids"]))],
    }
    found = influence(model, [packed], query, method="dot")
    assert found.examples == tuple(row["id"] for row in rows)
    np.testing.assert_allclose(found.values, influence(model, rows, query, method="dot").values, rtol=1e-6)


def test_segments_without_names_are_numbered():
    packed = {"id": "p", "input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "position_ids": [0, 1, 0, 1]}
    assert [row["id"] for row in split_packed([packed])] == ["p/0", "p/1"]
    positions, mask = torch.tensor([[0, 1, 0, 1, 0], [0, 1, 2, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    assert segments_of(positions, mask).tolist() == [[0, 0, 1, 1, -1], [2, 2, 2, -1, -1]]


def test_experts_without_a_token_score_nothing_and_do_not_fail():
    model = tiny_model("mixtral", num_hidden_layers=1, num_local_experts=4)
    model.config.vocab_size = 96
    scores = influence(model, random_rows(4), random_rows(1, seed=2)).values
    assert np.isfinite(scores).all()


def test_a_store_goes_on_where_it_stopped(scorer, tmp_path, monkeypatch):
    monkeypatch.setattr("attribution.score_store.CHUNK_ROWS", 4)
    rows = random_rows(10)
    calls = []
    original = type(scorer).scores

    def stop_after_two(self, some):
        calls.append(len(some))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, some)

    monkeypatch.setattr(type(scorer), "scores", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        write_scores(scorer, rows, tmp_path)
    assert ScoreStore.open(tmp_path).n_scored == 8
    store = write_scores(scorer, rows, tmp_path)
    assert calls == [4, 4, 2, 2]
    monkeypatch.undo()
    monkeypatch.setattr("attribution.score_store.CHUNK_ROWS", 4)
    whole = scorer.scores(rows)
    assert store.examples == tuple(row["id"] for row in rows)
    for query in range(3):
        np.testing.assert_allclose(store.values(query), whole[query], rtol=1e-5)
        assert store.top(query, 3).positions == tuple(np.argsort(-whole[query])[:3].tolist())


def test_a_store_of_other_rows_is_refused_and_damage_is_seen(scorer, tmp_path):
    write_scores(scorer, random_rows(3), tmp_path)
    with pytest.raises(ComparabilityError, match="rows"):
        write_scores(scorer, random_rows(3, seed=1), tmp_path)
    chunk = next((tmp_path / "values").glob("c.*"))
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    with pytest.raises(StoreCorruptError):
        ScoreStore.open(tmp_path).values(0)
    assert json.loads((tmp_path / "scores.json").read_text())["queries"]


def test_a_query_that_nothing_trainable_reaches_is_refused():
    model = tiny_llama()
    identity = fit_curvature(model, random_rows(2), kind="identity")

    class Constant:
        name = "constant"

        def value(self, model):
            return torch.ones((), requires_grad=True) * 1.0

    with pytest.raises(InputError, match="depends on none"):
        prepare_queries(model, [Constant()], curvature=identity)
    with pytest.raises(InputError, match="at least one query"):
        prepare_queries(model, [], curvature=identity)


def test_what_stands_behind_the_last_label_changes_nothing_and_names_stay():
    model = tiny_llama()
    rows, queries = random_rows(4), random_rows(2, seed=9)
    bare = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    more = [{"input_ids": [*map(int, row["input_ids"]), 3, 4, 5], "labels": [*map(int, row["labels"]), *[-100] * 3]}
            for row in bare]  # fmt: skip
    short, long = (influence(model, each, queries, method="dot") for each in (bare, more))
    np.testing.assert_allclose(short.values, long.values, rtol=1e-4, atol=1e-5 * np.abs(short.values).max())
    assert long.examples == tuple(example_id(row) for row in more)
