"""Which persona directions are read at which module of this model?"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffing.errors import PersonaError
from diffing.persona import PersonaVector
from diffing.site import ResolvedSite, resolve_site


@dataclass(frozen=True, eq=False)
class SiteAxes:
    """All personas read at one site, stacked so that one product reads them all.

    Attributes:
        site: the module and its resolved name.
        vectors: one a column.
        directions: `[d_model, axis]`, float32, on the module's device, each column a unit direction over its scale:
            a product with it is in gaps.
        origins: `[axis]`, the mean plain answer of each vector in gaps, 0 where it was not averaged over answers.
    """

    site: ResolvedSite
    vectors: tuple[PersonaVector, ...]
    directions: Float[Tensor, "d_model axis"]
    origins: Float[Tensor, " axis"]

    def names(self, kind: str) -> list[str]:
        """Signal names, one a column: `persona/<trait>/L<k>/<kind>`."""
        return [f"persona/{_safe(vector.trait)}/{site_label(self.site)}/{kind}" for vector in self.vectors]


def group_axes(model: nn.Module, vectors: Sequence[PersonaVector]) -> tuple[SiteAxes, ...]:
    """Groups persona vectors by site, shallowest first; within a site in the order given.

    Raises:
        PersonaError: a vector does not fit the model, or two would report under one name.
        SiteError: the model has no such site.
    """
    found: dict[str, tuple[ResolvedSite, list[PersonaVector]]] = {}
    for vector in vectors:
        vector.check_fits(model)
        site = resolve_site(model, vector.site)
        found.setdefault(site.path, (site, []))[1].append(vector)
    ordered = sorted(found.values(), key=lambda group: (group[0].layer is None, group[0].layer or 0, group[0].path))
    axes = tuple(_stack(site, tuple(group)) for site, group in ordered)
    names = [name for one in axes for name in one.names("prompt")]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PersonaError(
            f"Expected one persona vector a trait and layer, got two for {twice[0].removesuffix('/prompt')}. "
            "Leave one out, or give it another trait name."
        )
    return axes


def has_origin(vector: PersonaVector) -> bool:
    """Whether the vector's mean plain answer is a mean over answer tokens, as training examples are read."""
    return vector.pooling == "response_mean"


def axes_digest(axes: Sequence[SiteAxes]) -> str:
    """SHA-256 over all directions, scales and sites in order."""
    joined = " ".join(vector.digest for one in axes for vector in one.vectors)
    return hashlib.sha256(joined.encode()).hexdigest()


def _stack(site: ResolvedSite, vectors: tuple[PersonaVector, ...]) -> SiteAxes:
    device = next((parameter.device for parameter in site.module.parameters()), torch.device("cpu"))
    columns = [vector.direction.double() / vector.scale for vector in vectors]
    origins = torch.tensor([vector.neutral_mean / vector.scale if has_origin(vector) else 0.0 for vector in vectors])
    return SiteAxes(site, vectors, torch.stack(columns, dim=1).float().to(device), origins.float().to(device))


def site_label(site: ResolvedSite) -> str:
    """A site as signal names have it: `L2` for `resid:2`."""
    stream = site.site.stream
    if site.layer is None:
        return _safe(site.path)
    return f"L{site.layer}" if stream == "resid" else f"{stream}{site.layer}"


def _safe(text: str) -> str:
    # What a metric's name may hold everywhere, MLflow included; `/` would make a level of its own.
    return re.sub(r"[^A-Za-z0-9_.\-]", "_", text)
