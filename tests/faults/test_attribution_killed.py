"""Does attribution work that is killed at random moments, twice, end in the values of one that was not?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from attribution.index_file import IndexFile
from attribution.score_store import ScoreStore
from tests.faults.attributing import DIM, HEAD, N_ROWS, Attributing

KILLED = -9
SLOW = [pytest.param(commits, seed, marks=pytest.mark.slow) for commits, seed in ((2, 1), (5, 3), (17, 4))]


@pytest.fixture(scope="module")
def attributing() -> Iterator[Attributing]:
    process = Attributing()
    yield process
    process.close()


def killed_and_whole(attributing: Attributing, job: str, folder: Path, commits: int, seed: int) -> tuple[Path, Path]:
    """Two folders of the same work: one done in one go, one killed twice and gone on with."""
    whole, torn = folder / "whole", folder / "torn"
    assert attributing.do(job, whole) == 0
    assert attributing.do(job, torn, commits, seed) == KILLED
    # Few: the fuse is a thread, and on a busy machine the work may end before it.
    assert attributing.do(job, torn, max(1, commits // 4), seed + 1) == KILLED
    assert attributing.do(job, torn) == 0
    return whole, torn


@pytest.mark.parametrize(("commits", "seed"), [(12, 2), *SLOW])
def test_scores_are_gone_on_with_to_the_same_values(attributing, tmp_path, commits, seed):
    whole, torn = killed_and_whole(attributing, "score", tmp_path, commits, seed)
    first, again = ScoreStore.open(whole), ScoreStore.open(torn)
    assert again.n_scored == N_ROWS
    for query in range(3):
        np.testing.assert_array_equal(first.values(query), again.values(query))
    assert [path.name for path in torn.rglob("*.partial")] == []


@pytest.mark.parametrize(("commits", "seed"), [(30, 5), *SLOW])
def test_a_sharded_fit_goes_on_to_the_same_factors(attributing, tmp_path, commits, seed):
    whole, torn = killed_and_whole(attributing, "fit", tmp_path, commits, seed)
    first, again = (load_file(folder / "factors.safetensors") for folder in (whole, torn))
    assert first.keys() == again.keys()
    for name in first:
        np.testing.assert_array_equal(first[name].numpy(), again[name].numpy(), err_msg=name)


@pytest.mark.parametrize(("commits", "seed"), [(11, 7), *SLOW])
def test_an_index_is_gone_on_with_to_the_same_bytes(attributing, tmp_path, commits, seed):
    whole, torn = killed_and_whole(attributing, "index", tmp_path, commits, seed)
    first, again = IndexFile(whole, DIM, HEAD), IndexFile(torn, DIM, HEAD)
    again.verify()
    assert first.ids == again.ids and first.n_rows == N_ROWS
    np.testing.assert_array_equal(first.head, again.head)
    np.testing.assert_array_equal(first.tail, again.tail)
    np.testing.assert_array_equal(first.scales, again.scales)
