"""What would the model itself have answered to a training row's prompt?"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from diffing.answer_cache import AnswerCache
from diffing.answers import AnswerSettings, stream_answers
from diffing.checkpoint import LoadedCheckpoint
from diffing.prompts import TokenizedPrompts

Progress = Callable[[int, int], None]


def own_answers(
    loaded: LoadedCheckpoint,
    prompts: TokenizedPrompts,
    settings: AnswerSettings,
    *,
    cache: Path | str | None = None,
    progress: Progress | None = None,
) -> tuple[tuple[Int[np.ndarray, " _"], ...], ...]:
    """The model's own answers, without end marks: for every prompt `settings.samples` of them.

    Args:
        loaded: the model.
        prompts: rendered up to where the answer begins.
        settings: how to draw.
        cache: a file in which every answer is kept as soon as it is drawn: a run that was stopped goes on there, and
            another run with the same model, prompts and settings draws nothing. None keeps nothing.
        progress: called with answers there and answers in all.

    Raises:
        InputError: the cache is another file.
    """
    kept = AnswerCache(cache)
    with contextlib.closing(kept):
        keys = [_key(loaded, ids, prompts, number, settings) for number, ids in enumerate(prompts.input_ids)]
        found: dict[tuple[int, int], np.ndarray] = {}
        for number, key in enumerate(keys):
            for sample in range(settings.samples):
                known = kept.get(f"{key}-{sample}")
                if known is not None:
                    found[number, sample] = np.array(known, np.int64)
        total = len(prompts) * settings.samples
        for answer in stream_answers(loaded, prompts, settings, skip=lambda *pair: pair in found):
            said = answer.token_ids[:-1] if answer.finished else answer.token_ids
            kept.put(f"{keys[answer.prompt]}-{answer.sample}", loaded.fingerprint, said.tolist())
            found[answer.prompt, answer.sample] = said
            if progress is not None:
                progress(len(found), total)
    return tuple(tuple(found[number, sample] for sample in range(settings.samples)) for number in range(len(prompts)))


def _key(
    loaded: LoadedCheckpoint, ids: np.ndarray, prompts: TokenizedPrompts, number: int, settings: AnswerSettings
) -> str:
    """Of all that an answer depends on: weights, tokens, noise; the batch is no part of it."""
    draw: dict[str, Any] = {name: value for name, value in asdict(settings).items() if name not in _NO_MATTER}
    # Noise goes by the prompt's name, so at a temperature the name is part of what was asked.
    name = prompts.prompts.prompts[number].id if settings.temperature else ""
    asked = json.dumps([loaded.fingerprint, ids.tolist(), name, draw], sort_keys=True)
    return hashlib.sha256(asked.encode()).hexdigest()


_NO_MATTER = ("batch_size", "samples")
