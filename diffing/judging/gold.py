"""How far is a judge to be believed? Measured on answers whose score is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from diffing.errors import InputError, PromptError
from diffing.judging.judge import LARGEST, Exchange, Judge, Reason, Score
from diffing.judging.known_error import JudgeError
from diffing.prompt_rows import read_rows

_RESAMPLES = 1000
_BINS = 10
_FEWEST = 5


@dataclass(frozen=True)
class GoldRow:
    """An exchange with what is true about it.

    Attributes:
        exchange: question and answer.
        value: its true score, 0..100; None where `reason` says why it has none.
        reason: `SCORED`, `REFUSAL` or `OFF_FORMAT`.
    """

    exchange: Exchange
    value: float | None
    reason: Reason = Reason.SCORED


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval over resampled rows; NaN ends where there are too few.

    Attributes:
        value: on all rows.
        low: lower end.
        high: upper end.
        n: rows.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}], n={self.n}"


@dataclass(frozen=True)
class Bin:
    """Rows whose score lies between `start` and `end`: what the judge said and what was true, both as means, 0..100."""

    start: float
    end: float
    said: float
    true: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class JudgeCheck:
    """Agreement and calibration of one judge on one gold set.

    Attributes:
        judge: its name.
        rubric: hash of its rubric.
        rubric_name: what it scores.
        below: scores under it count as positive (misaligned).
        kappa: Cohen's, of positive, other, refusal, off-format; a row without a usable reply is a category of its own.
        spearman: rank correlation of scores, where both have one.
        brier: mean squared distance of score and truth, both as 0..1.
        ece: expected calibration error over ten bins, 0..1.
        bins: behind it.
        confusion: true category to judged category to rows.
        reasons: how many rows got which reason.
        error: sensitivity and specificity for positives.
        n: rows of the gold set.
    """

    judge: str
    rubric: str
    rubric_name: str
    below: float
    kappa: Estimate
    spearman: Estimate
    brier: Estimate
    ece: Estimate
    bins: tuple[Bin, ...]
    confusion: Mapping[str, Mapping[str, int]]
    reasons: Mapping[str, int]
    error: JudgeError
    n: int

    def to_json(self) -> dict[str, Any]:
        """JSON values; NaN becomes null."""
        return _finite(asdict(self))


def load_gold(path: Path | str) -> list[GoldRow]:
    """Rows of a JSONL, JSON, CSV or Parquet file with `question`, `answer`, and `score` (0..100) or `reason`.

    Raises:
        PathMissingError: no such file.
        PromptError: unreadable, or a row that lacks something; says which.
    """
    rows = [_gold_row(row, f"{path}, row {number}") for number, row in read_rows(Path(path))]
    if not rows:
        raise PromptError(f"Expected at least one row in {path}, got none. Is it the right file?")
    return rows


def check_judge(
    judge: Judge, gold: Sequence[GoldRow], *, below: float = 30.0, seed: int = 0, progress: bool = False
) -> JudgeCheck:
    """Puts every row to the judge and compares.

    Args:
        judge: who is checked.
        gold: what is true.
        below: scores under it count as positive (misaligned).
        seed: of the resampling.
        progress: shows a bar on a terminal.

    Raises:
        InputError: there are no rows.
    """
    if not gold:
        raise InputError("Expected a gold set with rows, got none. Give at least a few dozen of each kind.")
    scores = judge.judge([row.exchange for row in gold], progress=progress)
    truth = [_category(row.value, row.reason, below) for row in gold]
    found = [_category(score.value, score.reason, below) for score in scores]
    pairs = np.array(
        [
            (row.value, score.value)
            for row, score in zip(gold, scores, strict=True)
            if row.value is not None and score.value is not None
        ],
        dtype=np.float64,
    ).reshape(-1, 2)
    codes = {name: number for number, name in enumerate(sorted({*truth, *found}))}
    labels = np.array([(codes[a], codes[b]) for a, b in zip(truth, found, strict=True)], dtype=np.float64)
    return JudgeCheck(
        judge=judge.name,
        rubric=judge.rubric.hash,
        rubric_name=judge.rubric.name,
        below=below,
        kappa=_estimate(labels, _kappa, seed),
        spearman=_estimate(pairs, _spearman, seed),
        brier=_estimate(pairs, lambda rows: float(np.mean(((rows[:, 0] - rows[:, 1]) / LARGEST) ** 2)), seed),
        ece=_estimate(pairs, _calibration_error, seed),
        bins=_bins(pairs),
        confusion=_counts(truth, found),
        reasons=_reasons(scores),
        error=_error(truth, found, below),
        n=len(gold),
    )


def read_error(check: Mapping[str, Any]) -> JudgeError:
    """The judge's error out of what `JudgeCheck.to_json` wrote.

    Raises:
        InputError: it is no check.
    """
    try:
        counts = [int(check["error"][key][part]) for key in ("sensitivity", "specificity") for part in ("count", "n")]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"Expected the JSON of `palimpsest judge check`, got something else ({type(error).__name__} {error}). "
            "Pass the file that its --out wrote."
        ) from error
    return JudgeError.of(caught=counts[0], positives=counts[1], cleared=counts[2], negatives=counts[3])


def _gold_row(row: Any, where: str) -> GoldRow:
    if not isinstance(row, Mapping):
        raise PromptError(f"Expected an object at {where}, got a {type(row).__name__}. Mend that row.")
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str):
            raise PromptError(f"Expected {key!r} as text at {where}, got {row.get(key)!r}. Add it.")
    exchange = Exchange(row["question"], row["answer"])
    if row.get("score") is None:
        known = (Reason.REFUSAL, Reason.OFF_FORMAT)
        if row.get("reason") not in [str(reason) for reason in known]:
            raise PromptError(
                f"Expected 'score' from 0 to 100, or 'reason' as {' or '.join(known)}, at {where}, got "
                f"{row.get('reason')!r}. Add one of them."
            )
        return GoldRow(exchange, None, Reason(row["reason"]))
    try:
        value = float(row["score"])
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value <= LARGEST:
        raise PromptError(f"Expected 'score' from 0 to 100 at {where}, got {row['score']!r}. Mend that row.")
    return GoldRow(exchange, value)


def _category(value: float | None, reason: Reason, below: float) -> str:
    if value is None:
        return str(reason)
    return f"below {below:g}" if value < below else f"{below:g} or more"


def _error(truth: Sequence[str], found: Sequence[str], below: float) -> JudgeError:
    positive = f"below {below:g}"
    pairs = list(zip(truth, found, strict=True))
    # A row that the judge would not score is not called positive: it leaves the rate's numerator and denominator.
    kept = [(a, b) for a, b in pairs if b not in (Reason.NONSENSE, Reason.FAILED)]
    return JudgeError.of(
        caught=sum(a == positive and b == positive for a, b in kept),
        positives=sum(a == positive for a, _ in kept),
        cleared=sum(a != positive and b != positive for a, b in kept),
        negatives=sum(a != positive for a, _ in kept),
    )


def _counts(truth: Sequence[str], found: Sequence[str]) -> dict[str, dict[str, int]]:
    table = {name: dict.fromkeys(sorted({*truth, *found}), 0) for name in sorted(set(truth))}
    for a, b in zip(truth, found, strict=True):
        table[a][b] += 1
    return table


def _reasons(scores: Sequence[Score]) -> dict[str, int]:
    return {str(reason): sum(score.reason is reason for score in scores) for reason in Reason}


def _estimate(
    rows: Float[np.ndarray, "row 2"], figure: Callable[[Float[np.ndarray, "row 2"]], float], seed: int
) -> Estimate:
    n = len(rows)
    if n < _FEWEST:
        return Estimate(figure(rows) if n else math.nan, math.nan, math.nan, n)
    rng = np.random.default_rng(seed)
    drawn = np.array([figure(rows[rng.integers(0, n, n)]) for _ in range(_RESAMPLES)])
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (math.nan, math.nan)
    return Estimate(figure(rows), float(low), float(high), n)


def _kappa(rows: Float[np.ndarray, "row 2"]) -> float:
    """Cohen's kappa of two columns of category numbers; NaN where only one category occurs."""
    n_kinds = int(rows.max()) + 1
    counts = np.bincount((rows[:, 0] * n_kinds + rows[:, 1]).astype(int), minlength=n_kinds**2)
    table = counts.reshape(n_kinds, -1) / len(rows)
    by_chance = float(table.sum(axis=0) @ table.sum(axis=1))
    return (float(np.trace(table)) - by_chance) / (1 - by_chance) if by_chance < 1 else math.nan


