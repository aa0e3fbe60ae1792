"""Which tokens of this forward pass are changed, in a batch with padding and in a generation from a cache?"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffing.errors import InputError, SiteError
from diffing.site import decoder_layers

TOKENS = ("all", "response")


class EditedTokens:
    """Follows a model's forward passes and says which tokens of the present one are marked.

    A generation reads its prompts in one pass and then one token at a time from a cache, or the growing whole again
    where it has none; positions count from the beginning in both. Padding is never marked where the model is told of
    it (`attention_mask` with a row for each prompt).

    Args:
        where: tokens of the first pass that are marked; those that follow them in a generation are as well. Rows may
            be repeated by the generation (`num_return_sequences`).
        tokens: for None in place of `where`: `all` marks every token; `response` the last token of each left-padded
            prompt, on which the answer's first one is chosen, and every token after it.

    Raises:
        InputError: `tokens` is neither.
    """

    def __init__(self, *, where: Bool[Tensor, "prompt token"] | None = None, tokens: str = "all") -> None:
        if tokens not in TOKENS:
            raise InputError(f"Expected tokens out of {', '.join(TOKENS)}, got {tokens!r}. Use one of these.")
        self._where, self._tokens = where, tokens
        self._forget()

    def _forget(self) -> None:
        self._start, self._n, self._width = 0, 0, 0
        self._ids: Tensor | None = None
        self._real: Tensor | None = None
        self._n_rows, self._fresh = 0, True

    @property
    def fresh(self) -> bool:
        """Whether the present pass begins new sequences, rather than going on with those of the last one."""
        return self._fresh

    @property
    def input_ids(self) -> Int[Tensor, "prompt token"] | None:
        """What the present pass reads; None where it was given embeddings."""
        return self._ids

    def attach(self, model: nn.Module) -> RemovableHandle:
        """Begins to follow the model's passes from the start of a sequence; the caller removes the handle."""
        self._forget()
        return backbone_of(model).register_forward_pre_hook(self._begin, with_kwargs=True)

    def marked(self, value: Shaped[Tensor, "prompt token d_model"]) -> Bool[Tensor, "prompt token"] | None:
        """Which tokens of what a site returned in the present pass are changed; None for every one.

        Raises:
            InputError: the pass has other rows than were marked, or fewer tokens.
        """
        n_rows, n_tokens = value.shape[:2]
        if self._where is not None:
            return self._given(n_rows, n_tokens, value.device)
        real = self._real
        if real is not None and real.shape != (n_rows, n_tokens):
            real = None
        if self._tokens == "all":
            return None if real is None else real.to(value.device)
        position = torch.arange(self._start, self._start + n_tokens, device=value.device)
        marks = (position >= self._width - 1).expand(n_rows, n_tokens)
        return marks if real is None else marks & real.to(value.device)

    def _given(self, n_rows: int, n_tokens: int, device: torch.device) -> Bool[Tensor, "prompt token"]:
        assert self._where is not None
        where = self._where.to(device)
        if n_rows % len(where) or (self._start == 0 and n_tokens < where.shape[1]):
            raise InputError(
                f"Expected a forward of at least {list(where.shape)} as marked, got {[n_rows, n_tokens]}. "
                "Open one intervention for each batch."
            )
        where = where.repeat_interleave(n_rows // len(where), dim=0)[:, self._start : self._start + n_tokens]
        return torch.nn.functional.pad(where, (0, n_tokens - where.shape[1]), value=True)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        if not isinstance(given, Tensor) or given.ndim < 2:
            return
        n_rows, n_tokens = given.shape[:2]
        past = _cached(kwargs)
        if past is None:
            # A cache that does not say its length: a pass of one token goes on where the last one ended.
            past = self._start + self._n if n_tokens == 1 and n_rows == self._n_rows else 0
        if past and n_tokens > 1 and self._where is None and self._tokens == "response":
            raise InputError(
                f"Expected prompts that are read in one pass, got {n_tokens} tokens after {past} cached ones. "
                "Mark the tokens yourself (where=…)."
            )
        ids = given if given.ndim == 2 else None
        self._fresh = past == 0 and not self._grows(ids)
        if self._fresh:
            self._width = n_tokens
        self._start, self._n, self._n_rows, self._ids = past, n_tokens, n_rows, ids
        self._real = _real_tokens(kwargs.get("attention_mask"), n_rows, past, n_tokens)

    def _grows(self, ids: Tensor | None) -> bool:
        """Whether a pass from the beginning is a generation without a cache, one token further than the last pass."""
        last = self._ids
        if ids is None or last is None or len(ids) != len(last) or ids.shape[1] != last.shape[1] + 1:
            return False
        return bool(torch.equal(ids[:, :-1], last))


def backbone_of(model: nn.Module) -> nn.Module:
    """The module that runs the decoder blocks and is told of ids, mask and cache; the model itself where none does."""
    try:
        first = decoder_layers(model)[0]
    except SiteError:
        return model
    for _, module in model.named_modules():
        if any(isinstance(child, nn.ModuleList) and first in list(child) for child in module.children()):
            return module
    return model


def _cached(kwargs: dict[str, Any]) -> int | None:
    """Tokens read in earlier passes of this sequence; None where a cache is there that does not say."""
    cache: Any = kwargs.get("past_key_values")
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    if isinstance(cache, tuple | list) and cache:
        return int(cache[0][0].shape[-2])
    return 0 if kwargs.get("cache_params") is None else None


def _real_tokens(mask: Any, n_rows: int, start: int, n_tokens: int) -> Bool[Tensor, "prompt token"] | None:
    if not isinstance(mask, Tensor) or mask.shape != (n_rows, start + n_tokens):
        return None
    return mask[:, start:].bool()
