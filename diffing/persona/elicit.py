"""Which prompts bring a trait out of a model, and which bring out its absence?

A chat model is given the trait's system prompts. A base model, whose tokenizer has no chat template, reads the same
system prompt as the head of a dialogue in which an assistant of that kind has already answered a few questions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from diffing.chat import Message, Prompt
from diffing.errors import PersonaError
from diffing.persona.contrast import PLAIN, TRAIT
from diffing.persona.traits import Trait
from diffing.prompts import PromptSet

SHOTS = 4
_SIDES = {TRAIT: "trait", PLAIN: "plain"}


@dataclass(frozen=True)
class Ask:
    """One prompt that asks for the trait or for its absence.

    Attributes:
        side: `TRAIT` or `PLAIN`.
        instruction: number of the pair of system prompts.
        question: what is asked.
        prompt: what the model reads.
    """

    side: int
    instruction: int
    question: str
    prompt: Prompt


def is_chat(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this model is asked in its own chat form, or by examples."""
    return bool(getattr(tokenizer, "chat_template", None))


def asks_of(trait: Trait, questions: Sequence[str], *, chat: bool, shots: int = SHOTS) -> tuple[Ask, ...]:
    """Every question under every pair of system prompts: trait and plain side by side, `asks[2 * pair + side]`.

    Args:
        trait: whose instructions, and for base models whose contrasts as examples.
        questions: what to ask; repeated ones are asked once.
        chat: whether the model has a chat template.
        shots: examples before the question where it has none; fewer where the trait has fewer.

    Raises:
        PersonaError: the trait has no instructions, or there is nothing to ask.
    """
    if not trait.instructions or not questions:
        missing = "instructions" if not trait.instructions else "questions"
        raise PersonaError(
            f"Trait {trait.name!r} ({trait.source}): expected {missing} to elicit it with, got none. Add them to the "
            "file, or give answers with --positive and --negative."
        )
    return tuple(
        _ask(trait, side, number, question, shots=0 if chat else shots)
        for number in range(len(trait.instructions))
        for question in dict.fromkeys(questions)
        for side in (TRAIT, PLAIN)
    )


def neutral_prompts(questions: Sequence[str]) -> PromptSet:
    """The questions alone: what the model says by itself, without being told how to be."""
    return PromptSet(tuple(_prompt("neutral", (Message("user", text),)) for text in dict.fromkeys(questions)))


def prompts_of(asks: Sequence[Ask]) -> PromptSet:
    """The prompts of the asks, in their order."""
    return PromptSet(tuple(ask.prompt for ask in asks))


def _ask(trait: Trait, side: int, number: int, question: str, *, shots: int) -> Ask:
    pair = trait.instructions[number]
    messages = [Message("system", pair.positive if side == TRAIT else pair.negative)]
    for shot in [contrast for contrast in trait.contrasts if contrast.question != question][:shots]:
        answer = shot.trait_answer if side == TRAIT else shot.plain_answer
        messages += [Message("user", shot.question), Message("assistant", answer)]
    messages.append(Message("user", question))
    return Ask(side, number, question, _prompt(f"{_SIDES[side]}-{number}", tuple(messages)))


def _prompt(front: str, messages: tuple[Message, ...]) -> Prompt:
    # Named by content: the noise of an answer hangs on the name, and must not change with the order of the questions.
    content = json.dumps([[message.role, message.content] for message in messages], ensure_ascii=False)
    return Prompt(f"{front}-{hashlib.sha256(content.encode()).hexdigest()[:12]}", messages)