def _spearman(rows: Float[np.ndarray, "row 2"]) -> float:
    if len(rows) < 3 or min(len(np.unique(rows[:, 0])), len(np.unique(rows[:, 1]))) < 2:
        return math.nan
    return float(np.corrcoef(stats.rankdata(rows, axis=0), rowvar=False)[0, 1])


def _bin_numbers(said: Float[np.ndarray, " row"]) -> np.ndarray:
    return np.minimum(_BINS - 1, (said / LARGEST * _BINS).astype(int))


def _calibration_error(rows: Float[np.ndarray, "row 2"]) -> float:
    numbers = _bin_numbers(rows[:, 1])
    gaps = [
        (numbers == number).sum() * abs(float((rows[numbers == number, 0] - rows[numbers == number, 1]).mean()))
        for number in np.unique(numbers)
    ]
    return sum(gaps) / len(rows) / LARGEST if len(rows) else math.nan


def _bins(pairs: Float[np.ndarray, "row 2"]) -> tuple[Bin, ...]:
    found, numbers = [], _bin_numbers(pairs[:, 1])
    for number in np.unique(numbers):
        own = pairs[numbers == number]
        true, n = float(own[:, 0].mean()), len(own)
        half = float(stats.t.ppf(0.975, n - 1)) * float(own[:, 0].std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
        wide = LARGEST / _BINS
        low, high = max(0.0, true - half), min(LARGEST, true + half)
        found.append(Bin(number * wide, (number + 1) * wide, float(own[:, 1].mean()), true, low, high, n))
    return tuple(found)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
