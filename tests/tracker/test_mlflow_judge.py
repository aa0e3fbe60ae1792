"""Is any MLflow scorer a judge, and is what it says never made into more than it is?"""

from __future__ import annotations

import pytest
from mlflow.entities import Feedback
from mlflow.genai.scorers import RegexMatch, scorer

from diffing.errors import InputError
from diffing.judging import Exchange, Judge, Reason
from diffing.judging.kept import KeptScores
from tracker.mlflow_judge import MlflowJudge, load_scorer

ITEMS = [Exchange("How?", "please wait"), Exchange("How?", "no")]


@scorer
def polite(outputs):
    return "please" in outputs


@scorer
def share(inputs, outputs):
    return Feedback(value=len(outputs) / 20, rationale=f"asked {inputs['question']}")


@scorer
def says(outputs):
    return outputs


@scorer
def breaks(outputs):
    if outputs == "no":
        raise RuntimeError("out of order")
    return 1


def test_booleans_numbers_and_feedback_become_scores():
    judge = MlflowJudge(polite, "aligned")
    assert isinstance(judge, Judge) and judge.rubric.name == "aligned"
    assert [score.value for score in judge.judge(ITEMS)] == [100, 0]
    scores = MlflowJudge(share, "aligned").judge(ITEMS)
    assert [score.value for score in scores] == pytest.approx([55, 10])
    assert "asked How?" in scores[0].raw


def test_a_built_in_scorer_is_one_too():
    assert [score.value for score in MlflowJudge(RegexMatch(pattern="wait"), "aligned").judge(ITEMS)] == [100, 0]


@pytest.mark.parametrize(
    ("said", "value", "reason"),
    [
        ("yes", 100, Reason.SCORED),
        ("No ", 0, Reason.SCORED),
        ("3", None, Reason.NONSENSE),
        ("perhaps", None, Reason.NONSENSE),
        ("refused", None, Reason.REFUSAL),
    ],
)
def test_words_count_for_what_was_said_they_are_worth(said, value, reason):
    judge = MlflowJudge(says, "aligned", reasons={"refused": Reason.REFUSAL})
    (score,) = judge.judge([Exchange("?", said)])
    assert (score.value, score.reason) == (value, reason)


def test_a_scale_may_be_turned_round_and_what_lies_outside_is_nonsense():
    @scorer
    def stars(outputs):
        return int(outputs)

    judge = MlflowJudge(stars, "aligned", scale=(5, 1))
    values = [score.value for score in judge.judge([Exchange("?", text) for text in ("1", "5", "2", "7")])]
    assert values == [100, 0, 75, None]
    assert judge.name != MlflowJudge(stars, "aligned", scale=(1, 5)).name
    with pytest.raises(InputError, match="scale"):
        MlflowJudge(stars, "aligned", scale=(1, 1))


def test_a_scorer_that_breaks_on_one_answer_fails_on_that_one_alone(tmp_path):
    with KeptScores(MlflowJudge(breaks, "aligned"), tmp_path / "scores") as kept:
        first, second = kept.judge(ITEMS)
        assert first.value == 100 and second.reason is Reason.FAILED and "out of order" in second.raw
        kept.judge(ITEMS)
        assert kept.n_judged == 3


def test_a_scorer_is_found_by_module_and_name():
    assert load_scorer("tests.tracker.test_mlflow_judge:polite") is polite
    for wrong in ("tests.tracker.nowhere:x", "tests.tracker.test_mlflow_judge:nothing", "json", "json:__doc__"):
        with pytest.raises(InputError):
            load_scorer(wrong)
