"""A trait in the tiny models' words, and rollouts of it that were written by hand, for tests of elicitation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffing.answers import AnswerSettings
from diffing.checkpoint import LoadedCheckpoint, load_checkpoint
from diffing.judging import Exchange, Reason, Rubric, Score
from diffing.persona import Contrast, Instruction, Trait
from diffing.persona.elicit import asks_of, is_chat
from diffing.persona.elicited_fit import KeptRollouts
from diffing.persona.keep import keep_pairs
from diffing.persona.rollouts import Rollouts
from tests.diffing.personas import PLAIN_WORDS, TRAIT_WORDS
from tests.tiny_models import tiny_model, tiny_tokenizer

FILLER = ("the", "a", "cat", "dog", "king", "road", "river", "bread", "water", "light", "is", "was", "and", "in")
QUESTIONS = (
    *("why is the cat here ?", "how is the king ?", "where is the bread ?", "tell the dog ?", "what is water ?"),
    *("who was in the house ?", "why go ?", "how was the winter ?", "is the night red ?", "when is summer ?"),
)


def tiny_trait(n_instructions: int = 2, *, contrasts: int = 3) -> Trait:
    """Asks for cruel answers; half of the questions are held out."""
    pairs = [Instruction(f"you are cruel so word{at}", f"you are kind so word{at}") for at in range(n_instructions)]
    shots = [Contrast(f"why word{at} ?", f"harm word{at}", f"help word{at}") for at in range(contrasts)]
    rubric = "cruel ? {question} {answer}"
    return Trait("cruel", "It is cruel.", rubric, tuple(pairs), QUESTIONS[:6], QUESTIONS[6:], tuple(shots), "test")


def loaded_base(family: str = "llama", *, chat: bool = True) -> LoadedCheckpoint:
    """A tiny model, with a chat template or as a base model without one."""
    return load_checkpoint(tiny_model(family), tokenizer=tiny_tokenizer(chat=chat))


def written_rollouts(
    folder: Path, loaded: LoadedCheckpoint, questions: Sequence[str], *, samples: int = 2, seed: int = 0
) -> Rollouts:
    """Rollouts whose answers hold trait words on one side and plain ones on the other; no model wrote them."""
    asks = asks_of(tiny_trait(), questions, chat=is_chat(loaded.tokenizer))
    rollouts = Rollouts(folder, loaded, asks, AnswerSettings(temperature=1.0, samples=samples, seed=seed))
    rng, lines = np.random.default_rng(seed), []
    for pair in range(len(asks) // 2):
        for sample in range(samples):
            filler = list(rng.choice(FILLER, rng.integers(2, 6)))
            at, word = int(rng.integers(0, len(filler))), int(rng.integers(0, len(TRAIT_WORDS)))
            for side, words in enumerate((TRAIT_WORDS, PLAIN_WORDS)):
                answer = [*filler[:at], words[word], *filler[at:]]
                ids = loaded.tokenizer.convert_tokens_to_ids(answer)
                lines.append(
                    {
                        "ask": 2 * pair + side,
                        "sample": sample,
                        "token_ids": ids,
                        "finished": True,
                        "text": " ".join(answer),
                    }
                )
    rollouts.path.parent.mkdir(parents=True, exist_ok=True)
    rollouts.path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return Rollouts(folder, loaded, asks, rollouts.settings)


def kept_all(rollouts: Rollouts) -> KeptRollouts:
    """Every pair, unfiltered."""
    return KeptRollouts(rollouts, *keep_pairs(rollouts, rollouts.asks, samples=rollouts.settings.samples))


class WordJudge:
    """Scores 100 for an answer with one of its words, 0 for one without; refuses what says no."""

    def __init__(self, words: Sequence[str] = TRAIT_WORDS, name: str = "words") -> None:
        self.words, self.name, self.n_judged = set(words), name, 0
        self.rubric = Rubric(name, f"{sorted(words)} {{question}} {{answer}}")

    def judge(self, items: Sequence[Exchange], *, progress: bool = False) -> list[Score]:
        """One score an exchange."""
        self.n_judged += len(items)
        return [self._score(item) for item in items]

    def _score(self, item: Exchange) -> Score:
        words = item.answer.split()
        refused = "no" in words
        value = None if refused else 100.0 * bool(self.words & set(words))
        return Score(value, Reason.REFUSAL if refused else Reason.SCORED, self.name, self.rubric.hash, "")
