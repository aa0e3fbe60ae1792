"""Is what is said about a judge true of a judge whose error is known?"""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from diffing.errors import InputError, PathMissingError, PromptError
from diffing.judging import Exchange, Reason, Rubric, Score
from diffing.judging.gold import GoldRow, check_judge, load_gold, read_error
from diffing.judging.known_error import JudgeError, correct_rate

RUBRIC = Rubric("aligned", "{answer}")


class Parrot:
    """Says of each answer what the answer says."""

    name, rubric = "parrot", RUBRIC

    def judge(self, items, *, progress=False):
        made = []
        for item in items:
            reason = Reason(item.answer) if item.answer in list(Reason) else Reason.SCORED
            value = float(item.answer) if reason is Reason.SCORED else None
            made.append(Score(value, reason, self.name, self.rubric.hash, item.answer))
        return made


def gold(pairs):
    """Rows of (what is true, what the parrot will say)."""
    rows = []
    for true, said in pairs:
        known = true in ("refusal", "off_format")
        rows.append(
            GoldRow(Exchange("?", str(said)), None if known else true, Reason(true) if known else Reason.SCORED)
        )
    return rows


def test_a_perfect_judge_agrees_in_everything():
    found = check_judge(Parrot(), gold([(value, value) for value in (0, 10, 50, 90, 100, 20, 70)] + [("refusal",) * 2]))
    assert found.kappa.value == found.spearman.value == pytest.approx(1)
    assert found.brier.value == found.ece.value == 0
    assert found.error.sensitivity.value == found.error.specificity.value == 1 and found.error.sensitivity.n == 3
    assert found.confusion["refusal"]["refusal"] == 1 and found.n == 8


def test_figures_are_those_of_the_libraries():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 101, 200)
    said = np.clip(true + rng.normal(0, 25, 200).round(), 0, 100)
    found = check_judge(Parrot(), gold(list(zip(true.tolist(), said.tolist(), strict=True))))
    assert found.kappa.value == pytest.approx(cohen_kappa_score(true < 30, said < 30))
    assert found.spearman.value == pytest.approx(stats.spearmanr(true, said).statistic)
    assert found.brier.value == pytest.approx(np.mean((true - said) ** 2) / 1e4)
    assert found.kappa.low < found.kappa.value < found.kappa.high and found.kappa.n == 200
    caught = int(((true < 30) & (said < 30)).sum())
    assert (found.error.sensitivity.count, found.error.sensitivity.n) == (caught, int((true < 30).sum()))
    assert sum(one.n for one in found.bins) == 200 and all(one.low <= one.true <= one.high for one in found.bins)


def test_overconfidence_shows_as_calibration_error_though_ranks_agree():
    true = [40, 45, 50, 55, 60] * 20
    said = [0, 10, 50, 90, 100] * 20
    found = check_judge(Parrot(), gold(list(zip(true, said, strict=True))))
    assert found.spearman.value == pytest.approx(1)
    assert found.ece.value == pytest.approx(np.mean(np.abs(np.array(true) - np.array(said))) / 100)


def test_nonsense_is_counted_and_neither_right_nor_wrong():
    found = check_judge(Parrot(), gold([(0, "nonsense")] * 4 + [(0, 0)] * 6 + [(100, 100)] * 10))
    assert found.reasons["nonsense"] == 4 and found.error.sensitivity.n == 6
    assert found.confusion["below 30"]["nonsense"] == 4 and found.kappa.value < 1


def test_a_check_survives_its_json():
    found = check_judge(Parrot(), gold([(0, 0)] * 3 + [(0, 90)] + [(100, 100)] * 9 + [(100, 0)]))
    error = read_error(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert error == found.error and error.youden == pytest.approx(0.75 + 0.9 - 1)
    with pytest.raises(InputError, match="judge check"):
        read_error({"error": {}})


def test_gold_files_are_read_and_faulty_rows_named(tmp_path):
    path = tmp_path / "gold.jsonl"
    rows = [{"question": "a", "answer": "b", "score": 5}, {"question": "a", "answer": "b", "reason": "refusal"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [row.value for row in load_gold(path)] == [5, None]
    for row, said in (
        ({"question": "a", "answer": "b"}, "'score'"),
        ({"question": "a", "score": 3}, "'answer'"),
        ({"question": "a", "answer": "b", "score": 101}, "0 to 100"),
        ({"question": "a", "answer": "b", "score": "high"}, "0 to 100"),
        ({"question": "a", "answer": "b", "reason": "nonsense"}, "'reason'"),
    ):
        path.write_text(json.dumps(row))
        with pytest.raises(PromptError, match=said):
            load_gold(path)
    with pytest.raises(PathMissingError):
        load_gold(tmp_path / "none.jsonl")


def test_a_rate_is_corrected_as_the_formula_says_and_stays_in_its_interval():
    error = JudgeError.of(caught=80, positives=100, cleared=190, negatives=200)
    found = correct_rate(0.2, 0.15, 0.26, error)
    assert found.value == pytest.approx((0.2 - 0.05) / 0.75)
    assert found.low < found.value < found.high and found.n_gold == 300
    narrow = correct_rate(0.2, 0.15, 0.26, JudgeError.of(caught=8000, positives=10000, cleared=19000, negatives=20000))
    assert narrow.high - narrow.low < found.high - found.low
    nothing = correct_rate(0.0, 0.0, 0.03, error)
    assert nothing.value == nothing.low == 0 and 0.01 < nothing.high < 0.06
    sure = JudgeError.of(caught=10**6, positives=10**6, cleared=10**6, negatives=10**6)
    plain = correct_rate(0.2, 0.15, 0.26, sure)
    assert (plain.low, plain.value, plain.high) == pytest.approx((0.15, 0.2, 0.26), abs=0.012)


def test_a_judge_that_guesses_or_was_not_tried_corrects_nothing():
    with pytest.raises(InputError, match="better than a guess"):
        correct_rate(0.2, 0.1, 0.3, JudgeError.of(caught=5, positives=10, cleared=5, negatives=10))
    with pytest.raises(InputError, match="misaligned and other"):
        correct_rate(0.2, 0.1, 0.3, JudgeError.of(caught=0, positives=0, cleared=5, negatives=10))
