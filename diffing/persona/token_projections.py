"""Where does every single token of these answers lie on persona vectors?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from diffing.checkpoint import LoadedCheckpoint
from diffing.errors import CaptureError, InputError
from diffing.persona.pooling import pooling_mask, tokenize_for
from diffing.persona.vector import PersonaVector
from diffing.prompts import PromptSet
from diffing.tap import Tap


def project_tokens(
    loaded: LoadedCheckpoint,
    prompts: PromptSet,
    vectors: Sequence[PersonaVector],
    *,
    max_length: int = 1024,
    batch_tokens: int = 8192,
    derived_from: str | None = None,
) -> tuple[Float64[np.ndarray, "_ vector"], ...]:
    """Raw projections of each row's answer tokens, in the order of the rows; ends of turns are not among them.

    Args:
        loaded: the model.
        prompts: dialogues that end with an answer.
        vectors: at one or several sites.
        max_length: most tokens of a row.
        batch_tokens: most tokens in one forward.
        derived_from: fingerprint of the checkpoint that a full fine-tune comes from.

    Raises:
        PersonaError: a vector does not fit, or a row has no answer or is too long.
        CaptureError: an activation is not finite.

    Cost: one forward pass, stopped after the deepest site.
    """
    if not vectors:
        raise InputError("Expected at least one persona vector, got none. Name one.")
    for vector in vectors:
        vector.check_fits(loaded, derived_from=derived_from)
    tokens = tokenize_for(loaded, prompts, pooling="response_mean", max_length=max_length)
    sites = list(dict.fromkeys(vector.site for vector in vectors))
    found: list[np.ndarray] = [np.zeros((0, len(vectors)))] * len(prompts)
    device = next(loaded.model.parameters()).device
    with torch.inference_mode(), loaded.active() as model, Tap(model, list(sites), early_exit=True) as tap:
        for batch in tokens.batches(max_tokens=batch_tokens, device=str(device)):
            reads = dict(zip(sites, tap.read(**batch.inputs()), strict=True))
            mask = pooling_mask(batch, "response_mean").cpu()
            values = torch.stack([_along(reads[vector.site], vector) for vector in vectors], dim=2).cpu().double()
            for row, number in enumerate(batch.prompt_index):
                found[number] = values[row][mask[row]].numpy()
                if not np.isfinite(found[number]).all():
                    raise CaptureError(
                        f"Expected finite activations, got NaN or infinity in row {prompts.prompts[number].id}. "
                        "Load the model in float32 or bfloat16."
                    )
    return tuple(found)


def cap_bounds(
    projections: Sequence[Float64[np.ndarray, "_ vector"]], percentile: float, *, fewest: int = 100
) -> tuple[float, ...]:
    """The raw projection below which this share of the calibration tokens lies, for each vector.

    Args:
        projections: of calibration answers, as `project_tokens` gives them.
        percentile: 0 to 100.
        fewest: tokens that are asked for.

    Raises:
        InputError: the percentile is out of range, or too few tokens lie beyond it to know it.
    """
    tokens = np.concatenate(list(projections)) if len(projections) else np.zeros((0, 1))
    beyond = len(tokens) * min(percentile, 100 - percentile) / 100
    if not 0 < percentile < 100 or len(tokens) < fewest or beyond < 5:
        raise InputError(
            f"Expected a percentile between 0 and 100 with at least {fewest} calibration tokens, 5 of them beyond it; "
            f"got {percentile:g} and {len(tokens)} tokens. Give more calibration answers or a milder percentile."
        )
    return tuple(float(one) for one in np.quantile(tokens, percentile / 100, axis=0))


def _along(activations: Tensor, vector: PersonaVector) -> Tensor:
    return activations.float() @ vector.direction.to(activations.device)
