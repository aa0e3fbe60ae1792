"""Would the model be likelier to say this if it had been told to show the trait?

Each answer is scored without any instruction, with each of the trait's system prompts, and with those that ask for
something else. The trait's evidence is the log of how likely its instructions make the answer, over how likely all the
rest do. Nothing is generated and no direction is needed: it asks the model what it knows of the trait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64
from scipy.special import logsumexp

from diffing.answers import score_answers
from diffing.chat import Message, Prompt
from diffing.checkpoint import LoadedCheckpoint
from diffing.errors import PersonaError
from diffing.persona.answered_rows import AnsweredRows
from diffing.persona.traits import Trait
from diffing.prompts import PromptSet

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Instructions:
    """System prompts that ask for one trait, and those that ask for anything else.

    Attributes:
        trait: its name.
        wanted: system prompts that ask for the trait.
        others: name to system prompts that ask for something else: its absence, other personas.
    """

    trait: str
    wanted: tuple[str, ...]
    others: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, trait: Trait, against: Sequence[Trait] = (), *, most: int = 5) -> Instructions:
        """The contrastive system prompts of a trait, its own opposite and those of other traits.

        Args:
            trait: what is looked for.
            against: other traits, told apart from it.
            most: instructions of each that are used; each costs one more reading of the data.

        Raises:
            PersonaError: the trait has no instructions.
        """
        if not trait.instructions:
            raise PersonaError(f"Trait {trait.name!r}: expected instructions, got none. Add them to {trait.source}.")
        others = {f"no {trait.name}": tuple(dict.fromkeys(one.negative for one in trait.instructions[:most]))}
        for other in against:
            others[other.name] = tuple(dict.fromkeys(one.positive for one in other.instructions[:most]))
        return cls(trait.name, tuple(dict.fromkeys(one.positive for one in trait.instructions[:most])), others)

    @property
    def n_prompts(self) -> int:
        """How many system prompts the data is read under."""
        return len(self.wanted) + sum(map(len, self.others.values()))


def instructed_log_odds(
    loaded: LoadedCheckpoint,
    rows: AnsweredRows,
    plain: Float64[np.ndarray, " row"],
    instructions: Instructions,
    *,
    max_length: int = 1024,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> Float64[np.ndarray, " row"]:
    """log p(answer | asked for the trait) - log of the sum over all other ways to ask, nats, for every row.

    Within one way to ask (the trait, its absence, another persona) probabilities are averaged over its system prompts;
    asking nothing is one more way. Positive: the trait alone explains the answer better than everything else together.

    Args:
        loaded: the base model.
        rows: prompts and answers.
        plain: log-probability of each answer without instruction, nats.
        instructions: what to ask for.
        max_length: most tokens of a prompt with its instruction.
        batch_tokens: tokens a forward pass.
        progress: called with system prompts done and in all.

    Raises:
        PersonaError: a prompt grows too long.
    """
    done = 0
    ways: list[np.ndarray] = []
    for prompts in (instructions.wanted, *instructions.others.values()):
        scored = []
        for text in prompts:
            scored.append(_log_likelihood(loaded, rows, text, max_length, batch_tokens))
            done += 1
            if progress is not None:
                progress(done, instructions.n_prompts)
        ways.append(np.asarray(logsumexp(scored, axis=0)) - np.log(len(scored)))
    return ways[0] - np.asarray(logsumexp([plain, *ways[1:]], axis=0))


def log_likelihood(loaded: LoadedCheckpoint, rows: AnsweredRows, *, batch_tokens: int = 8192) -> np.ndarray:
    """Log-probability of each answer behind its own prompt, nats, `[row]`."""
    scored = score_answers(loaded, rows.prompts, rows.answers, batch_tokens=batch_tokens)
    return np.array([part.sum() for part in scored])


def _log_likelihood(
    loaded: LoadedCheckpoint, rows: AnsweredRows, instruction: str, max_length: int, batch_tokens: int
) -> np.ndarray:
    told = PromptSet(tuple(_told(prompt, instruction) for prompt in rows.prompts.prompts))
    tokens = told.tokenize(loaded.tokenizer, max_length=max_length, add_generation_prompt=True)
    if tokens.n_truncated:
        raise PersonaError(
            f"Expected prompts of at most {max_length} tokens with the instruction, got {tokens.n_truncated} longer "
            f"(first: {tokens.truncated[0]}). Raise max_length (--max-length)."
        )
    scored = score_answers(loaded, tokens, rows.answers, batch_tokens=batch_tokens)
    return np.array([part.sum() for part in scored])


def _told(prompt: Prompt, instruction: str) -> Prompt:
    """The prompt with the instruction before everything, joined to a system message that is there already."""
    messages = prompt.messages or ()
    if messages and messages[0].role == "system":
        joined = replace(messages[0], content=f"{instruction}\n\n{messages[0].content}")
        return replace(prompt, messages=(joined, *messages[1:]))
    return replace(prompt, messages=(Message("system", instruction), *messages))
