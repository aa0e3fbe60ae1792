"""What does a model answer, steered and not, side by side?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffing.answers import AnswerSettings
from diffing.checkpoint import LoadedCheckpoint
from diffing.errors import InputError
from diffing.persona.budget import SolvedStrength
from diffing.persona.steering import PersonaSteering, steered_answers
from diffing.prompts import Prompt, PromptSet


@dataclass(frozen=True)
class SheetRow:
    """One prompt's answers.

    Attributes:
        id: the prompt's.
        prompt: what was asked last.
        answers: one an arm and sample, in the order of the arms; model text.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class SteeringSheet:
    """Answers side by side.

    Attributes:
        model: whose.
        arms: what was done; the first is the model as it is.
        vectors: trait, site and digest of each.
        operation: what was done to them.
        tokens: where.
        rows: the answers.
        settings: how they were drawn; every arm with the same noise.
        solved: the strength that spends a budget, where one was asked for.
        changed: for each arm but the first the share of answers that are other than the model's own.
    """

    model: str
    arms: tuple[str, ...]
    vectors: tuple[str, ...]
    operation: str
    tokens: str
    rows: tuple[SheetRow, ...]
    settings: AnswerSettings
    solved: SolvedStrength | None
    changed: tuple[float, ...]

    def to_json(self) -> Mapping[str, Any]:
        """JSON values."""
        return asdict(self)


def steering_sheet(
    loaded: LoadedCheckpoint,
    prompts: PromptSet,
    steerings: Sequence[PersonaSteering],
    settings: AnswerSettings | None = None,
    *,
    solved: SolvedStrength | None = None,
    derived_from: str | None = None,
    progress: bool = False,
) -> SteeringSheet:
    """Lets the model answer as it is, and once under each steering.

    Args:
        loaded: the model.
        prompts: conversations that end with a question.
        steerings: what is done; of the same vectors and operation.
        settings: how answers are drawn; one sample each.
        solved: kept with the answers.
        derived_from: fingerprint of the checkpoint that a full fine-tune comes from.
        progress: shows a bar on a terminal.

    Raises:
        InputError: no steering, or more than one sample.
        PersonaError: a vector does not fit the model.
    """
    settings = settings or AnswerSettings()
    if not steerings or settings.samples != 1:
        raise InputError(f"Expected a steering and one sample, got {len(steerings)} and {settings.samples}. Mend that.")
    columns = [
        [
            answer.text
            for answer in steered_answers(
                loaded, prompts, steering, settings, derived_from=derived_from, progress=progress
            )
        ]
        for steering in (None, *steerings)
    ]
    first = steerings[0]
    return SteeringSheet(
        model=loaded.name,
        arms=("as it is", *(f"{one.operation.replace('_', '-')} {one.strength:+.3g}" for one in steerings)),
        vectors=tuple(f"{vector.trait} {vector.site} {vector.digest[:12]}" for vector in first.vectors),
        operation=first.operation,
        tokens=first.tokens,
        rows=tuple(
            SheetRow(prompt.id, _asked(prompt), tuple(column[number] for column in columns))
            for number, prompt in enumerate(prompts)
        ),
        settings=settings,
        solved=solved,
        changed=tuple(
            sum(now != before for now, before in zip(column, columns[0], strict=True)) / max(1, len(prompts))
            for column in columns[1:]
        ),
    )


def _asked(prompt: Prompt) -> str:
    if prompt.messages:
        return prompt.messages[-1].content
    return prompt.text or ""
