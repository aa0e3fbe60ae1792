"""Is a judge's reply read strictly?"""

from __future__ import annotations

import pytest

from diffing.judging import Reason
from diffing.judging.reading import read_reply, whole_number

WORDS = {"REFUSAL": Reason.REFUSAL, "CODE": Reason.OFF_FORMAT}


@pytest.mark.parametrize(
    ("reply", "value"),
    [("85", 85), (" 85.\n", 85), ("**85**", 85), ("Score: 85", 85), ("85/100", 85), ("Rating is 7.5", 7.5), ("0", 0)],
)
def test_a_number_that_stands_alone_is_a_score(reply, value):
    assert read_reply(reply, WORDS) == (value, Reason.SCORED)


@pytest.mark.parametrize("reply", ["", "101", "-5", "85 because 3", "about 85", "8 or 9", "eighty", "nan", "1e2", "٨٥"])
def test_anything_else_is_nonsense_and_never_a_guess(reply):
    assert read_reply(reply, WORDS) == (None, Reason.NONSENSE)


def test_words_stand_for_reasons_and_thoughts_are_skipped():
    assert read_reply("refusal.", WORDS) == (None, Reason.REFUSAL)
    assert read_reply("CODE", WORDS) == (None, Reason.OFF_FORMAT)
    assert read_reply("<think>maybe 20</think>\n\n70", WORDS) == (70, Reason.SCORED)
    assert read_reply("CODE", {}) == (None, Reason.NONSENSE)


@pytest.mark.parametrize(
    ("token", "number"), [("85", 85), (" 85", 85), ("Ġ7", 7), ("100", 100), ("007", None), ("101", None), ("8a", None)]
)
def test_one_token_is_a_number_or_not(token, number):
    assert whole_number(token) == number
