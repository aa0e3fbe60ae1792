"""What does a model answer, token by token, in a way that two models can be compared?

Sampling takes, at every step, the token with the largest logit / temperature + Gumbel noise, which is an exact draw.
The noise depends on the seed, the prompt's id, the number of the draw, the step and the token alone: an answer does
not depend on the batch, on the order or number of the prompts, on the device, or on a resume, and two models get the
same noise, so that equal models give equal answers and close models differ only where their predictions do.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from diffing.answer_noise import gumbel_noise, noise_keys
from diffing.checkpoint import LoadedCheckpoint
from diffing.errors import InputError
from diffing.next_token import NextToken
from diffing.progress import followed
from diffing.prompts import PromptSet, TokenizedPrompts
from diffing.tokens import TokenBatch

_HELD_LOGITS = 1 << 24
_NONE = contextlib.nullcontext()
# A context for one batch, made from the tokens on which its answers are chosen, `[prompt, token]`: the last of each
# prompt, and the answers' own where they are given. `Intervention(model, edits, where=…)` is one.
Around = Callable[[Tensor], contextlib.AbstractContextManager[object]]


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are drawn.

    Attributes:
        max_new_tokens: most tokens of an answer.
        temperature: of sampling; 0 takes the likeliest token each time.
        seed: of the noise; the same for both models.
        batch_size: answers at once; answers do not depend on it but for rounding.
        samples: answers to each prompt, each with noise of its own; more than one needs a temperature above 0.
        until: an answer ends at the first token that contains this text, for models that do not end turns by
            themselves; empty for none.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 16
    samples: int = 1
    until: str = ""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_size < 1 or not self.temperature >= 0 or self.seed < 0:
            raise InputError(
                "Expected max_new_tokens and batch_size of at least 1, temperature and seed of 0 or more, got "
                f"{self!r}. Mend what is off."
            )
        if self.samples < 1 or (self.samples > 1 and not self.temperature):
            raise InputError(
                f"Expected 1 sample, or more at a temperature above 0, got {self.samples} at {self.temperature}. "
                "Without noise all answers to a prompt are the same."
            )


@dataclass(frozen=True, eq=False)
class Answer:
    """One drawn answer.

    Attributes:
        prompt: number of the prompt in its set.
        sample: number of the draw, from 0.
        token_ids: what was written, the end mark included where one was `[token]`, int64.
        finished: whether it ended by itself; False where `max_new_tokens` cut it.
        text: decoded without special tokens; model text, so a page must escape it.
    """

    prompt: int
    sample: int
    token_ids: Int64[np.ndarray, " token"]
    finished: bool
    text: str


def answer_prompts(
    loaded: LoadedCheckpoint,
    prompts: PromptSet,
    settings: AnswerSettings,
    *,
    max_length: int = 4096,
    around: Around | None = None,
    progress: bool = False,
) -> tuple[Answer, ...]:
    """Answers to prompts as texts with their token ids, in the order of the prompts, then of the draws.

    Args:
        loaded: the model; inside `with Intervention(loaded.model, …)` it answers as changed.
        prompts: conversations that end where the assistant speaks, or texts to go on with.
        settings: how to draw.
        max_length: most tokens of a prompt.
        around: opened for each batch, for changes at the tokens on which answers are chosen.
        progress: shows a bar on a terminal.

    Raises:
        InputError: a prompt is longer than `max_length`.
    """
    tokenized = prompts.tokenize(loaded.tokenizer, max_length=max_length, add_generation_prompt=True)
    if tokenized.truncated:
        raise InputError(
            f"Expected prompts of at most {max_length} tokens, got {tokenized.n_truncated} longer (first: "
            f"{tokenized.truncated[0]}). Raise max_length or leave them out."
        )
    drawn = stream_answers(loaded, tokenized, settings, around=around, progress=progress)
    return tuple(sorted(drawn, key=lambda answer: (answer.prompt, answer.sample)))


def draw_answers(
    loaded: LoadedCheckpoint,
    tokenized: TokenizedPrompts,
    settings: AnswerSettings,
    *,
    around: Around | None = None,
    progress: bool = False,
) -> tuple[Int[np.ndarray, " _"], ...]:
    """Answers as token ids, the end mark included where one was written: all draws of a prompt, then of the next.

    Args:
        loaded: the model; its adapter and mode are put back, and no global random state is touched.
        tokenized: prompts that end where the answer begins (`tokenize(…, add_generation_prompt=True)`).
        settings: how to draw; answer `p * settings.samples + s` is draw `s` of prompt `p`.
        around: opened for each batch, for changes at the tokens on which answers are chosen.
        progress: shows a bar on a terminal.
    """
    answers: list[np.ndarray] = [np.zeros(0, np.int64)] * (len(tokenized) * settings.samples)
    for answer in stream_answers(loaded, tokenized, settings, around=around, progress=progress):
        answers[answer.prompt * settings.samples + answer.sample] = answer.token_ids
    return tuple(answers)


def stream_answers(
    loaded: LoadedCheckpoint,
    tokenized: TokenizedPrompts,
    settings: AnswerSettings,
    *,
    around: Around | None = None,
    skip: Callable[[int, int], bool] = lambda prompt, sample: False,
    progress: bool = False,
) -> Iterator[Answer]:
    """The same answers batch by batch as they are written, longest prompts first; nothing is kept.

    Args:
        loaded: the model.
        tokenized: prompts that end where the answer begins.
        settings: how to draw.
        around: opened for each batch, for changes at the tokens on which answers are chosen.
        skip: says of a prompt's number and a draw's whether that answer is known already and need not be drawn.
        progress: shows a bar on a terminal.
    """
    order = np.argsort(-tokenized.lengths, kind="stable").tolist()
    wanted = [pair for pair in product(order, range(settings.samples)) if not skip(*pair)]
    for at in followed(range(0, len(wanted), settings.batch_size), f"Answers of {loaded.name}", shown=progress):
        yield from _drawn_batch(loaded, tokenized, wanted[at : at + settings.batch_size], settings, around)


@torch.inference_mode()
def _drawn_batch(
    loaded: LoadedCheckpoint,
    tokenized: TokenizedPrompts,
    pairs: Sequence[tuple[int, int]],
    settings: AnswerSettings,
    around: Around | None,
) -> list[Answer]:
    ends, pad = _marks(loaded)
    stops = [*ends, *_tokens_with(loaded.tokenizer, settings.until)]
    batch = tokenized.batch([prompt for prompt, _ in pairs], device=next(loaded.model.parameters()).device)
    ids, mask = _left_padded(batch)
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        eos_token_id=stops or None,
    )
    named = [(tokenized.prompts.prompts[prompt].id, sample) for prompt, sample in pairs]
    noise = LogitsProcessorList([_Gumbel(named, settings)] if settings.temperature else [])
    where = torch.zeros_like(mask, dtype=torch.bool)
    where[:, -1] = True
    with loaded.active() as model, around(where) if around else _NONE:
        written = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=noise
        )
    answers = []
    for (prompt, sample), row in zip(pairs, written[:, ids.shape[1] :].cpu().numpy(), strict=True):
        ended = np.flatnonzero(np.isin(row, stops))
        kept = row[: int(ended[0]) + 1 if len(ended) else len(row)].astype(np.int64)
        said = kept[:-1] if len(ended) else kept
        text = loaded.tokenizer.decode(said, skip_special_tokens=True)
        answers.append(Answer(prompt, sample, kept, bool(len(ended)), str(text)))
    return answers


@torch.inference_mode()
def score_answers(
    loaded: LoadedCheckpoint,
    tokenized: TokenizedPrompts,
    answers: Sequence[Int[np.ndarray, " _"]],
    *,
    batch_tokens: int = 4096,
    around: Around | None = None,
    progress: bool = False,
) -> tuple[Float[np.ndarray, " _"], ...]:
    """Log-probability of every token of given answers, in nats, as this model would have said them.

    Logits exist for a few rows at a time and only in fp32.

    Args:
        loaded: the model that is asked.
        tokenized: the prompts.
        answers: one a prompt, as token ids.
        batch_tokens: most tokens in one forward.
        around: opened for each batch, for changes at the tokens on which answers are chosen.
        progress: shows a bar on a terminal.
    """
    side, scored = NextToken(loaded), [np.zeros(0)] * len(tokenized)
    device = next(loaded.model.parameters()).device
    whole = [np.concatenate([ids, answer]) for ids, answer in zip(tokenized.input_ids, answers, strict=True)]
    order = sorted(range(len(whole)), key=lambda number: -len(whole[number]))
    batches: list[list[int]] = []
    for number in order:
        if not batches or len(whole[batches[-1][0]]) * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(number)
    for numbers in followed(batches, f"Scoring by {loaded.name}", shown=progress):
        batch = TokenBatch.of_rows([whole[number] for number in numbers], tokenized.pad_id, device)
        with around(_choosing(batch, [len(tokenized.input_ids[number]) for number in numbers])) if around else _NONE:
            hidden = side.hidden(batch)
        for row, number in enumerate(numbers):
            start, length = len(tokenized.input_ids[number]), len(answers[number])
            rows = hidden[row, start - 1 : start - 1 + length]
            scored[number] = _log_probabilities(side, rows, torch.from_numpy(answers[number]).to(device))
    return tuple(scored)


def _log_probabilities(
    side: NextToken, hidden: Float[Tensor, "token d_model"], answer: Int[Tensor, " token"]
) -> Float[np.ndarray, " token"]:
    step, parts = max(1, _HELD_LOGITS // side.vocabulary), [np.zeros(0)]
    for at in range(0, len(hidden), step):
        logits = side.logits(hidden[at : at + step]).log_softmax(dim=1)
        parts.append(logits.gather(1, answer[at : at + step, None])[:, 0].double().cpu().numpy())
    return np.concatenate(parts)


class _Gumbel(LogitsProcessor):
    """Adds the noise of each answer to its logits; the largest sum is then an exact draw at that temperature."""

    def __init__(self, named: Sequence[tuple[str, int]], settings: AnswerSettings) -> None:
        self._named, self._settings, self._step = named, settings, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        keys = noise_keys(self._settings.seed, self._named, self._step).to(scores.device)
        self._step += 1
        return scores.float() / self._settings.temperature + gumbel_noise(keys, scores.shape[1])


def _marks(loaded: LoadedCheckpoint) -> tuple[list[int], int]:
    """Tokens that end an answer, and what pads a batch."""
    own = getattr(loaded.model, "generation_config", None)
    found = getattr(own, "eos_token_id", None)
    found = loaded.tokenizer.eos_token_id if found is None else found
    stops = [] if found is None else [int(token) for token in (found if isinstance(found, list) else [found])]
    pad = loaded.tokenizer.pad_token_id
    return stops, int(pad) if pad is not None else (stops[0] if stops else 0)


@functools.lru_cache(maxsize=4)
def _tokens_with(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Every token whose own text contains `text`."""
    if not text:
        return ()
    decoded = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return tuple(token for token, piece in enumerate(decoded) if text in piece)


def _left_padded(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Ids and mask with the padding before the prompts, so that all answers begin at the same place."""
    width = batch.input_ids.shape[1]
    index = torch.stack([torch.arange(width).roll(width - length) for length in batch.lengths])
    index = index.to(batch.input_ids.device)
    return batch.input_ids.gather(1, index), batch.attention_mask.gather(1, index)


def _choosing(batch: TokenBatch, starts: Sequence[int]) -> Tensor:
    """The tokens of whole rows on which their answers' tokens are chosen, `[prompt, token]`."""
    position = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    return (position >= torch.tensor(starts, device=position.device)[:, None] - 1) & batch.mask
