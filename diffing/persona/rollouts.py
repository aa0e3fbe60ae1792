"""What did the model answer when it was asked for the trait and for its absence, on disk as it came?

A file of rollouts belongs to one model, one list of prompts and one way of drawing; its name holds their digest, so
that other settings begin another file and nothing is drawn twice. Lines are appended batch by batch; what a kill left
half-written is cut off at the next start, and the answers that are missing are drawn as they would have been.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int64

from diffing.answers import Answer, AnswerSettings, stream_answers
from diffing.chat import Role
from diffing.checkpoint import LoadedCheckpoint
from diffing.errors import PersonaError, StoreCorruptError
from diffing.lock import WriterLock
from diffing.persona.elicit import Ask, is_chat, prompts_of
from diffing.persona.traits import digest_of
from diffing.prompts import Prompt, PromptSet, TokenizedPrompts

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Rollout:
    """One answer to one ask.

    Attributes:
        ask: number of the ask.
        sample: number of the draw.
        token_ids: the answer's own tokens, without the mark that ended it `[token]`.
        finished: whether it ended by itself.
        text: decoded.
    """

    ask: int
    sample: int
    token_ids: Int64[np.ndarray, " token"]
    finished: bool
    text: str


class Rollouts:
    """Answers of one model to asks, drawn once and kept in a file.

    Memory: the tokens of the prompts and a few bytes a rollout; answers stay on disk.

    Args:
        folder: where the file is, or will be.
        loaded: the model.
        asks: what it is asked; see `asks_of`.
        settings: how answers are drawn; `samples` to each ask.
        max_length: most tokens of a prompt.

    Raises:
        PersonaError: a prompt is longer than `max_length`.
        StoreCorruptError: the file's lines are not rollouts.

    Attributes:
        asks: what the model was asked.
        tokenized: the prompts as it reads them.
        settings: how answers are drawn.
        path: the file.
    """

    def __init__(
        self,
        folder: Path | str,
        loaded: LoadedCheckpoint,
        asks: Sequence[Ask],
        settings: AnswerSettings,
        *,
        max_length: int = 1024,
    ) -> None:
        self._loaded, self.asks = loaded, tuple(asks)
        until = "" if is_chat(loaded.tokenizer) else "\n"
        self.settings = replace(settings, until=until)
        self.tokenized = prompts_of(asks).tokenize(loaded.tokenizer, max_length=max_length, add_generation_prompt=True)
        if self.tokenized.truncated:
            raise PersonaError(
                f"Expected prompts of at most {max_length} tokens, got {self.tokenized.n_truncated} of {len(asks)} "
                "longer. Raise max_length (--max-length)."
            )
        self.path = Path(folder) / f"rollouts-{self.digest[:16]}.jsonl"
        self._known = np.zeros((len(self.asks), self.settings.samples), bool)
        self._cut = 0
        self._scan()

    @property
    def digest(self) -> str:
        """Hash of everything an answer depends on, except how many are drawn."""
        drawn = {name: getattr(self.settings, name) for name in ("max_new_tokens", "temperature", "seed", "until")}
        names = [prompt.id for prompt in self.tokenized.prompts]
        return digest_of([_FORMAT, self._loaded.fingerprint, self.tokenized.digest, names, drawn])

    @property
    def n_missing(self) -> int:
        """Answers still to be drawn."""
        return int((~self._known).sum())

    @property
    def n_cut(self) -> int:
        """Answers that `max_new_tokens` cut short."""
        return self._cut

    def __len__(self) -> int:
        return self._known.size

    def draw(self, *, progress: bool = False) -> None:
        """Draws what is missing; every answer is on disk before the next batch begins.

        Raises:
            StoreLockedError: another process is drawing into this file.
        """
        if not self.n_missing:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with WriterLock(self.path.with_suffix(".lock")), self.path.open("ab+") as file:
            # Only the writer may cut what a kill left half-written: a reader could cut what is being written.
            _cut_torn_line(file)
            self._scan()
            answers = stream_answers(
                self._loaded,
                self.tokenized,
                self.settings,
                skip=lambda ask, sample: bool(self._known[ask, sample]),
                progress=progress,
            )
            for answer in answers:
                file.write(_line(answer))
                file.flush()
                self._known[answer.prompt, answer.sample] = True
                self._cut += not answer.finished
            os.fsync(file.fileno())

    def __iter__(self) -> Iterator[Rollout]:
        """The answers from disk, each once, in the order in which they were drawn."""
        if not self.path.exists():
            return
        seen = np.zeros_like(self._known)
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                rollout = self._parsed(line, number)
                if rollout.sample < self.settings.samples and not seen[rollout.ask, rollout.sample]:
                    seen[rollout.ask, rollout.sample] = True
                    yield rollout

    def rows(self, rollouts: Sequence[Rollout]) -> TokenizedPrompts:
        """Prompt and answer as one row of exactly the tokens that the model read and wrote.

        The answer alone is the assistant's here: examples that came before it count as template.
        """
        ids, roles, prompts = [], [], []
        for rollout in rollouts:
            asked = self.tokenized.roles[rollout.ask].copy()
            asked[asked == Role.ASSISTANT] = Role.TEMPLATE
            ids.append(np.concatenate([self.tokenized.input_ids[rollout.ask], rollout.token_ids]).astype(np.int32))
            answered = np.full(len(rollout.token_ids), Role.ASSISTANT, np.uint8)
            roles.append(np.concatenate([asked, answered]))
            prompts.append(Prompt(f"{self.asks[rollout.ask].prompt.id}-{rollout.sample}", text=rollout.text))
        return TokenizedPrompts(PromptSet(tuple(prompts)), tuple(ids), tuple(roles), pad_id=self.tokenized.pad_id)

    def _scan(self) -> None:
        self._cut = 0
        for rollout in self:
            self._known[rollout.ask, rollout.sample] = True
            self._cut += not rollout.finished

    def _parsed(self, line: bytes, number: int) -> Rollout:
        try:
            value = json.loads(line)
            ids = np.array(value["token_ids"], np.int64)
            rollout = Rollout(int(value["ask"]), int(value["sample"]), ids, bool(value["finished"]), value["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise StoreCorruptError(
                f"Expected a rollout in line {number} of {self.path}, got something else ({error}). Delete the file; "
                "its answers are drawn again."
            ) from error
        if not 0 <= rollout.ask < len(self.asks):
            raise StoreCorruptError(
                f"Expected an ask below {len(self.asks)} in line {number} of {self.path}, got {rollout.ask}. Delete "
                "the file; its answers are drawn again."
            )
        return rollout


def _line(answer: Answer) -> bytes:
    # The mark that ended an answer is the template's, not the answer's.
    own = answer.token_ids[:-1] if answer.finished else answer.token_ids
    value = {
        "ask": answer.prompt,
        "sample": answer.sample,
        "token_ids": own.tolist(),
        "finished": answer.finished,
        "text": answer.text,
    }
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _cut_torn_line(file: BinaryIO) -> None:
    file.seek(0)
    whole = 0
    for line in file:
        whole += len(line) if line.endswith(b"\n") else 0
    file.truncate(whole)
    file.seek(0, os.SEEK_END)
