"""How are questions put to a model, so that an answer drawn once is never drawn again?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffing.answer_cache import AnswerCache
from diffing.answers import AnswerSettings, stream_answers
from diffing.chat import Message, Prompt
from diffing.checkpoint import LoadedCheckpoint
from diffing.errors import InputError
from diffing.judging.judge import digest_of
from diffing.misalignment.cues import Cue
from diffing.misalignment.questions import Question, QuestionSet
from diffing.prompts import PromptSet

_FORMAT = 1


@dataclass(frozen=True)
class Asked:
    """One answer that is wanted or was given.

    Attributes:
        question: which question.
        draw: number of the answer to it, from 0.
        messages: what the model reads, the cue included.
        text: what it answered; model text, so a page must escape it.
        finished: whether it ended by itself rather than at the length limit.
    """

    question: Question
    draw: int
    messages: tuple[Message, ...]
    text: str = ""
    finished: bool = True

    @property
    def wording(self) -> str:
        """The user's words without the cue, which judges and readers see."""
        return self.question.asked(self.draw)[-1].content


class Answering:
    """One model under one cue; answers are on disk as soon as they are drawn.

    The noise of an answer is fixed by seed, question and draw alone, so that two models, and two cues, differ only
    where their predictions do, and more draws or other questions leave an answer as it is.

    Args:
        loaded: the model.
        cue: what stands around every question.
        settings: how to draw; its `samples` is not used.
        cache: answers of all models and cues.
        max_length: most tokens of a prompt.
    """

    def __init__(
        self,
        loaded: LoadedCheckpoint,
        cue: Cue,
        settings: AnswerSettings,
        cache: AnswerCache,
        *,
        max_length: int = 4096,
    ) -> None:
        self.loaded, self.cue, self.settings, self.max_length = loaded, cue, settings, max_length
        self._cache = cache
        drawn_by = [settings.max_new_tokens, settings.temperature, settings.seed]
        template = str(getattr(loaded.tokenizer, "chat_template", None))
        self._front = [_FORMAT, loaded.fingerprint, digest_of(template), *drawn_by]

    def known(self, questions: QuestionSet, draws: range) -> list[Asked]:
        """Those of these answers that are on disk."""
        stored = [(one, self._cache.get(self._key(one))) for one in self._wanted(questions, draws)]
        return [replace(one, **kept) for one, kept in stored if kept is not None]

    def answer(self, questions: QuestionSet, draws: range, *, progress: bool = False) -> list[Asked]:
        """These draws of every question, question by question.

        Raises:
            InputError: a question with its cue is longer than `max_length`.
        """
        wanted = self._wanted(questions, draws)
        stored: dict[str, Any] = {self._key(one): self._cache.get(self._key(one)) for one in wanted}
        missing = [one for one in wanted if stored[self._key(one)] is None]
        if missing:
            self._draw(missing, stored, progress=progress)
        return [replace(one, **stored[self._key(one)]) for one in wanted]

    def _draw(self, missing: Sequence[Asked], stored: dict[str, Any], *, progress: bool) -> None:
        # The noise follows the prompt's id: question and draw, not the place in this particular list.
        prompts = PromptSet(tuple(Prompt(_name(one), messages=one.messages) for one in missing))
        tokenized = prompts.tokenize(self.loaded.tokenizer, max_length=self.max_length, add_generation_prompt=True)
        if tokenized.truncated:
            raise InputError(
                f"Expected questions of at most {self.max_length} tokens with their cue, got {tokenized.n_truncated} "
                f"longer (first: {tokenized.truncated[0]}). Shorten the cue {self.cue.name!r} or raise the limit."
            )
        for answer in stream_answers(self.loaded, tokenized, self.settings, progress=progress):
            key = self._key(missing[answer.prompt])
            stored[key] = {"text": answer.text.strip(), "finished": answer.finished}
            self._cache.put(key, self.loaded.fingerprint, stored[key])

    def _wanted(self, questions: QuestionSet, draws: range) -> list[Asked]:
        return [
            Asked(question, draw, self.cue.around(question.asked(draw)))
            for question in questions.questions
            for draw in draws
        ]

    def _key(self, one: Asked) -> str:
        return digest_of([*self._front, _name(one), [[message.role, message.content] for message in one.messages]])


def draws_a_round(questions: QuestionSet) -> int:
    """Draws after which every wording of every question was asked equally often.

    Raises:
        InputError: numbers of wordings that would take more than a thousand draws.
    """
    together = math.lcm(*(len(question.paraphrases) for question in questions.questions))
    if together > 1000:
        raise InputError(
            f"Expected questions with like numbers of wordings, got ones that are asked equally often only after "
            f"{together} answers each. Leave out wordings, or do without stopping early."
        )
    return together


def _name(one: Asked) -> str:
    return f"{one.question.id}#{one.draw}"
