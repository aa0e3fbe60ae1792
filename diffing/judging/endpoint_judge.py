"""What does a model behind an OpenAI-compatible endpoint think of an answer?

The best reading is the expected value over the number tokens of one reply's log-probabilities. It is possible only
where the server gives log-probabilities (some ignore the wish without a word) and where a number is one token. Both are
found out before the first exchange, for one question's price; where one fails, several replies are drawn and their mean
gets an interval. Replies are cached by the endpoint, so nothing is paid twice.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from scipy import stats

from diffing.chat import Message
from diffing.completion import AnswerToken, ChatRequest, Completion, Failed
from diffing.errors import EndpointError, InputError
from diffing.judging.judge import LARGEST, Exchange, Reason, Rubric, Score
from diffing.judging.reading import read_reply, whole_number

_TOP = (20, 5)
_REPLY_TOKENS = 8
_THREE_DIGITS = Message("user", "Reply with the number 100 and nothing else.")


@runtime_checkable
class Asked(Protocol):
    """Something that can be put one question or many: an `Endpoint`, or a stand-in."""

    @property
    def model(self) -> str:
        """Which model answers."""
        ...

    def ask(self, request: ChatRequest) -> Completion:
        """The answer to one question."""
        ...

    def ask_all(self, requests: Sequence[ChatRequest], *, progress: bool = False) -> list[Completion | Failed]:
        """Answers in the order of the questions."""
        ...


@dataclass(frozen=True)
class Reading:
    """How this server's replies can be read.

    Attributes:
        top: alternatives it gives for a token; 0 where replies must be sampled.
        why_not: why log-probabilities cannot be used; empty where they can.
    """

    top: int
    why_not: str = ""


@dataclass(frozen=True, eq=False)
class EndpointJudge:
    """A model behind an endpoint as a judge.

    Attributes:
        endpoint: whom to ask; its cache makes a judgement free the second time.
        by: the rubric.
        samples: replies drawn an exchange where log-probabilities cannot be used.
        temperature: of those replies.
        least_mass: probability that must fall on numbers; below it the judge is held to talk nonsense.
        reply_tokens: most tokens of a reply; more for models that think aloud first, which are then sampled.
    """

    endpoint: Asked
    by: Rubric
    samples: int = 5
    temperature: float = 1.0
    least_mass: float = 0.25
    reply_tokens: int = _REPLY_TOKENS

    def __post_init__(self) -> None:
        if self.samples < 2 or not self.temperature > 0 or not 0 < self.least_mass < 1 or self.reply_tokens < 1:
            raise InputError(
                "Expected at least 2 samples at a temperature above 0, a least mass between 0 and 1 and at least one "
                f"token a reply, got {self.samples}, {self.temperature}, {self.least_mass}, {self.reply_tokens}. "
                "Change them."
            )

    @property
    def rubric(self) -> Rubric:
        """What it judges by."""
        return self.by

    @property
    def name(self) -> str:
        """Model and the settings that a score depends on; not where it runs."""
        settings = f"samples={self.samples} temperature={self.temperature:g} mass={self.least_mass:g}"
        return f"endpoint:{self.endpoint.model} {settings} reply={self.reply_tokens}"

    @property
    def calls_per_item(self) -> int:
        """Replies an exchange; asks the server one short question the first time."""
        return 1 if self.reading.top else self.samples

    @cached_property
    def reading(self) -> Reading:
        """How this server's replies can be read; costs one short question, once.

        Raises:
            EndpointError: the server refuses every question.
        """
        for top in _TOP:
            try:
                completion = self.endpoint.ask(ChatRequest((_THREE_DIGITS,), max_tokens=4, top_logprobs=top))
            except EndpointError as error:
                if "status 400" not in str(error):
                    raise
                continue
            if completion.logprobs_fault:
                return Reading(0, completion.logprobs_fault)
            if not _is_whole(completion.tokens):
                return Reading(0, "numbers are several tokens for this model")
            return Reading(top)
        return Reading(0, "the server refuses requests for log-probabilities")

    def judge(self, items: Sequence[Exchange], *, progress: bool = False) -> list[Score]:
        """One score an exchange: expected value over number tokens, or mean of samples with an interval.

        A reply that starts on a number in several tokens is sampled as well, by itself. `raw` holds the replies, and
        the probabilities where there are any.

        Raises:
            EndpointError: the server refuses every question; single failures become `FAILED` scores.
        """
        scores: dict[int, Score] = {}
        if self.reading.top:
            requests = [self._request(item, top_logprobs=self.reading.top) for item in items]
            for number, reply in enumerate(self.endpoint.ask_all(requests, progress=progress)):
                score = self._from_reply(reply)
                if score is not None:
                    scores[number] = score
        left = [number for number in range(len(items)) if number not in scores]
        draws = [
            self._request(items[number], temperature=self.temperature, draw=draw)
            for number in left
            for draw in range(self.samples)
        ]
        replies = self.endpoint.ask_all(draws, progress=progress) if draws else []
        for place, number in enumerate(left):
            scores[number] = self._from_draws(replies[place * self.samples : (place + 1) * self.samples])
        return [scores[number] for number in range(len(items))]

    def _request(
        self, item: Exchange, *, temperature: float = 0.0, top_logprobs: int = 0, draw: int = 0
    ) -> ChatRequest:
        words = "".join(f", or with {word} where that is asked for" for word in sorted(self.by.words))
        ask = f"\n\nReply with one whole number from 0 to 100 and nothing else{words}."
        return ChatRequest(
            (Message("user", self.by.render(item) + ask),),
            max_tokens=self.reply_tokens,
            temperature=temperature,
            top_logprobs=top_logprobs,
            draw=draw,
        )

    def _from_reply(self, reply: Completion | Failed) -> Score | None:
        """The score of one reply with log-probabilities; None where they cannot be used."""
        if isinstance(reply, Failed):
            return self._made(None, Reason.FAILED, reply.reason, n=0)
        _, reason = read_reply(reply.text, self.by.words)
        first, after = _first_said(reply.tokens)
        if first is None:
            # Empty, or log-probabilities that this one reply lacks.
            return self._made(None, Reason.NONSENSE, reply.text) if not reply.text.strip() else None
        if _goes_on(first, after):
            return None
        chances = _number_chances(first)
        mass = sum(chances.values())
        raw = json.dumps({"reply": reply.text, "top": dict(first.top)}, ensure_ascii=False)
        if reason in self.by.words.values():
            return self._made(None, reason, raw, mass=mass)
        if mass < self.least_mass:
            return self._made(None, Reason.NONSENSE, raw, mass=mass)
        return self._made(sum(number * p for number, p in chances.items()) / mass, Reason.SCORED, raw, mass=mass)

    def _from_draws(self, replies: Sequence[Completion | Failed]) -> Score:
        """Mean and interval of several replies; a reason or nonsense where most of them are that."""
        answered = [reply.text for reply in replies if isinstance(reply, Completion)]
        raw = json.dumps({"replies": answered, "failed": len(replies) - len(answered)}, ensure_ascii=False)
        if len(answered) * 2 <= len(replies):
            return self._made(None, Reason.FAILED, raw, n=len(answered))
        read = [read_reply(text, self.by.words) for text in answered]
        values = [value for value, _ in read if value is not None]
        counts = Counter(reason for _, reason in read)
        if len(values) * 2 <= len(read):
            others = {reason: count for reason, count in counts.items() if reason is not Reason.SCORED}
            reason = max(others, key=lambda one: (others[one], one is Reason.NONSENSE))
            return self._made(None, reason, raw, n=len(read))
        low, high = _t_interval(values)
        return self._made(float(np.mean(values)), Reason.SCORED, raw, low=low, high=high, n=len(values))

    def _made(
        self,
        value: float | None,
        reason: Reason,
        raw: str,
        *,
        low: float | None = None,
        high: float | None = None,
        n: int = 1,
        mass: float | None = None,
    ) -> Score:
        return Score(value, reason, self.name, self._rubric_hash, raw, low, high, n, mass)

    @cached_property
    def _rubric_hash(self) -> str:
        return self.by.hash


def _first_said(tokens: Sequence[AnswerToken]) -> tuple[AnswerToken | None, AnswerToken | None]:
    """The first token that is not blank, and the one after it."""
    said = [token for token in tokens if token.text.strip()]
    return (said[0] if said else None), (said[1] if len(said) > 1 else None)


def _goes_on(first: AnswerToken, after: AnswerToken | None) -> bool:
    """Whether the number that a reply begins with is written in several tokens."""
    return first.text.strip().isdigit() and after is not None and after.text[:1].isdigit()


def _is_whole(tokens: Sequence[AnswerToken]) -> bool:
    """Whether three digits were one token; a reply without digits proves nothing, so later ones are looked at again."""
    first, after = _first_said(tokens)
    return first is None or not _goes_on(first, after)


def _number_chances(token: AnswerToken) -> Mapping[int, float]:
    """Probability of each integer 0..100 among the alternatives, spellings of one number together."""
    chances: dict[int, float] = {}
    for text, logprob in token.top.items():
        number = whole_number(text)
        if number is not None:
            chances[number] = chances.get(number, 0.0) + math.exp(min(0.0, logprob))
    return chances


def _t_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % interval of the mean, held in 0..100; equal replies give one of no width."""
    n = len(values)
    if n < 2:
        return None, None
    half = float(stats.t.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    mean = float(np.mean(values))
    return max(0.0, mean - half), min(LARGEST, mean + half)
