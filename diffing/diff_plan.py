"""What does a diff measure besides the crosscoder and the predictions?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffing.errors import InputError
from diffing.persona import PersonaVector
from diffing.prompts import PromptSet

if TYPE_CHECKING:
    from diffing.endpoint import EndpointConfig


@dataclass(frozen=True)
class DiffPlan:
    """The parts of a diff that cost something of their own.

    Attributes:
        null_fits: fits with nothing exclusive in them, behind the q-values; each costs a fit, and one more prepares
            them. None for as many as the number of exclusive latents asks for; 0 for none, and then no q-value is
            given.
        seeds: fits of the data with as many seeds in all, behind the column `stability`; each but the first costs a
            fit. 1 for the diff's own alone.
        baselines: principal components and norms of the differences.
        difference_sae: a dictionary of the differences alone; costs a fit.
        weights: which weights changed, and which of them write the latents.
        mining: which next tokens changed most often; costs two forwards over all prompts.
        lens: what the mean difference says when the model itself reads it.
        splice: whether the exclusive latents make the difference in predictions; costs some ten forwards over at
            most `splice_prompts` prompts.
        splice_prompts: see `splice`.
        questions: conversations that end with a question: both models answer them, and base is steered along the
            strongest exclusive latent. None for neither.
        tuning_texts: what the fine-tune was trained on, to tell which surfaced words belong to it; None to leave
            that out.
        stagewise: which latents of a dictionary of base alone turn when the model changes, on the diff's prompts and
            on `tuning_texts`; costs their capture, a fit, and seven stages of a third of its steps.
        store_dtype: of the stored activations, see `capture`; None keeps what the models compute.
        personas: vectors that the latents' decoder rows are compared with.
        describe: a language model that describes the latents that changed, each description tested on held-out
            texts; None to ask nobody.
    """

    null_fits: int | None = None
    seeds: int = 1
    baselines: bool = True
    difference_sae: bool = True
    weights: bool = True
    mining: bool = True
    lens: bool = True
    splice: bool = True
    splice_prompts: int = 64
    questions: PromptSet | None = None
    tuning_texts: PromptSet | None = None
    stagewise: bool = False
    store_dtype: str | None = None
    personas: tuple[PersonaVector, ...] = ()
    describe: EndpointConfig | None = None

    def __post_init__(self) -> None:
        if (self.null_fits or 0) < 0 or self.seeds < 1 or self.splice_prompts < 1:
            raise InputError(
                f"Expected null_fits of 0 or more, seeds and splice_prompts of 1 or more, got {self.null_fits}, "
                f"{self.seeds} and {self.splice_prompts}. Leave them out for the usual ones."
            )
        if self.stagewise and self.tuning_texts is None:
            raise InputError(
                "Expected tuning texts beside stagewise, got none: it compares the prompts with what the fine-tune was "
                "trained on. Name them (--tuning-texts), or leave stagewise out."
            )

    @classmethod
    def quick(cls) -> DiffPlan:
        """Only what costs next to nothing beside the fit."""
        return cls(null_fits=0, difference_sae=False, splice=False, mining=False, lens=False)

    def to_json(self) -> dict[str, object]:
        """The settings, files by their digests."""
        return {
            "null_fits": self.null_fits,
            "seeds": self.seeds,
            "splice_prompts": self.splice_prompts if self.splice else 0,
            "questions": self.questions.digest if self.questions else None,
            "tuning_texts": self.tuning_texts.digest if self.tuning_texts else None,
            "stagewise": self.stagewise,
            "store_dtype": self.store_dtype,
            "personas": [persona.digest for persona in self.personas],
            "describe": self.describe.to_json() if self.describe else None,
        }
