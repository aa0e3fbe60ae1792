"""What did an evaluation of misalignment find, and on what does it rest?"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffing.durable import write_atomic, write_json
from diffing.interval import Share
from diffing.judging import Score
from diffing.judging.known_error import CorrectedRate
from diffing.misalignment.planning import Cost
from diffing.misalignment.rate import Difference, QuestionRate, Rate
from diffing.misalignment.sequential import SequentialRate
from diffing.misalignment.verdict import Verdict
from diffing.provenance import Provenance

RESULT_NAME = "misalignment.json"
ANSWERS_NAME = "answers.jsonl"


@dataclass(frozen=True)
class JudgedAnswer:
    """One answer with everything that was said about it.

    Attributes:
        side: `base` or `tuned`.
        cue: name of the cue, `plain` for none.
        question: id of the question.
        group: its group.
        draw: number of the answer, from 0.
        wording: the user's words, without the cue.
        answer: the model's words.
        finished: whether it ended by itself.
        aligned: score of alignment.
        coherent: score of coherence.
        verdict: what both come to.
    """

    side: str
    cue: str
    question: str
    group: str
    draw: int
    wording: str
    answer: str
    finished: bool
    aligned: Score
    coherent: Score
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        scores = {"aligned": self.aligned.to_json(), "coherent": self.coherent.to_json()}
        return {**_shallow(self), **scores, "verdict": str(self.verdict)}


@dataclass(frozen=True)
class Condition:
    """One model under one cue.

    Attributes:
        side: `base` or `tuned`.
        cue: name of the cue.
        split: answers of each verdict.
        rate: misaligned among coherent answers, mean over questions.
        of_all: misaligned among all answers, mean over questions.
        these: pooled over exactly these questions.
        sequential: the interval that holds however often it was looked at; None without early stopping.
        corrected: with the judge's known error taken out; None without a gold set.
        questions: question by question.
        unscored: share of answers that a judge could not score.
    """

    side: str
    cue: str
    split: Mapping[Verdict, int]
    rate: Rate
    of_all: Rate
    these: Share
    sequential: SequentialRate | None
    corrected: CorrectedRate | None
    questions: tuple[QuestionRate, ...]
    unscored: Share

    @property
    def quoted(self) -> float:
        """The rate to quote beside `interval`."""
        return self.rate.value if self.sequential is None else self.sequential.value

    @property
    def interval(self) -> tuple[float, float]:
        """The ends to quote: those made for looking often, where it was looked at often."""
        if self.sequential is not None:
            return self.sequential.low, self.sequential.high
        return self.rate.low, self.rate.high


@dataclass(frozen=True)
class Comparison:
    """Two conditions, paired by question.

    Attributes:
        more: what is compared (`tuned`, or a cue's name).
        less: with what (`base`, or `plain`).
        within: the cue or side that both have.
        difference: of their rates; positive: `more` is more misaligned.
    """

    more: str
    less: str
    within: str
    difference: Difference


@dataclass(frozen=True)
class MisalignmentResult:
    """An evaluation: conditions, comparisons, and all that a number needs to be believed.

    Attributes:
        names: side to the model's name.
        conditions: plain first, then by cue; base before tuned.
        comparisons: tuned against base in each cue, each cue against plain on each side.
        stopped: why sampling ended before all planned answers were in; empty if it did not.
        samples: answers a question.
        cost: as stated before the start.
        caveats: what a reader must know; sentences.
        provenance: models, judges, rubrics, thresholds, questions, cues.
        answers: every answer.
    """

    names: Mapping[str, str]
    conditions: tuple[Condition, ...]
    comparisons: tuple[Comparison, ...]
    stopped: str
    samples: int
    cost: Cost
    caveats: tuple[str, ...]
    provenance: Provenance
    answers: tuple[JudgedAnswer, ...]

    def condition(self, side: str = "tuned", cue: str = "plain") -> Condition:
        """One of them; KeyError if there is none such."""
        for one in self.conditions:
            if (one.side, one.cue) == (side, cue):
                return one
        raise KeyError((side, cue))

    @property
    def worst(self) -> Condition:
        """The tuned model's condition with the highest rate: what a gate has to look at."""
        tuned = [one for one in self.conditions if one.side == "tuned"]
        return max(tuned, key=lambda one: -1.0 if math.isnan(one.quoted) else one.quoted)

    def to_json(self) -> dict[str, Any]:
        """JSON values without the answers; NaN becomes null."""
        value = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "answers"}
        return _plain({**value, "provenance": self.provenance.to_json(), "answers_file": ANSWERS_NAME})

    def save(self, folder: Path | str) -> Path:
        """Writes `misalignment.json`, and every answer with its scores to `answers.jsonl`; returns the first."""
        folder = Path(folder)
        rows = (json.dumps(_plain(answer.to_json()), ensure_ascii=False, sort_keys=True) for answer in self.answers)
        write_atomic(folder / ANSWERS_NAME, "".join(f"{row}\n" for row in rows))
        return write_json(folder / RESULT_NAME, self.to_json())


def _shallow(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = _shallow(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
