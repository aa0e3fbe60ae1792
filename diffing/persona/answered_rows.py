"""Where does a training row's answer begin, and what does a model hold while it reads it?

A row is a dialogue that ends with an answer. It is read as the tokens of its prompt, rendered up to where the answer
begins, followed by the answer's own tokens; another answer to the same prompt is read behind the very same tokens, so
that the two differ in the answer alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from diffing.chat import Role
from diffing.checkpoint import LoadedCheckpoint
from diffing.errors import PersonaError
from diffing.prompts import Prompt, PromptSet, TokenizedPrompts
from diffing.site import Site
from diffing.tap import Tap


@dataclass(frozen=True, eq=False)
class AnsweredRows:
    """Rows taken apart into prompt and last answer.

    Attributes:
        rows: as given.
        prompts: each row without its last answer, tokenised up to where the answer begins.
        answers: token ids of each row's last answer, without the mark that ends the turn.
    """

    rows: PromptSet
    prompts: TokenizedPrompts
    answers: tuple[Int[np.ndarray, " _"], ...]

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def n_tokens(self) -> int:
        """Tokens of all prompts and answers together."""
        return self.prompts.n_tokens + sum(map(len, self.answers))


@dataclass(frozen=True, eq=False)
class ReadAnswers:
    """One batch of answers as the model holds them.

    Attributes:
        index: positions of the rows.
        answer: at each site the mean over the answer's tokens, `[row, d_model]`; of an empty answer the last token of
            its prompt.
        prompt: at each site the last token of the prompt, `[row, d_model]`: what is known before the answer.
    """

    index: tuple[int, ...]
    answer: tuple[Float64[Tensor, "row _"], ...]
    prompt: tuple[Float64[Tensor, "row _"], ...]


def take_apart(loaded: LoadedCheckpoint, rows: PromptSet, *, max_length: int = 1024) -> AnsweredRows:
    """Splits rows into prompts and answers.

    Raises:
        PersonaError: a row does not end with an answer, or is longer than `max_length` tokens.
    """
    without = [row.id for row in rows if not row.messages or row.messages[-1].role != "assistant"]
    if without:
        raise PersonaError(
            f"Expected every row to end with an answer by the assistant, got {len(without)} of {len(rows)} that do not "
            f"(first: {without[0]}). Give rows as messages, or as prompt and completion."
        )
    whole = rows.tokenize(loaded.tokenizer, max_length=max_length)
    if whole.n_truncated:
        raise PersonaError(
            f"Expected whole rows, got {whole.n_truncated} of {len(rows)} cut at {max_length} tokens (first: "
            f"{whole.truncated[0]}). Raise max_length (--max-length) or leave the long rows out."
        )
    asked = PromptSet(tuple(replace(row, messages=(row.messages or ())[:-1]) for row in rows))
    _refuse([row for row in asked if not row.messages], "a question before the answer")
    prompts = asked.tokenize(loaded.tokenizer, max_length=max_length, add_generation_prompt=True)
    answers = tuple(map(_last_answer, whole.input_ids, whole.roles))
    _refuse([row for row, answer in zip(rows, answers, strict=True) if not len(answer)], "an answer that is not empty")
    return AnsweredRows(rows, prompts, answers)


def read_answers(
    loaded: LoadedCheckpoint,
    prompts: TokenizedPrompts,
    answers: Sequence[Int[np.ndarray, " _"]],
    sites: Sequence[Site | str],
    *,
    batch_tokens: int = 8192,
) -> Iterator[ReadAnswers]:
    """Reads every answer behind its prompt; batches by length, so not in the order given.

    One forward pass over the rows, stopped after the deepest site; memory is that of one batch.

    Raises:
        PersonaError: activations are not finite.
    """
    lengths = [len(ids) + len(answer) for ids, answer in zip(prompts.input_ids, answers, strict=True)]
    device = next(loaded.model.parameters()).device
    with torch.inference_mode(), loaded.active() as model, Tap(model, list(sites), early_exit=True) as tap:
        for chosen in _batches(lengths, batch_tokens):
            ids, mask = _joined(prompts, answers, chosen)
            found = [read.float() for read in tap.read(input_ids=ids.to(device), attention_mask=mask.to(device))]
            starts = [len(prompts.input_ids[row]) for row in chosen]
            # A row that is all prompt (an empty answer) is read at its last token.
            spans = [(min(start, lengths[row] - 1), lengths[row]) for row, start in zip(chosen, starts, strict=True)]
            answer = tuple(torch.stack([one[at, a:b].mean(0) for at, (a, b) in enumerate(spans)]) for one in found)
            prompt = tuple(torch.stack([one[at, start - 1] for at, start in enumerate(starts)]) for one in found)
            _check_finite(answer, chosen, prompts)
            yield ReadAnswers(
                tuple(chosen), tuple(one.cpu().double() for one in answer), tuple(one.cpu().double() for one in prompt)
            )


def _last_answer(ids: np.ndarray, roles: np.ndarray) -> np.ndarray:
    """The last unbroken run of the assistant's own tokens."""
    said = np.flatnonzero(roles == int(Role.ASSISTANT))
    if not len(said):
        return np.zeros(0, np.int64)
    breaks = np.flatnonzero(np.diff(said) > 1)
    return ids[said[breaks[-1] + 1 if len(breaks) else 0] : said[-1] + 1].astype(np.int64)


def _refuse(rows: Sequence[Prompt], expected: str) -> None:
    if rows:
        raise PersonaError(
            f"Expected {expected} in every row, got {len(rows)} without (first: {rows[0].id}). Leave these rows out."
        )


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    chosen: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if chosen and lengths[chosen[0]] * (len(chosen) + 1) > batch_tokens:
            yield chosen
            chosen = []
        chosen.append(row)
    if chosen:
        yield chosen


def _joined(
    prompts: TokenizedPrompts, answers: Sequence[np.ndarray], chosen: Sequence[int]
) -> tuple[Int[Tensor, "row token"], Int[Tensor, "row token"]]:
    parts = [np.concatenate([prompts.input_ids[row], answers[row]]) for row in chosen]
    width = max(map(len, parts))
    ids, mask = np.full((len(parts), width), prompts.pad_id, np.int64), np.zeros((len(parts), width), np.int64)
    for at, part in enumerate(parts):
        ids[at, : len(part)], mask[at, : len(part)] = part, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _check_finite(values: Sequence[Tensor], chosen: Sequence[int], prompts: TokenizedPrompts) -> None:
    for value in values:
        broken = (~torch.isfinite(value).all(dim=1)).nonzero().flatten().tolist()
        if broken:
            name = prompts.prompts.prompts[chosen[broken[0]]].id
            raise PersonaError(
                f"Expected finite activations, got NaN or infinity in row {name}. "
                "Load the model in float32 or bfloat16 (float16 overflows), or check its weights."
            )
