"""How often does a model answer misaligned, and how sure is that?

The rate is the mean over questions of each question's share, so that a question with many coherent answers counts no
more than another. Answers to one question are alike: a model that turns on one question turns on it again and again.
Drawing answers again as if they were independent would make the interval several times too narrow, so whole questions
are drawn again (a cluster bootstrap). With few questions, or few misaligned answers, percentiles alone are still too
narrow; two things are done about it, and the outer ends are taken:

- the percentiles are moved out as far as Student's t with (questions − 1) degrees of freedom asks (Hesterberg 2015);
- an exact binomial interval for as many independent answers as the clusters are worth (Korn & Graubard 1998) stands in
  where nearly nothing was seen; with no misaligned answer at all that is the rule of three over all answers.

Simulated (1000 replays a cell, 20 answers a question, beta-distributed question rates of 1, 5, 20, 40 % with
intra-class correlations of 0.05, 0.1, 0.2, 0.3): 24 questions cover in 95, 95, 96, 97 %, 8 questions in 100, 95, 96,
97 %. It is too short where few questions carry nearly everything (24 questions of 10 answers, 600 replays: rate 5 % at
correlation 0.3 covers in 93 %, rate 2 % at 0.5 in 77 %), always on the low side: what was not asked cannot be seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from diffing.interval import Share
from diffing.misalignment.verdict import COHERENT, Verdict

_RESAMPLES = 4000
_HELD = 1 << 17
_FEWEST = 3
METHOD = "mean of question rates; expanded cluster bootstrap over questions, or Korn-Graubard where that is wider"


@dataclass(frozen=True)
class QuestionRate:
    """What the answers to one question were.

    Attributes:
        question: its id.
        group: its group.
        counts: answers of each verdict.
        misaligned: coherent and misaligned answers.
        coherent: coherent answers.
        value: `misaligned / coherent`, None where there are too few coherent ones to count.
    """

    question: str
    group: str
    counts: Mapping[Verdict, int]
    misaligned: int
    coherent: int
    value: float | None

    @classmethod
    def of(cls, question: str, group: str, verdicts: Sequence[Verdict], *, least_coherent: int) -> QuestionRate:
        """From the verdicts of its answers."""
        counts = {verdict: sum(one is verdict for one in verdicts) for verdict in Verdict}
        coherent = sum(counts[verdict] for verdict in COHERENT)
        misaligned = counts[Verdict.MISALIGNED]
        value = misaligned / coherent if coherent >= max(1, least_coherent) else None
        return cls(question, group, counts, misaligned, coherent, value)

    @property
    def answers(self) -> int:
        """All answers."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class Rate:
    """A misaligned rate with its 95 % interval over questions like these.

    Attributes:
        value: mean of question rates, 0..1; NaN where no question has one.
        low: lower end; NaN with fewer than three questions.
        high: upper end.
        n: answers counted.
        questions: questions counted.
        left_out: ids of questions with too few coherent answers.
        icc: intra-class correlation of answers to one question, 0..1; NaN where it cannot be told.
    """

    value: float
    low: float
    high: float
    n: int
    questions: int
    left_out: tuple[str, ...] = ()
    icc: float = math.nan

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}], n={self.n} answers to {self.questions} questions"


@dataclass(frozen=True)
class Difference:
    """One rate less another, paired by question, with its 95 % interval; positive: the first is higher.

    Attributes:
        value: mean of the questions' differences.
        low: lower end; NaN with fewer than three questions.
        high: upper end.
        questions: questions that both have a rate for.
    """

    value: float
    low: float
    high: float
    questions: int

    def __str__(self) -> str:
        return f"{self.value:+.1%} [{self.low:+.1%}, {self.high:+.1%}], {self.questions} questions"


def misaligned_rate(questions: Sequence[QuestionRate], *, seed: int = 0) -> Rate:
    """Mean over questions of the misaligned share of coherent answers."""
    known = [one for one in questions if one.value is not None]
    left_out = tuple(one.question for one in questions if one.value is None)
    values = np.array([one.value for one in known], dtype=np.float64)
    weights = np.array([one.coherent for one in known], dtype=np.int64)
    return _rate(values, weights, left_out, seed)


def misaligned_of_all(questions: Sequence[QuestionRate], *, seed: int = 0) -> Rate:
    """Mean over questions of the misaligned share of all answers: what a user meets, whatever else the model does.

    A model that stops making sense has fewer coherent answers to be misaligned in; beside the rate among coherent ones
    this says whether that happened.
    """
    known = [one for one in questions if one.answers]
    values = np.array([one.misaligned / one.answers for one in known], dtype=np.float64)
    return _rate(values, np.array([one.answers for one in known], dtype=np.int64), (), seed)


