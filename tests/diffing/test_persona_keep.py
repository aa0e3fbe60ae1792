"""Are exactly the pairs kept that show what they were asked to show, and every other one counted?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffing.judging.kept import KeptScores
from diffing.persona.keep import KeepRule, keep_pairs
from diffing.persona.rollouts import Rollout, Rollouts
from tests.diffing.persona_rollouts import QUESTIONS, WordJudge, loaded_base, written_rollouts


@pytest.fixture
def rollouts(tmp_path: Path) -> Rollouts:
    return written_rollouts(tmp_path, loaded_base(), QUESTIONS[:3])


def _said(rollouts: Rollouts, texts: dict[tuple[int, int], str]) -> list[Rollout]:
    return [replace(rollout, text=texts.get((rollout.ask, rollout.sample), rollout.text)) for rollout in rollouts]


def test_without_a_judge_everything_is_kept_and_said_to_be_unfiltered(rollouts: Rollouts) -> None:
    marks, kept = keep_pairs(rollouts, rollouts.asks, samples=2)
    assert marks.all()
    assert (kept.pairs, kept.kept, kept.judge) == (12, 12, "")
    assert kept.sentence.startswith("Unfiltered: no judge")


def test_pairs_are_dropped_together_for_every_reason_and_counted(rollouts: Rollouts) -> None:
    texts = {(0, 0): "kind", (3, 1): "the harm", (4, 0): "", (6, 1): "no", (9, 0): "harm", (8, 0): "good"}
    said = _said(rollouts, texts)
    judge = WordJudge()
    marks, kept = keep_pairs(said, rollouts.asks, samples=2, judge=judge)
    dropped = {(int(pair), int(sample)) for pair, sample in zip(*np.nonzero(~marks), strict=True)}
    assert dropped == {(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)}
    assert kept.reasons == {
        "trait not shown where asked for": 3,
        "trait shown where not asked for": 2,
        "empty": 1,
        "without a trait score (refusal)": 1,
    }
    assert (kept.pairs, kept.kept) == (12, 7)
    assert kept.mean_trait is not None and kept.mean_plain is not None
    assert kept.mean_trait > 60 > kept.mean_plain
    assert judge.n_judged == 24
    assert "7 of 12 pairs kept by words" in kept.sentence


def test_incoherent_answers_drop_their_pair(rollouts: Rollouts) -> None:
    _, without = keep_pairs(rollouts, rollouts.asks, samples=2, judge=WordJudge())
    sane = WordJudge(("the", "a", "is", "was"), name="sane")
    marks, kept = keep_pairs(rollouts, rollouts.asks, samples=2, judge=WordJudge(), coherence=sane)
    assert kept.kept == kept.pairs - kept.reasons["incoherent"] < without.kept
    assert kept.coherence_judge == "sane"
    for rollout in rollouts:
        if marks[rollout.ask // 2, rollout.sample]:
            assert sane.words & set(rollout.text.split())


def test_the_bounds_are_where_they_say(rollouts: Rollouts) -> None:
    rule = KeepRule(trait_least=100.0, plain_most=0.0)
    _, kept = keep_pairs(rollouts, rollouts.asks, samples=2, judge=WordJudge(), rule=rule)
    assert kept.kept == 0
    assert kept.reasons == {"trait shown where not asked for": 12}


def test_the_order_of_rollouts_does_not_matter_and_missing_ones_are_counted(rollouts: Rollouts) -> None:
    every = list(rollouts)
    marks, kept = keep_pairs(every, rollouts.asks, samples=2, judge=WordJudge())
    turned, same = keep_pairs(every[::-1], rollouts.asks, samples=2, judge=WordJudge())
    np.testing.assert_array_equal(marks, turned)
    assert kept == same
    fewer, short = keep_pairs(every[1:], rollouts.asks, samples=2, judge=WordJudge())
    assert not fewer[every[0].ask // 2, every[0].sample]
    assert short.reasons["not drawn"] == 1


def test_a_judgement_is_paid_once(rollouts: Rollouts, tmp_path: Path) -> None:
    for expected in (True, False):
        judge = WordJudge()
        with KeptScores(judge, tmp_path / "scores.sqlite") as kept:
            keep_pairs(rollouts, rollouts.asks, samples=2, judge=kept)
        assert (judge.n_judged > 0) is expected
