"""Which tokens of a row speak for it, and what does the model hold there?

Three poolings:

- `response_mean`: the mean over the assistant's own tokens. The token that closes a turn belongs to the template, not
  to the answer: it is the same in every row and already prepares the next turn, so it is left out.
- `last_prompt`: the last token of the prompt rendered up to where the answer would begin. A final assistant turn is
  dropped before rendering, so rows with and without an answer read the same.
- `prompt_mean`: the mean over what system and user say, up to where the answer would begin.

The first token of a row never counts in a mean: models park attention there, at norms far above all other tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float64, UInt8
from numpy import ndarray
from torch import Tensor

from diffing.checkpoint import LoadedCheckpoint
from diffing.errors import PersonaError
from diffing.prompts import Prompt, PromptSet, Role, TokenBatch, TokenizedPrompts
from diffing.site import Site
from diffing.tap import Tap

POOLINGS = ("response_mean", "last_prompt", "prompt_mean")
_ROLES = {
    "response_mean": (Role.ASSISTANT,),
    "prompt_mean": (Role.SYSTEM, Role.USER, Role.TEXT),
}


Progress = Callable[[int, int], None]


class CountedProgress:
    """Turns batches into calls of a progress function with rows done and rows in all."""

    def __init__(self, progress: Progress | None, *, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def add(self, rows: int) -> None:
        """Tells that `rows` more have been read."""
        self._done += rows
        if self._progress is not None:
            self._progress(self._done, self._total)


@dataclass(frozen=True)
class PooledRows:
    """One batch of rows, each reduced to one vector a site.

    Attributes:
        index: positions of the rows in the prompt set that was read.
        values: one `[row, d_model]` float64 tensor on the CPU for each site, in the order asked.
    """

    index: tuple[int, ...]
    values: tuple[Float64[Tensor, "row _"], ...]


def pooled_rows(
    loaded: LoadedCheckpoint,
    tokens: TokenizedPrompts,
    sites: Sequence[Site | str],
    *,
    pooling: str,
    batch_tokens: int = 8192,
) -> Iterator[PooledRows]:
    """Reads every row once and yields its pooled activations; batches by length, so not in the order given.

    One forward pass over the rows, stopped after the deepest site; memory is that of one batch.

    Raises:
        PersonaError: activations are not finite.
    """
    masks = [lambda batch: pooling_mask(batch, pooling)]
    for (rows,) in read_pooled(loaded, tokens, sites, masks, batch_tokens=batch_tokens):
        yield rows


def answered_rows(
    loaded: LoadedCheckpoint,
    tokens: TokenizedPrompts,
    sites: Sequence[Site | str],
    *,
    poolings: Sequence[str] = POOLINGS,
    batch_tokens: int = 8192,
) -> Iterator[tuple[PooledRows, ...]]:
    """Reads rows of prompt and answer once and pools each in several ways; see `answered_mask`."""
    masks = [functools.partial(answered_mask, pooling=pooling) for pooling in poolings]
    return read_pooled(loaded, tokens, sites, masks, batch_tokens=batch_tokens)


def read_pooled(
    loaded: LoadedCheckpoint,
    tokens: TokenizedPrompts,
    sites: Sequence[Site | str],
    masks: Sequence[Callable[[TokenBatch], Bool[Tensor, "batch token"]]],
    *,
    batch_tokens: int,
) -> Iterator[tuple[PooledRows, ...]]:
    """One forward a batch; its rows pooled once for each mask, all sites from the same pass.

    Raises:
        PersonaError: activations are not finite.
    """
    device = next(loaded.model.parameters()).device
    with torch.inference_mode(), loaded.active() as model, Tap(model, list(sites), early_exit=True) as tap:
        for batch in tokens.batches(max_tokens=batch_tokens, device=str(device)):
            reads = tap.read(**batch.inputs())
            pooled = []
            for mask_of in masks:
                mask = mask_of(batch)
                values = tuple(masked_mean(read, mask.to(read.device)).cpu().double() for read in reads)
                _check_finite(values, batch, tokens)
                pooled.append(PooledRows(index=tuple(batch.prompt_index), values=values))
            yield tuple(pooled)


def tokenize_for(
    loaded: LoadedCheckpoint, prompts: PromptSet, *, pooling: str, max_length: int = 1024
) -> TokenizedPrompts:
    """Tokens of the rows as `pooling` needs them: whole dialogues, or prompts up to where the answer would begin.

    Raises:
        PersonaError: an unknown pooling, rows cut at `max_length`, or rows without a token to pool.
    """
    if pooling not in POOLINGS:
        raise PersonaError(f"Expected pooling {', '.join(POOLINGS)}; got {pooling!r}. Use one of these.")
    reads_answer = pooling == "response_mean"
    if not reads_answer:
        prompts = PromptSet(tuple(map(_without_answer, prompts.prompts)))
    _refuse_empty([row for row in prompts.prompts if row.messages == ()], prompts, pooling)
    tokenized = prompts.tokenize(loaded.tokenizer, max_length=max_length, add_generation_prompt=not reads_answer)
    if tokenized.n_truncated:
        raise PersonaError(
            f"Expected whole rows, got {tokenized.n_truncated} of {len(prompts)} cut at {max_length} tokens. "
            "Raise max_length (--max-length) or leave the long rows out."
        )
    read = zip(prompts.prompts, tokenized.roles, strict=True)
    _refuse_empty([row for row, roles in read if not _has_tokens(roles, pooling)], prompts, pooling)
    return tokenized


def pooling_mask(batch: TokenBatch, pooling: str) -> Bool[Tensor, "batch token"]:
    """The tokens that speak for each row; every row has at least one after `tokenize_for`."""
    real = batch.attention_mask.bool()
    position = torch.arange(real.shape[1], device=real.device).expand_as(real)
    if pooling == "last_prompt":
        last = torch.where(real, position, -1).amax(dim=1, keepdim=True)
        return position == last
    wanted = torch.zeros_like(real)
    for role in _ROLES[pooling]:
        wanted |= batch.roles == int(role)
    return wanted & real & (position > 0)


def answered_mask(batch: TokenBatch, pooling: str) -> Bool[Tensor, "batch token"]:
    """The tokens that speak for rows which hold a prompt and its answer, and nothing of the assistant's before it.

    `last_prompt` is the token before the answer. In a causal model what comes later does not touch what is read there,
    so prompt and answer poolings can share one pass.
    """
    answer = (batch.roles == int(Role.ASSISTANT)) & batch.mask
    position = torch.arange(answer.shape[1], device=answer.device).expand_as(answer)
    start = torch.where(answer, position, answer.shape[1]).amin(dim=1, keepdim=True)
    if pooling == "response_mean":
        return answer & (position > 0)
    if pooling == "last_prompt":
        return position == start - 1
    return pooling_mask(batch, pooling) & (position < start)


def masked_mean(
    activations: Float[Tensor, "batch token d_model"], mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch d_model"]:
    """Mean over the marked tokens, in float32 or better whatever the model's dtype.

    Unmarked tokens do not enter even if they hold NaN or infinity.
    """
    values = activations.to(torch.promote_types(activations.dtype, torch.float32))
    kept = values.masked_fill(~mask.unsqueeze(-1), 0.0)
    return kept.sum(dim=1) / mask.sum(dim=1, keepdim=True)


def _without_answer(prompt: Prompt) -> Prompt:
    if prompt.messages and prompt.messages[-1].role == "assistant":
        return replace(prompt, messages=prompt.messages[:-1])
    return prompt


def _refuse_empty(empty: Sequence[Prompt], prompts: PromptSet, pooling: str) -> None:
    if empty:
        missing = "an answer by the assistant" if pooling == "response_mean" else "a prompt before the answer"
        raise PersonaError(
            f"Expected {missing} in every row for pooling {pooling}, got {len(empty)} of {len(prompts)} rows without "
            f"one (first: {empty[0].id}). Give rows as messages, or as prompt and completion."
        )


def _has_tokens(roles: UInt8[ndarray, " token"], pooling: str) -> bool:
    if pooling == "last_prompt":
        return len(roles) > 0
    return any(role in _ROLES[pooling] for role in roles[1:])


def _check_finite(values: Sequence[Tensor], batch: TokenBatch, tokenized: TokenizedPrompts) -> None:
    for value in values:
        broken = (~torch.isfinite(value).all(dim=1)).nonzero().flatten().tolist()
        if broken:
            name = tokenized.prompts.prompts[batch.prompt_index[broken[0]]].id
            raise PersonaError(
                f"Expected finite activations, got NaN or infinity in row {name}. "
                "Load the model in float32 or bfloat16 (float16 overflows), or check its weights."
            )
