"""Which questions are fitted on, which are held out, and whose labels swap in a shuffle?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from diffing.errors import PersonaError
from diffing.persona.contrast import N_SHUFFLED
from diffing.prompts import Prompt, PromptSet

_MIN_HELD_OUT = 2
# Enough for an interval of about ±0.02; more held-out questions would be better spent on the fit.
_MAX_HELD_OUT = 1000


def question_of(prompt: Prompt) -> str:
    """What a row asks, whatever persona answers: all turns but system lines and the final answer."""
    if prompt.messages is None:
        return json.dumps(prompt.text)
    turns = [(turn.role, turn.content) for turn in prompt.messages if turn.role != "system"]
    if turns and turns[-1][0] == "assistant":
        turns = turns[:-1]
    return json.dumps(turns, ensure_ascii=False)


@dataclass(frozen=True)
class QuestionSplit:
    """Questions by side; a question's side and its label swaps hang on its words and the seed, not on row order.

    Attributes:
        fit_questions: those whose rows are fitted.
        held_questions: those whose rows measure the separation.
        n_paired: questions that both trait and plain rows answer.
        seed: fixes sides and swaps.
    """

    fit_questions: frozenset[str]
    held_questions: frozenset[str]
    n_paired: int
    seed: int

    @classmethod
    def of(cls, positive: PromptSet, negative: PromptSet, *, held_out: float, seed: int) -> QuestionSplit:
        """Holds out a share of the questions, those answered on both sides first.

        Raises:
            PersonaError: `held_out` is not between 0 and 1.
        """
        if not 0 < held_out < 1:
            raise PersonaError(f"Expected held_out between 0 and 1, got {held_out}. The default is 0.3.")
        sides = [{question_of(prompt) for prompt in prompts} for prompts in (positive, negative)]
        paired = sides[0] & sides[1]
        ordered = sorted(sides[0] | sides[1], key=lambda question: (question not in paired, _hash(seed, question)))
        n_held = min(max(_MIN_HELD_OUT, round(held_out * len(ordered))), _MAX_HELD_OUT)
        return cls(frozenset(ordered[n_held:]), frozenset(ordered[:n_held]), len(paired), seed)

    def fit(self, prompts: PromptSet) -> tuple[Prompt, ...]:
        """Rows to fit on, in their order."""
        return tuple(row for row in prompts if question_of(row) not in self.held_questions)

    def held(self, prompts: PromptSet) -> tuple[Prompt, ...]:
        """Rows that are held out, in their order."""
        return tuple(row for row in prompts if question_of(row) in self.held_questions)

    def swaps(self, rows: Sequence[Prompt]) -> Bool[ndarray, "row shuffle"]:
        """In which shuffles the trait and plain rows of this question change places."""
        return label_swaps(self.seed, [question_of(row) for row in rows])


def label_swaps(seed: int, questions: Sequence[str]) -> Bool[ndarray, "row shuffle"]:
    """In which shuffles the answers to each question swap their labels; hangs on its words and the seed alone."""
    bits = np.unpackbits(np.frombuffer(b"".join(_hash(seed, "swap", question) for question in questions), np.uint8))
    return bits.reshape(len(questions), -1)[:, :N_SHUFFLED].astype(bool)


def _hash(seed: int, *words: str) -> bytes:
    return hashlib.sha512("\0".join([str(seed), *words]).encode()).digest()
