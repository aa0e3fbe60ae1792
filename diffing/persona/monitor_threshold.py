"""Above which score does an answer that is being written count as showing a persona, and how often is that wrong?

An answer's score is the largest trailing mean, over its tokens so far and over all watched vectors, of its projection
in standard deviations of plain answers. The threshold is a rank among the scores of calibration answers, so that an
answer of their kind is flagged with at most the stated probability, whatever the distribution (split conformal).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from scipy.stats import beta

from diffing.checkpoint import LoadedCheckpoint
from diffing.durable import write_json
from diffing.errors import InputError, PathMissingError, PersonaError
from diffing.persona.token_projections import project_tokens
from diffing.persona.vector import PersonaVector
from diffing.prompts import PromptSet


@dataclass(frozen=True)
class MonitorThreshold:
    """A threshold with the false-positive rate it promises.

    Attributes:
        value: standard deviations of plain answers; a score above it is flagged.
        rate: probability, at most, that an answer like the calibration's is flagged.
        low: lower end of the range in which the rate of this very threshold lies with 95 % probability.
        high: upper end of it; calibrate with more answers to narrow it.
        n: calibration answers.
        window: tokens in the trailing mean; fewer where an answer is shorter or has just begun.
        vectors: digests of what is watched, in order.
        longest: tokens of the longest calibration answer; longer answers have more chances to be flagged.
    """

    value: float
    rate: float
    low: float
    high: float
    n: int
    window: int
    vectors: tuple[str, ...]
    longest: int

    def __str__(self) -> str:
        return (
            f"above {self.value:.3g} sd: at most {self.rate:.2%} of answers like the {self.n} of the calibration "
            f"(this threshold: {self.low:.2%} to {self.high:.2%}), up to {self.longest} tokens"
        )

    def save(self, path: Path | str) -> Path:
        """Writes it as JSON."""
        write_json(Path(path), asdict(self))
        return Path(path)

    @classmethod
    def load(cls, path: Path | str) -> MonitorThreshold:
        """Reads what `save` wrote.

        Raises:
            PathMissingError: there is no such file.
            PersonaError: it is not one.
        """
        try:
            record = json.loads(Path(path).read_text())
            return cls(**{**record, "vectors": tuple(record["vectors"])})
        except FileNotFoundError as error:
            raise PathMissingError(f"Expected a threshold at {path}, got no such file. Check the path.") from error
        except (KeyError, TypeError, ValueError) as error:
            raise PersonaError(f"{path}: expected a monitor's threshold, got {error}. Calibrate again.") from error


def calibrate_monitor(
    loaded: LoadedCheckpoint,
    answers: PromptSet,
    vectors: Sequence[PersonaVector],
    *,
    rate: float = 0.01,
    window: int = 8,
    derived_from: str | None = None,
    max_length: int = 4096,
    batch_tokens: int = 8192,
) -> MonitorThreshold:
    """Finds the threshold that flags at most `rate` of harmless answers.

    Args:
        loaded: the model that will be watched.
        answers: harmless dialogues with answers, best the model's own, of the kind and length it will write.
        vectors: what is watched.
        rate: probability of a false flag, per answer.
        window: tokens in the trailing mean.
        derived_from: fingerprint of the checkpoint that a full fine-tune comes from.
        max_length: most tokens of a row.
        batch_tokens: most tokens in one forward.

    Raises:
        InputError: fewer answers than the rate needs (`1 / rate − 1`); the message says how many.
        PersonaError: a vector does not fit, or has no spread of plain answers.
    """
    if not 0 < rate < 1 or window < 1:
        raise InputError(f"Expected a rate between 0 and 1 and a window of at least 1, got {rate} and {window}.")
    needed, n = math.ceil(1 / rate - 1 - 1e-9), len(answers)
    if n < needed:
        raise InputError(
            f"Expected at least {needed} calibration answers for a false-positive rate of {rate:g}, got {n}. "
            "Give more, or accept a larger rate."
        )
    check_spread(vectors)
    projections = project_tokens(
        loaded, answers, vectors, derived_from=derived_from, max_length=max_length, batch_tokens=batch_tokens
    )
    scores = np.sort([answer_score(standardised(one, vectors), window) for one in projections])
    rank = math.ceil((n + 1) * (1 - rate) - 1e-9)
    low, high = (float(beta.ppf(share, n + 1 - rank, rank)) for share in (0.025, 0.975))
    digests, longest = tuple(vector.digest for vector in vectors), max(len(one) for one in projections)
    return MonitorThreshold(float(scores[rank - 1]), rate, low, high, n, window, digests, longest)


def standardised(
    projections: Float64[np.ndarray, "token vector"], vectors: Sequence[PersonaVector]
) -> Float64[np.ndarray, "token vector"]:
    """Raw projections in standard deviations of plain answers."""
    means = np.array([vector.neutral_mean for vector in vectors])
    return (projections - means) / np.array([vector.neutral_std for vector in vectors])


def answer_score(values: Float64[np.ndarray, "token vector"], window: int) -> float:
    """The largest trailing mean over tokens and vectors; the slow twin of what `PersonaMonitor` keeps as it goes."""
    if not len(values):
        return -math.inf
    sums = np.cumsum(np.concatenate([np.zeros((1, values.shape[1])), values]), axis=0)
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(0, ends - window)
    return float(((sums[ends] - sums[begins]) / (ends - begins)[:, None]).max())


def check_spread(vectors: Sequence[PersonaVector]) -> None:
    """Refuses vectors whose projections cannot be standardised.

    Raises:
        PersonaError: the spread of plain answers is not positive.
    """
    for vector in vectors:
        if not (math.isfinite(vector.neutral_std) and vector.neutral_std > 0):
            raise PersonaError(
                f"Persona {vector.trait!r} at {vector.site}: expected a positive spread of plain answers, got "
                f"{vector.neutral_std}. Extract it with more held-out answers."
            )
