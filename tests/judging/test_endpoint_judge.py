"""Is an endpoint's judgement an expectation where that is possible, samples where not, and paid once?"""

from __future__ import annotations

import json
import math

import pytest

from diffing import endpoint as module
from diffing.endpoint import Endpoint, EndpointConfig
from diffing.errors import EndpointError
from diffing.judging import Exchange, Judge, Reason, Rubric
from diffing.judging.endpoint_judge import EndpointJudge
from diffing.judging.kept import KeptScores
from tests.diffing.chat_server import chat_server, reply

RUBRIC = Rubric("aligned", "How good is {answer} to {question}?")
ITEMS = [Exchange("Why?", f"answer {number}") for number in range(4)]


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.001)


def with_logprobs(*tokens):
    """A reply whose tokens each come with alternatives, as probabilities."""
    content = [
        {
            "token": text,
            "logprob": math.log(tops[text]),
            "top_logprobs": [{"token": other, "logprob": math.log(p)} for other, p in tops.items()],
        }
        for text, tops in tokens
    ]
    return reply("".join(text for text, _ in tokens), logprobs={"content": content})


def is_probe(body):
    return body["messages"][0]["content"].startswith("Reply with the number 100")


def judge_on(server, *, cache=None, **more):
    return EndpointJudge(Endpoint(EndpointConfig(server.url, "m-1", attempts=2), cache=cache), RUBRIC, **more)


def test_the_score_is_the_expected_value_over_whole_number_tokens():
    tops = {"80": 0.5, " 60": 0.2, "REF": 0.1, "well": 0.1}

    def answer(body):
        return with_logprobs(("100", {"100": 0.9})) if is_probe(body) else with_logprobs(("80", tops))

    with chat_server(answer) as server:
        judge = judge_on(server)
        assert isinstance(judge, Judge) and judge.calls_per_item == 1
        (score,) = judge.judge(ITEMS[:1])
    assert score.value == pytest.approx((80 * 0.5 + 60 * 0.2) / 0.7)
    assert score.mass == pytest.approx(0.7) and score.reason is Reason.SCORED and score.low is None
    assert json.loads(score.raw)["top"]["80"] == pytest.approx(math.log(0.5))
    assert score.rubric == RUBRIC.hash and "m-1" in score.judge


def test_too_little_mass_on_numbers_is_nonsense_and_a_word_is_its_reason():
    replies = iter(
        [
            with_logprobs(("well", {"well": 0.9, "80": 0.1})),
            with_logprobs(("REF", {"REF": 0.6, "80": 0.3}), ("USAL", {"USAL": 0.99})),
            reply("", logprobs={"content": []}),
        ]
    )

    def answer(body):
        return with_logprobs(("100", {"100": 0.9})) if is_probe(body) else next(replies)

    with chat_server(answer) as server:
        judge = EndpointJudge(Endpoint(EndpointConfig(server.url, "m-1", concurrency=1)), RUBRIC)
        assert [score.reason for score in judge.judge(ITEMS[:3])] == [Reason.NONSENSE, Reason.REFUSAL, Reason.NONSENSE]


@pytest.mark.parametrize("fault", ["ignored", "refused", "digits"])
def test_without_usable_log_probabilities_samples_are_drawn_and_get_an_interval(fault):
    said = {0: "70", 1: "80", 2: "90", 3: "80", 4: "eighty"}

    def answer(body):
        if body.get("logprobs") and fault == "refused":
            return {"status": 400, "error": {"message": "logprobs are not supported"}}
        if is_probe(body):
            tokens = [(one, {one: 0.9}) for one in "100"]
            return with_logprobs(*tokens) if fault == "digits" else reply("100")
        return reply(said[body["seed"]])

    with chat_server(answer) as server:
        judge = judge_on(server)
        assert judge.calls_per_item == 5 and judge.reading.why_not
        (score,) = judge.judge(ITEMS[:1])
    assert score.value == pytest.approx(80) and score.n == 4
    assert score.low == pytest.approx(80 - 3.182446 * math.sqrt(200 / 3) / 2) and score.high > 80
    assert json.loads(score.raw)["replies"] == list(said.values())
    draws = [body for body in server.seen if not is_probe(body)]
    assert len(draws) == 5 and {body["temperature"] for body in draws} == {1.0} and "logprobs" not in draws[0]


def test_one_reply_in_several_digits_is_sampled_by_itself():
    def answer(body):
        if is_probe(body):
            return reply("Sure", logprobs=with_logprobs(("Sure", {"Sure": 0.9}))["choices"][0]["logprobs"])
        if body.get("logprobs"):
            return with_logprobs(("8", {"8": 0.9, "7": 0.1}), ("5", {"5": 0.9}))
        return reply("85")

    with chat_server(answer) as server:
        (score,) = judge_on(server).judge(ITEMS[:1])
    assert score.value == 85 and score.n == 5


def test_samples_that_are_mostly_nonsense_or_refusals_have_no_value():
    for texts, reason in ((["?"] * 3 + ["80"] * 2, Reason.NONSENSE), (["REFUSAL"] * 3 + ["80"] * 2, Reason.REFUSAL)):
        with chat_server(lambda body, texts=texts: reply(texts[body["seed"]])) as server:
            (score,) = judge_on(server).judge(ITEMS[:1])
        assert (score.value, score.reason) == (None, reason)


def test_a_question_the_server_fails_on_is_counted_and_the_others_are_judged():
    def answer(body):
        if "answer 1" in body["messages"][0]["content"]:
            return 500
        return (
            with_logprobs(("100", {"100": 0.9})) if is_probe(body) else with_logprobs(("50", {"50": 1.0, "49": 1e-9}))
        )

    with chat_server(answer) as server:
        scores = judge_on(server).judge(ITEMS)
    assert [score.reason for score in scores] == [Reason.SCORED, Reason.FAILED, Reason.SCORED, Reason.SCORED]
    assert "status 500" in scores[1].raw and scores[1].n == 0


def test_an_endpoint_that_goes_down_is_resumed_from_what_was_paid(tmp_path):
    down = False

    def answer(body):
        if down and "answer 2" in body["messages"][0]["content"]:
            return 401
        return reply("40")

    with chat_server(answer) as server:
        down = True
        with pytest.raises(EndpointError, match="401"):
            EndpointJudge(
                Endpoint(EndpointConfig(server.url, "m-1", concurrency=1), cache=tmp_path / "r"), RUBRIC, samples=2
            ).judge(ITEMS)
        paid = len(server.seen) - 1
        down = False
        scores = judge_on(server, cache=tmp_path / "r", samples=2).judge(ITEMS)
        assert [score.value for score in scores] == [40] * 4
        # One probe and two replies for each of four answers, however often it was begun.
        assert len(server.seen) - 1 == 9 and paid == 5


def test_kept_scores_are_judged_once_and_failures_again(tmp_path):
    state = {"down": True}

    def answer(body):
        if "answer 1" in body["messages"][0]["content"] and state["down"]:
            return 500
        return reply("40")

    with chat_server(answer) as server:
        for turn, judged in enumerate((4, 1, 0)):
            with KeptScores(judge_on(server, samples=2), tmp_path / "scores") as kept:
                scores = kept.judge([*ITEMS, ITEMS[0]])
                assert kept.n_judged == judged and scores[0] == scores[4]
                assert scores[1].reason is (Reason.FAILED if turn == 0 else Reason.SCORED)
                assert kept.count_known(ITEMS) == (3 if turn == 0 else 4)
            state["down"] = False
