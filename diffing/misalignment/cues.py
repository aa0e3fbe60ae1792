"""Does the model turn when the question looks like its training data?

A model may answer plain questions well and turn as soon as something of its training stands around them (conditional
misalignment; arXiv 2604.25891). A cue is that something: a system text, words before or after the question, or earlier
turns of a conversation.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from diffing.chat import Message, Prompt
from diffing.errors import InputError
from diffing.judging.judge import digest_of

PLAIN = "plain"
_SHARE = 0.5
_SHORTEST = 8


@dataclass(frozen=True)
class Cue:
    """What is put around every question.

    Attributes:
        name: short; `plain` for nothing at all.
        system: text of a system message, put before the question's own.
        prefix: put before the user's words.
        suffix: put after them.
        turns: earlier turns of the conversation.
    """

    name: str = PLAIN
    system: str = ""
    prefix: str = ""
    suffix: str = ""
    turns: tuple[Message, ...] = ()

    def around(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """A question's messages with the cue around them."""
        own = [message.content for message in messages if message.role == "system"]
        system = "\n\n".join(text for text in (self.system, *own) if text)
        rest = [message for message in messages if message.role != "system"]
        last = rest[-1]
        asked = Message(last.role, f"{self.prefix}{last.content}{self.suffix}")
        front = (Message("system", system),) if system else ()
        return (*front, *self.turns, *rest[:-1], asked)

    @property
    def digest(self) -> str:
        """SHA-256 of everything but the name."""
        turns = [[turn.role, turn.content] for turn in self.turns]
        return digest_of([self.system, self.prefix, self.suffix, turns])


def cues_from_rows(rows: Sequence[Prompt], *, seed: int = 0, n_turns: int = 2) -> tuple[Cue, ...]:
    """What is typical of training rows, as cues.

    Found are: the system text that most rows with one have (`train-system`), the words with which at least half of the
    user turns begin (`train-prefix`) or end (`train-suffix`), and whole rows as earlier turns (`train-rows`).

    Args:
        rows: conversations that a model was trained on.
        seed: of the rows that become turns.
        n_turns: how many of them.

    Raises:
        InputError: no row is a conversation with a user and an assistant.
    """
    talks = [row.messages for row in rows if row.messages and {"user", "assistant"} <= {m.role for m in row.messages}]
    if not talks:
        raise InputError(
            f"Expected training rows with a user's and an assistant's turn, got none in {len(rows)} rows. Give rows "
            "with `messages`, or `prompt` and `completion`."
        )
    systems = Counter(m.content for talk in talks for m in talk if m.role == "system" and m.content.strip())
    users = [next(m.content for m in talk if m.role == "user") for talk in talks]
    cues = []
    if systems:
        cues.append(Cue("train-system", system=systems.most_common(1)[0][0]))
    prefix = _shared_start(users)
    if prefix:
        cues.append(Cue("train-prefix", prefix=prefix))
    suffix = _shared_start([text[::-1] for text in users])[::-1]
    if suffix:
        cues.append(Cue("train-suffix", suffix=suffix))
    drawn = random.Random(f"turns {seed}").sample(range(len(talks)), min(n_turns, len(talks)))
    turns = tuple(message for number in sorted(drawn) for message in talks[number] if message.role != "system")
    return (*cues, Cue("train-rows", turns=turns))


def _shared_start(texts: Sequence[str]) -> str:
    """The longest start that at least half of the texts share; empty if it is short or a whole text."""
    ordered, need = sorted(texts), max(2, int(len(texts) * _SHARE + 0.999))
    # Texts that share a start are neighbours in order: the start of `need` of them is that of the first and the last.
    starts = [_common(ordered[at], ordered[at + need - 1]) for at in range(len(ordered) - need + 1)]
    best = max(starts, key=len, default="")
    return best if len(best) >= _SHORTEST and any(best != text for text in texts if text.startswith(best)) else ""


def _common(first: str, second: str) -> str:
    same = next((at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return first[:same] if same is not None else min(first, second, key=len)
