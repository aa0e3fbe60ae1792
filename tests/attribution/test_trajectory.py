"""Scores along a run: what each checkpoint adds, and the ranking that people read."""

import numpy as np
import pytest

from attribution import Attribution, CompletionQuery, SavedStep, rank_rows, score_query, score_trajectory
from attribution.trajectory import influence_along
from diffing.errors import InputError, PathMissingError
from tests.attribution.models import random_rows, tiny_llama


def test_trajectory_is_the_learning_rate_weighted_sum_over_checkpoints():
    models = {4: tiny_llama(seed=1), 8: tiny_llama(seed=2)}
    train, query = random_rows(5), CompletionQuery(random_rows(1, seed=8))
    scores = score_trajectory(
        [SavedStep(8, 0.5, lambda: models[8]), SavedStep(4, 2.0, lambda: models[4])], train, [query]
    )
    expected = 2.0 * score_query(models[4], train, [query]).values + 0.5 * score_query(models[8], train, [query]).values
    assert scores.steps == (4, 8)
    np.testing.assert_allclose(scores.values, expected)


def test_level_checkpoints_weigh_alike_whatever_the_size_of_their_gradients():
    models = {4: tiny_llama(seed=1), 8: tiny_llama(seed=2)}
    saved = [SavedStep(4, 1.0, lambda: models[4]), SavedStep(8, 1.0, lambda: models[8])]
    scores = influence_along(saved, random_rows(5), random_rows(2, seed=8), method="dot", level=True)
    np.testing.assert_allclose(scores.per_step.std(axis=2), 1.0)


def test_no_checkpoint_is_refused():
    with pytest.raises(InputError, match="at least one saved checkpoint"):
        score_trajectory([], random_rows(2), [CompletionQuery(random_rows(1))])


def test_ranking_keeps_both_ends_and_real_ranks():
    rows = rank_rows(np.array([0.0, 3.0, -2.0, 1.0]), ["a", "b", "c", "d"], texts={"b": "hello"}, keep=1)
    assert [(row.rank, row.example_id) for row in rows] == [(1, "b"), (4, "c")]
    assert rows[0].text == "hello"
    assert rows[0].share == pytest.approx(0.75)
    assert rows[1].share == pytest.approx(-0.5)


def test_attribution_survives_saving(tmp_path):
    rows = rank_rows(np.array([1.0, -1.0]), ["a", "b"], texts={}, tags={"a": "bad"})
    saved = Attribution("evil", "dot", rows, 2, (4, 8), caveats=("Not validated.",))
    saved.save(tmp_path)
    assert Attribution.load(tmp_path) == saved


def test_missing_attribution_says_which_command_makes_it(tmp_path):
    with pytest.raises(PathMissingError, match="palimpsest attribute"):
        Attribution.load(tmp_path)
