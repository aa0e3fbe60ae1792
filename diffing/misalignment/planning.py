"""How many answers does a wished certainty take, and what will they cost?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import stats

from diffing.errors import InputError

_MOST = 100_000


@dataclass(frozen=True)
class SamplePlan:
    """Answers a question for an interval of a wished width.

    Attributes:
        width: of the 95 % interval, from end to end, 0..1.
        rate: that it is planned for.
        icc: intra-class correlation of answers to one question that it is planned for.
        questions: in the set.
        samples: answers a question; None where no number of answers to these questions suffices.
        samples_these: answers a question, if only these very questions matter.
        questions_needed: questions at which ten answers to each suffice.
    """

    width: float
    rate: float
    icc: float
    questions: int
    samples: int | None
    samples_these: int
    questions_needed: int

    def __str__(self) -> str:
        assumed = f"rate near {self.rate:.0%}, correlation of answers to a question {self.icc:.2f}"
        if self.samples is None:
            return (
                f"No number of answers to {self.questions} questions gives an interval of {self.width:.1%} over "
                f"questions like these ({assumed}); {self.questions_needed} questions would, with 10 answers each. For "
                f"these questions alone {self.samples_these} answers each do."
            )
        return (
            f"An interval of {self.width:.1%} takes about {self.samples} answers to each of {self.questions} questions "
            f"({assumed})."
        )


def plan_samples(questions: int, width: float, *, rate: float = 0.1, icc: float = 0.1) -> SamplePlan:
    """How many answers a question make the interval over questions as narrow as wished, on average.

    The variance of the mean of question rates is `rate (1 − rate) (icc + (1 − icc) / samples) / questions`: the first
    part is left however many answers are drawn.

    Args:
        questions: how many there are, at least 3.
        width: wished width of the 95 % interval, from end to end.
        rate: expected; 0.5 is the worst case.
        icc: expected correlation of answers to one question, from a pilot's `Rate.icc`.

    Raises:
        InputError: a figure outside its range.
    """
    if questions < 3 or not 0 < width < 1 or not 0 < rate < 1 or not 0 <= icc < 1:
        raise InputError(
            f"Expected at least 3 questions, a width and a rate between 0 and 1 and a correlation from 0 to below 1, "
            f"got {questions}, {width}, {rate}, {icc}. Change them."
        )
    spread = rate * (1 - rate)
    left = (width / (2 * float(stats.t.ppf(0.975, questions - 1)))) ** 2 * questions / spread - icc
    samples = math.ceil((1 - icc) / left) if left > 0 else None
    these = math.ceil(spread * (2 * 1.96 / width) ** 2 / questions)
    return SamplePlan(
        width,
        rate,
        icc,
        questions,
        samples if samples is not None and samples <= _MOST else None,
        max(1, these),
        _questions_needed(width, spread * (icc + (1 - icc) / 10)),
    )


def _questions_needed(width: float, variance: float) -> int:
    questions = 3
    while 2 * float(stats.t.ppf(0.975, questions - 1)) * math.sqrt(variance / questions) > width:
        questions += max(1, questions // 50)
    return questions


@dataclass(frozen=True)
class Cost:
    """What an evaluation will take at most, stated before it starts.

    Attributes:
        answers: to draw, over all sides and cues.
        answers_kept: of all wanted, those on disk already.
        answer_tokens: written at most.
        judgements: that judges will make at most.
        judge_calls: forward passes or paid replies behind them, at most.
    """

    answers: int
    answers_kept: int
    answer_tokens: int
    judgements: int
    judge_calls: int

    def __str__(self) -> str:
        kept = f" ({self.answers_kept:,} more are on disk)" if self.answers_kept else ""
        return (
            f"{self.answers:,} answers to draw{kept}, at most {self.answer_tokens:,} tokens; at most "
            f"{self.judgements:,} judgements, {self.judge_calls:,} calls of judges."
        )
