"""Which way does the model drift at neutral prompts: towards a persona, or elsewhere?

A projection says how far the model went towards a persona, not how much of its way led there: a fine-tune that moves
everything also moves the projection. Two numbers complete it: the length of the whole shift, and its angle to
the persona.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tracker.probes.axes import SiteAxes, site_label
from tracker.signals import DriftSignal

_STILL = 1e-6  # of the reference's own spread: a shift smaller than this has no direction


def drift_reference(sites: Sequence[Float[Tensor, "prompt d_model"]]) -> dict[str, Tensor]:
    """What later activations are held against, site by site: their mean, and how far prompts lie from it."""
    found: dict[str, Tensor] = {}
    for number, rows in enumerate(sites):
        mean = rows.double().mean(dim=0)
        found[f"mean{number}"] = mean.float()
        found[f"spread{number}"] = (rows.double() - mean).square().sum(dim=1).mean().sqrt().float()
    return found


def mean_shifts(
    sites: Sequence[Float[Tensor, "prompt d_model"]], reference: Mapping[str, Tensor]
) -> list[Float[Tensor, " d_model"]]:
    """The mean shift of every site since the reference, float64, raw units."""
    return [rows.double().mean(dim=0) - reference[f"mean{number}"].double() for number, rows in enumerate(sites)]


def drift_signals(
    axes: Sequence[SiteAxes],
    sites: Sequence[Float[Tensor, "prompt d_model"]],
    reference: Mapping[str, Tensor],
    step: int,
    label: str,
) -> list[DriftSignal]:
    """Length and direction of the mean shift, site by site.

    `drift/<place>/norm` is its length relative to the spread of the reference's prompts around their mean.
    `persona/<trait>/<place>/cosine` is its cosine with the persona's direction, -1 to 1; positive: towards the trait;
    random directions have about 1 / sqrt(d_model). It is not measured while nothing has moved. Neither has an
    interval.

    Args:
        axes: personas by site.
        sites: activations of the last prompt token now, one tensor a site.
        reference: from `drift_reference`.
        step: optimizer steps done.
        label: what the reference was measured on.
    """
    signals = []
    for number, (one, shift) in enumerate(zip(axes, mean_shifts(sites, reference), strict=True)):
        length, spread = float(shift.norm()), float(reference[f"spread{number}"])
        relative = length / spread if spread > 0 else math.nan
        n = len(sites[number])
        name = f"drift/{site_label(one.site)}/norm"
        signals.append(DriftSignal(name, relative, step, "relative", n=n, reference=label))
        if not relative > _STILL:
            continue
        for name, vector in zip(one.names("cosine"), one.vectors, strict=True):
            cosine = float(torch.dot(shift, vector.direction.double())) / length
            signals.append(DriftSignal(name, cosine, step, "cosine", n=n, reference=label))
    return signals
