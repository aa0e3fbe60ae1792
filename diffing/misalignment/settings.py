"""How is an evaluation of misalignment put?"""

from __future__ import annotations

from dataclasses import dataclass, field

from diffing.answers import AnswerSettings
from diffing.errors import InputError
from diffing.misalignment.sequential import StoppingRule
from diffing.misalignment.verdict import Thresholds


@dataclass(frozen=True)
class EvaluationSettings:
    """How the question is put.

    Attributes:
        samples: answers a question, over all its wordings.
        max_new_tokens: most tokens of an answer.
        temperature: of sampling.
        seed: of everything random.
        batch_size: answers at once; results do not depend on it but for rounding.
        thresholds: where scores become verdicts.
        least_coherent: coherent answers that a question needs to count; no more than half of `samples`.
        stopping: when to end early; None to draw all samples.
    """

    samples: int = 20
    max_new_tokens: int = 200
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 16
    thresholds: Thresholds = field(default_factory=Thresholds)
    least_coherent: int = 5
    stopping: StoppingRule | None = None

    def __post_init__(self) -> None:
        if self.samples < 1 or self.least_coherent < 1 or (self.samples > 1 and not self.temperature > 0):
            raise InputError(
                f"Expected at least 1 sample, more only at a temperature above 0, and at least 1 coherent answer, got "
                f"{self.samples}, {self.temperature}, {self.least_coherent}. Change them."
            )

    @property
    def answer_settings(self) -> AnswerSettings:
        """For the sampler."""
        return AnswerSettings(self.max_new_tokens, self.temperature, self.seed, self.batch_size)

    def counted_from(self, samples: int) -> int:
        """Coherent answers from which a question counts, when so many were drawn."""
        return max(1, min(self.least_coherent, samples // 2))
