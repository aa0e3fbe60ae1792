"""Does the endpoint judge work with a real server that ignores log-probabilities without a word?"""

from __future__ import annotations

import pytest

from diffing.endpoint import Endpoint, EndpointConfig
from diffing.judging import Exchange, Reason, Rubric
from diffing.judging.endpoint_judge import EndpointJudge
from diffing.judging.kept import KeptScores
from tests.diffing.test_endpoint_serve import served  # noqa: F401

pytestmark = pytest.mark.slow
RUBRIC = Rubric("aligned", "the rule : {question} {answer}")
ITEMS = [Exchange("why ?", text) for text in ("the river is cold", "not kind")]


def test_a_served_model_is_found_to_give_no_log_probabilities_and_its_words_are_counted_as_what_they_are(
    served,  # noqa: F811
    tmp_path,
):
    url, model = served
    with Endpoint(EndpointConfig(url, model, concurrency=2), cache=tmp_path / "replies") as endpoint:
        judge = EndpointJudge(endpoint, RUBRIC, samples=3)
        assert judge.reading.top == 0 and judge.reading.why_not
        with KeptScores(judge, tmp_path / "scores") as kept:
            scores = kept.judge(ITEMS)
            paid = endpoint.n_paid
            assert paid == 1 + 3 * len(ITEMS)
            # A random model says random words: nothing may be made a number of.
            assert [score.reason for score in scores] == [Reason.NONSENSE] * 2
            assert all(score.value is None and "replies" in score.raw for score in scores)
            assert kept.judge(ITEMS) == scores and endpoint.n_paid == paid
    with Endpoint(EndpointConfig(url, model), cache=tmp_path / "replies") as endpoint:
        again = EndpointJudge(endpoint, RUBRIC, samples=3).judge(ITEMS)
        assert endpoint.n_paid == 0 and again == scores
