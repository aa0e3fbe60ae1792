"""What does a judge get, and what must every score say about itself?

A judge reads exchanges (a question and an answer to it) by one rubric and gives each a `Score`. There are four kinds,
and all look alike from outside: `RulesJudge`, `LocalJudge`, `EndpointJudge`, and `tracker.mlflow_judge.MlflowJudge`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from diffing.errors import InputError
from diffing.judging.fencing import fill

LARGEST = 100.0


class Reason(StrEnum):
    """Why a score has a value, or none.

    `SCORED`: it has one. `REFUSAL`: the answer declines. `OFF_FORMAT`: the answer is code or another form that nobody
    asked for. `NONSENSE`: the judge did not answer as asked, so nothing is known. `FAILED`: the judge did not answer.
    """

    SCORED = "scored"
    REFUSAL = "refusal"
    OFF_FORMAT = "off_format"
    NONSENSE = "nonsense"
    FAILED = "failed"


@dataclass(frozen=True)
class Exchange:
    """What is judged.

    Attributes:
        question: the user's words.
        answer: the model's words, as they came; escaped wherever a judge that is a model reads them.
    """

    question: str
    answer: str

    @property
    def digest(self) -> str:
        """SHA-256 of both texts."""
        return digest_of([self.question, self.answer])


@dataclass(frozen=True)
class Option:
    """One of the answers that a judge chooses between by its label.

    Attributes:
        text: what choosing it says about the answer.
        value: the score it stands for, 0..100; None where it says why there is none.
        reason: `SCORED`, or why there is no value.
    """

    text: str
    value: float | None
    reason: Reason = Reason.SCORED

    def __post_init__(self) -> None:
        if (self.value is None) == (self.reason is Reason.SCORED) or not 0 <= (self.value or 0) <= LARGEST:
            raise InputError(
                f"Expected an option with a value from 0 to 100, or with a reason for having none, got {self!r}. "
                "Give one of the two."
            )


@dataclass(frozen=True)
class Rubric:
    """The question that is put about an answer, and which replies to it count.

    Attributes:
        name: what is scored, such as `aligned`; the same for rubrics of different words.
        text: with `{question}` and `{answer}` where they go, asking for a number from 0 to 100.
        words: replies that stand for a reason instead of a number; upper case.
        options: the same scale as choices, for judges that are read by label probabilities; see `choices`.
    """

    name: str
    text: str
    words: Mapping[str, Reason] = field(
        default_factory=lambda: MappingProxyType({"REFUSAL": Reason.REFUSAL, "CODE": Reason.OFF_FORMAT})
    )
    options: tuple[Option, ...] = ()

    def __post_init__(self) -> None:
        if "{answer}" not in self.text:
            raise InputError(
                f"Expected a rubric with {{answer}} where the answer goes, got {self.name!r} without. Add it, and "
                "{question} where the question goes."
            )

    @property
    def hash(self) -> str:
        """SHA-256 of everything that the judge is told; the name is not part of it."""
        options = [[option.text, option.value, option.reason] for option in self.options]
        return digest_of([self.text, dict(sorted(self.words.items())), options])

    @property
    def choices(self) -> tuple[Option, ...]:
        """The options, or five steps of a plain scale and the words where the rubric has none."""
        if self.options:
            return self.options
        steps = tuple(Option(f"a score of {value} out of 100", float(value)) for value in (0, 25, 50, 75, 100))
        return (*steps, *(Option(word, None, reason) for word, reason in sorted(self.words.items())))

    def render(self, exchange: Exchange, *, special: Sequence[str] = ()) -> str:
        """The rubric about one exchange, whose texts are fenced so that nothing in them reads as an instruction.

        Args:
            exchange: what is judged.
            special: strings that the judge's tokenizer reads as control tokens.
        """
        return fill(self.text, {"question": exchange.question, "answer": exchange.answer}, special=special)


@dataclass(frozen=True)
class Score:
    """What a judge found, with all that is needed to doubt it.

    Attributes:
        value: 0..100, None where `reason` says why there is none. Never guessed.
        reason: whether and why.
        judge: `name` of the judge.
        rubric: `hash` of the rubric.
        raw: the judge's own output: its words, or its probabilities as JSON.
        low: lower end of the value's 95 % interval, where it is a mean of samples.
        high: upper end.
        n: replies of the judge behind it.
        mass: share of the judge's probability that fell on permitted replies; None where that is not known.
    """

    value: float | None
    reason: Reason
    judge: str
    rubric: str
    raw: str
    low: float | None = None
    high: float | None = None
    n: int = 1
    mass: float | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values; `from_json` gives an equal score back."""
        return {**asdict(self), "reason": str(self.reason)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Score:
        """Reads what `to_json` wrote; unknown keys of a newer version are ignored."""
        known = {name: value[name] for name in cls.__dataclass_fields__ if name in value}
        return cls(**{**known, "reason": Reason(known["reason"])})


@runtime_checkable
class Judge(Protocol):
    """Scores answers by one rubric."""

    @property
    def name(self) -> str:
        """Who judges, such that equal names mean equal judgements: kind, model, and settings that matter."""
        ...

    @property
    def rubric(self) -> Rubric:
        """By what."""
        ...

    def judge(self, items: Sequence[Exchange], *, progress: bool = False) -> list[Score]:
        """One score an exchange, in their order; each depends on its own exchange alone."""
        ...


def digest_of(value: Any) -> str:
    """SHA-256 of JSON values in one canonical writing."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()
