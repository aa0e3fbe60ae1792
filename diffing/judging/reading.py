"""What did a judge reply: a number from 0 to 100, a word that stands for a reason, or nonsense?"""

from __future__ import annotations

import re
from collections.abc import Mapping

from diffing.judging.judge import LARGEST, Reason

_AROUND = " \t\r\n.\"'`*_:()[]"
_LEAD = re.compile(r"^(?:(?:final\s+)?(?:score|rating|answer)\s*(?:is|:|=)\s*)", re.IGNORECASE)
_TAIL = re.compile(r"\s*(?:/\s*100|out of 100|%)$", re.IGNORECASE)
_NUMBER = re.compile(r"^[0-9]{1,3}(?:\.[0-9]+)?$")
_THOUGHT = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)


def read_reply(text: str, words: Mapping[str, Reason]) -> tuple[float | None, Reason]:
    """The score that a reply states, or why it states none.

    Strict on purpose: a number has to stand alone (`85`, `85.`, `Score: 85/100`). A sentence with numbers in it is
    nonsense, because picking one of them would be a guess.

    Args:
        text: the judge's reply.
        words: replies that stand for a reason, in upper case.

    Returns:
        Value 0..100 with `SCORED`, or None with a reason.
    """
    said = _THOUGHT.sub("", text).strip(_AROUND)
    reason = words.get(said.upper())
    if reason is not None:
        return None, reason
    number = _TAIL.sub("", _LEAD.sub("", said)).strip(_AROUND)
    if _NUMBER.match(number) and 0 <= float(number) <= LARGEST:
        return float(number), Reason.SCORED
    return None, Reason.NONSENSE


def whole_number(token: str) -> int | None:
    """The integer from 0 to 100 that one token of a reply is, or None."""
    text = token.strip(_AROUND + "▁Ġ")
    if text.isascii() and text.isdigit() and len(text) <= 3 and int(text) <= LARGEST and str(int(text)) == text:
        return int(text)
    return None
