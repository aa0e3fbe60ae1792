"""How is a trait elicited, and what will that cost?"""

from __future__ import annotations

from dataclasses import dataclass, field

from diffing.answers import AnswerSettings
from diffing.errors import InputError
from diffing.persona.elicit import SHOTS
from diffing.persona.keep import KeepRule
from diffing.persona.pooling import POOLINGS
from diffing.persona.sweep import N_JUDGED_SITES, STRENGTHS


@dataclass(frozen=True)
class ElicitSettings:
    """How a trait is elicited and fitted.

    Attributes:
        rollouts: answers to each extraction question under each system prompt.
        held_out_rollouts: the same for held-out questions.
        temperature: of all answers.
        max_new_tokens: most tokens of an answer.
        batch_size: answers written at once; nothing depends on it but for rounding.
        seed: of answers and nulls.
        shots: examples for models without a chat template.
        max_length: most tokens of a prompt.
        batch_tokens: most tokens of a reading pass.
        pooling: of the vector that is swept and chosen; the other poolings are fitted beside it. Vectors of the last
            prompt token may steer better, those of answers are what projections of answers are read on.
        sites: where to fit; empty for every layer of the residual stream.
        strengths: of the sweep, in gaps; empty for none, the site is then chosen by held-out separation.
        judged_sites: sites of the sweep at which the judge is asked.
        sweep_samples: steered answers a question at each judged point.
        rule: when pairs are kept.
    """

    rollouts: int = 3
    held_out_rollouts: int = 1
    temperature: float = 1.0
    max_new_tokens: int = 200
    batch_size: int = 16
    seed: int = 0
    shots: int = SHOTS
    max_length: int = 1024
    batch_tokens: int = 8192
    pooling: str = POOLINGS[0]
    sites: tuple[str, ...] = ()
    strengths: tuple[float, ...] = STRENGTHS
    judged_sites: int = N_JUDGED_SITES
    sweep_samples: int = 1
    rule: KeepRule = field(default_factory=KeepRule)

    def __post_init__(self) -> None:
        counts = ("rollouts", "held_out_rollouts", "judged_sites", "sweep_samples", "max_length", "batch_tokens")
        for name in counts:
            if getattr(self, name) < 1:
                raise InputError(f"Expected {name} of at least 1, got {getattr(self, name)}. Pass a larger number.")
        if self.pooling not in POOLINGS:
            raise InputError(f"Expected pooling {', '.join(POOLINGS)}; got {self.pooling!r}. Use one of these.")
        if not self.temperature > 0:
            raise InputError(f"Expected a temperature above 0, got {self.temperature}. Rollouts must differ.")

    def answers(self, samples: int) -> AnswerSettings:
        """How `samples` answers to a prompt are drawn."""
        return AnswerSettings(self.max_new_tokens, self.temperature, self.seed, self.batch_size, samples)


@dataclass(frozen=True)
class ElicitCost:
    """What an extraction will take, before it starts.

    Attributes:
        answers: answers to be written.
        known: answers that are on disk already.
        most_tokens: most tokens to be written.
        prompt_tokens: tokens of the prompts to be read for them.
        steered: answers to be written under steering, for the judge.
        judgements: times the judges are asked, at most.
        sweep_passes: points of the sweep, each a forward pass over two answers to every held-out question.
    """

    answers: int
    known: int
    most_tokens: int
    prompt_tokens: int
    steered: int
    judgements: int
    sweep_passes: int

    @property
    def sentence(self) -> str:
        """For the reader who may still say no."""
        kept = f" ({self.known:,} more are on disk)" if self.known else ""
        judged = f", {self.judgements:,} judgements at most" if self.judgements else ", no judgements"
        return (
            f"{self.answers + self.steered:,} answers to write{kept}: at most {self.most_tokens:,} tokens after "
            f"{self.prompt_tokens:,} prompt tokens{judged}, {self.sweep_passes} sweep passes."
        )
