"""What do the models read, token by token, and who speaks in each?"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from diffing.align import said_positions, token_ends
from diffing.chat import ChatRenderer, Prompt, Rendered
from diffing.chat import Role as Role
from diffing.errors import InputError, PromptError
from diffing.offsets import character_spans, token_roles

_logger = logging.getLogger(__name__)
_TEXTS_AT_ONCE = 1024


@dataclass(frozen=True)
class TokenTable:
    """What each row of activations was read at; four columns of equal length.

    Attributes:
        token_id: vocabulary id [token], int32.
        prompt: number of the prompt in its `TokenizedPrompts` [token], int32.
        position: place in the prompt, 0 for its first token [token], int32.
        role: a `Role` [token], uint8.
    """

    token_id: np.ndarray
    prompt: np.ndarray
    position: np.ndarray
    role: np.ndarray

    def __len__(self) -> int:
        return len(self.token_id)

    def __getitem__(self, rows: slice | np.ndarray) -> TokenTable:
        """The same columns at some rows (a slice, a mask or positions)."""
        return TokenTable(self.token_id[rows], self.prompt[rows], self.position[rows], self.role[rows])


@dataclass(frozen=True)
class TokenBatch:
    """Some prompts of similar length, right-padded, ready for a model.

    Attributes:
        input_ids: vocabulary ids [prompt, token], int64.
        attention_mask: 1 where there is a token [prompt, token], int64.
        roles: a `Role` for every place [prompt, token], uint8; TEMPLATE at padding.
        prompt_index: number of each prompt in its `TokenizedPrompts`.
        lengths: tokens of each prompt.
    """

    input_ids: Int[Tensor, "prompt token"]
    attention_mask: Int[Tensor, "prompt token"]
    roles: UInt8[Tensor, "prompt token"]
    prompt_index: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of_rows(cls, rows: Sequence[Int[np.ndarray, " _"]], pad_id: int, device: torch.device) -> TokenBatch:
        """Token ids of one length each as a batch, numbered in this order; nobody's roles are told."""
        lengths = tuple(len(row) for row in rows)
        ids = np.full((len(rows), max(lengths)), pad_id, np.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
        mask = torch.from_numpy((np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64))
        tokens = torch.from_numpy(ids)
        roles = torch.zeros_like(tokens, dtype=torch.uint8)
        return cls(tokens.to(device), mask.to(device), roles.to(device), tuple(range(len(rows))), lengths)

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments for `model(**batch.inputs())`."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def mask(self) -> Bool[Tensor, "prompt token"]:
        """True where there is a token."""
        return self.attention_mask.bool()


@dataclass(frozen=True)
class TokenSelection:
    """Which tokens are kept.

    Attributes:
        roles: speakers to keep, or None for all tokens, template included.
        skip_first: tokens left out at the start of every prompt: the first one is an attention sink whose
            activations dwarf all others.
        max_norm_ratio: tokens whose norm at a site is above this many times the site's median are left out, on all
            sides of a pair if on any; None keeps them. (Qwen's sinks exceed 100 times the median.)
    """

    roles: frozenset[Role] | None = None
    skip_first: int = 1
    max_norm_ratio: float | None = 10.0

    def __post_init__(self) -> None:
        if self.skip_first < 0:
            raise InputError(f"Expected skip_first of at least 0, got {self.skip_first}. Pass 0 to keep all tokens.")
        if self.max_norm_ratio is not None and not self.max_norm_ratio > 1:
            raise InputError(f"Expected max_norm_ratio above 1 or None, got {self.max_norm_ratio}. Try 10.")
        if self.roles is not None and not self.roles:
            raise InputError("Expected roles to keep, got an empty set. Pass None to keep every role.")

    def positions(self, roles: np.ndarray) -> np.ndarray:
        """Positions of one prompt that are kept by role and place [token]; norms are judged after the capture."""
        kept = np.ones(len(roles), bool) if self.roles is None else np.isin(roles, [int(role) for role in self.roles])
        kept[: self.skip_first] = False
        return np.flatnonzero(kept)

    def to_json(self) -> dict[str, Any]:
        """JSON values, for headers and comparisons."""
        roles = None if self.roles is None else sorted(role.name.lower() for role in self.roles)
        return {"roles": roles, "skip_first": self.skip_first, "max_norm_ratio": self.max_norm_ratio}


@dataclass(frozen=True)
class Encoded:
    """Prompts as token ids and roles; the fields are those of `TokenizedPrompts`."""

    input_ids: tuple[np.ndarray, ...]
    roles: tuple[np.ndarray, ...]
    ends: tuple[np.ndarray, ...]
    truncated: tuple[str, ...]
    notes: tuple[str, ...]


def encode(prompts: Sequence[Prompt], tokenizer: Any, *, max_length: int, add_generation_prompt: bool) -> Encoded:
    """Renders and tokenises prompts; see `PromptSet.tokenize`, its public door."""
    if max_length < 1:
        raise PromptError(f"Expected a maximum length of at least 1 token, got {max_length}. Pass a larger one.")
    renderer = ChatRenderer(tokenizer, add_generation_prompt=add_generation_prompt)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    input_ids: list[np.ndarray] = []
    roles: list[np.ndarray] = []
    ends: list[np.ndarray] = []
    notes: Counter[str] = Counter()
    for at in range(0, len(prompts), _TEXTS_AT_ONCE):
        some = prompts[at : at + _TEXTS_AT_ONCE]
        rendered = [renderer.render(prompt) for prompt in some]
        notes.update(text.note for text in rendered if text.note)
        for prompt, text, (ids, spans) in zip(some, rendered, _encoded(rendered, tokenizer), strict=True):
            input_ids.append(ids)
            roles.append(token_roles(ids, spans, text.char_roles, special))
            ends.append(token_ends(spans, said_positions(prompt, text)))
    truncated = _truncate(prompts, input_ids, roles, max_length)
    ends = [end[: len(ids)] for end, ids in zip(ends, input_ids, strict=True)]
    told = tuple(f"{note} ({count} of {len(prompts)} prompts)" for note, count in notes.items())
    if truncated:
        told += (f"{len(truncated)} of {len(prompts)} prompts were cut at {max_length} tokens",)
    for note in told:
        _logger.warning("%s", note)
    return Encoded(tuple(input_ids), tuple(roles), tuple(ends), truncated, told)


def _encoded(rendered: Sequence[Rendered], tokenizer: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and character spans of every text; one call of the tokenizer for each way of adding special tokens."""
    encoded: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for add_special_tokens in (False, True):
        chosen = [number for number, text in enumerate(rendered) if text.add_special_tokens is add_special_tokens]
        texts = [rendered[number].text for number in chosen]
        encoded.update(zip(chosen, character_spans(texts, tokenizer, add_special_tokens), strict=True))
    return [encoded[number] for number in range(len(rendered))]


def _truncate(
    prompts: Sequence[Prompt], input_ids: list[np.ndarray], roles: list[np.ndarray], max_length: int
) -> tuple[str, ...]:
    """Cuts in place; gives the ids of what was cut, and refuses prompts of which nothing said is left."""
    cut: list[str] = []
    for number, prompt in enumerate(prompts):
        if len(input_ids[number]) == 0:
            raise PromptError(
                f"Expected at least one token, but prompt {prompt.id!r} has none. Remove it or give it a text."
            )
        if len(input_ids[number]) <= max_length:
            continue
        said = roles[number].any()
        input_ids[number], roles[number] = input_ids[number][:max_length], roles[number][:max_length]
        if said and not roles[number].any():
            raise PromptError(
                f"Expected something said within {max_length} tokens, but the template alone fills them in prompt "
                f"{prompt.id!r}: it is truncated to nothing. Raise max_length."
            )
        cut.append(prompt.id)
    return tuple(cut)