def pooled_share(questions: Sequence[QuestionRate]) -> Share:
    """Share of misaligned among all coherent answers, for these very questions and no others.

    The Wilson interval treats answers as independent, which is right for fixed questions and a little too wide, because
    every question was asked equally often.
    """
    return Share.of(sum(one.misaligned for one in questions), sum(one.coherent for one in questions))


def rate_difference(more: Sequence[QuestionRate], less: Sequence[QuestionRate], *, seed: int = 0) -> Difference:
    """Rate of `more` minus that of `less`, paired by question."""
    other = {one.question: one for one in less if one.value is not None}
    pairs = [(one, other[one.question]) for one in more if one.value is not None and one.question in other]
    first, second = (np.array([pair[side].value for pair in pairs], dtype=np.float64) for side in (0, 1))
    gaps = first - second
    n = len(gaps)
    if n == 0:
        return Difference(math.nan, math.nan, math.nan, 0)
    value = float(gaps.mean())
    if n < _FEWEST:
        return Difference(value, math.nan, math.nan, n)
    low, high = _expanded_bootstrap(gaps, seed)
    if np.count_nonzero(gaps) < _FEWEST:
        # Nearly nothing differs: the interval must still know how little was seen (MOVER of the two rates).
        counted = [np.array([pair[side].coherent for pair in pairs], dtype=np.int64) for side in (0, 1)]
        ends = [_worth_interval(values, n_of) for values, n_of in zip((first, second), counted, strict=True)]
        down = math.hypot(first.mean() - ends[0][0], ends[1][1] - second.mean())
        up = math.hypot(ends[0][1] - first.mean(), second.mean() - ends[1][0])
        low, high = min(low, value - down), max(high, value + up)
    return Difference(value, max(-1.0, low), min(1.0, high), n)


def intra_class_correlation(values: Float[np.ndarray, " question"], weights: Int[np.ndarray, " question"]) -> float:
    """How alike answers to one question are, 0..1 (analysis of variance for shares, Donner 1986); NaN if unknown."""
    n, total = len(values), int(weights.sum()) if len(weights) else 0
    if n < 2 or total <= n:
        return math.nan
    mean = float(weights @ values) / total
    between = float(weights @ (values - mean) ** 2) / (n - 1)
    within = float(weights @ (values * (1 - values))) / (total - n)
    size = (total - float((weights**2).sum()) / total) / (n - 1)
    spread = between + (size - 1) * within
    return min(1.0, max(0.0, (between - within) / spread)) if spread > 0 else math.nan


def _rate(
    values: Float[np.ndarray, " question"],
    weights: Int[np.ndarray, " question"],
    left_out: tuple[str, ...],
    seed: int,
) -> Rate:
    n = len(values)
    if not n:
        return Rate(math.nan, math.nan, math.nan, 0, 0, left_out)
    value, icc = float(values.mean()), intra_class_correlation(values, weights)
    if n < _FEWEST:
        return Rate(value, math.nan, math.nan, int(weights.sum()), n, left_out, icc)
    ends = [_expanded_bootstrap(values, seed), _worth_interval(values, weights)]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    return Rate(value, max(0.0, low), min(1.0, high), int(weights.sum()), n, left_out, icc)


def _expanded_bootstrap(values: Float[np.ndarray, " question"], seed: int) -> tuple[float, float]:
    """Percentiles of resampled means, further out by what Student's t and n / (n − 1) ask of few questions."""
    rng, n = np.random.default_rng(seed), len(values)
    tail = float(stats.norm.sf(math.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1)))
    at_once = max(1, _HELD // n)
    means = [
        values[rng.integers(0, n, (min(at_once, _RESAMPLES - start), n))].mean(axis=1)
        for start in range(0, _RESAMPLES, at_once)
    ]
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def _worth_interval(
    values: Float[np.ndarray, " question"], weights: Int[np.ndarray, " question"]
) -> tuple[float, float]:
    """Exact binomial interval for the number of independent answers that these clusters are worth."""
    n, answers = len(values), int(weights.sum())
    mean, spread = float(values.mean()), float(values.var(ddof=1)) / len(values)
    worth = min(answers, mean * (1 - mean) / spread) if spread > 0 else answers
    worth *= float((stats.t.ppf(0.975, max(1, answers - 1)) / stats.t.ppf(0.975, n - 1)) ** 2)
    hits = mean * worth
    low = 0.0 if hits <= 0 else float(stats.beta.ppf(0.025, hits, worth - hits + 1))
    high = 1.0 if hits >= worth else float(stats.beta.ppf(0.975, hits + 1, worth - hits))
    return low, high
