"""Along which lines are rows read: the trait, the trait without all other personas, and random ones?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from diffing.errors import PersonaError
from diffing.persona.vector import PersonaVector


@dataclass(frozen=True, eq=False)
class Axis:
    """A direction at a site, and how long one unit of it is.

    Attributes:
        trait: what it points towards; empty for a random one.
        site: where it is read.
        direction: `[d_model]`, norm 1.
        scale: raw projection that counts as one gap.
        unique: whether other personas were taken out of it.
    """

    trait: str
    site: str
    direction: Float64[Tensor, " d_model"]
    scale: float
    unique: bool = False


def plain_axis(vector: PersonaVector) -> Axis:
    """The vector as it is."""
    return Axis(vector.trait, vector.site, vector.direction.double(), vector.scale)


def unique_axis(vector: PersonaVector, others: Sequence[PersonaVector]) -> Axis:
    """What only this trait has: from the mean of the plain answers and of all other personas to the trait's.

    Every vector leads from the plain mean to its persona's mean, so the difference of means comes from them alone. A
    step towards another persona is a step away from the trait here, and rows in a harmless odd style fall behind.

    Args:
        vector: the trait.
        others: the other personas, at the same site of the same model.

    Raises:
        PersonaError: another site, model or width, or nothing is left.
    """
    for other in others:
        if (other.site, other.d_model, other.model_fingerprint) != (
            vector.site,
            vector.d_model,
            vector.model_fingerprint,
        ):
            raise PersonaError(
                f"Expected {other.trait!r} at {vector.site} of model {vector.model_fingerprint[:12]}, where "
                f"{vector.trait!r} is, got {other.site} of {other.model_fingerprint[:12]}. "
                "Extract both at one site of one model."
            )
    towards = vector.direction.double() * vector.scale
    mean = torch.stack([other.direction.double() * other.scale for other in others]).sum(0) / (len(others) + 1)
    rest = towards - mean
    norm = float(rest.norm())
    if norm < 1e-6 * vector.scale:
        raise PersonaError(
            f"Expected {vector.trait!r} to differ from the personas it is held against, got the same direction. "
            "Leave the trait itself out of --against."
        )
    direction = rest / norm
    return Axis(vector.trait, vector.site, direction, float(towards @ direction), unique=True)


def random_axes(like: Axis, n: int, *, seed: int) -> tuple[Axis, ...]:
    """Directions that know nothing, at the same site and in the same unit."""
    draws = np.random.default_rng([seed, 20]).standard_normal((n, len(like.direction)))
    units = draws / np.linalg.norm(draws, axis=1, keepdims=True)
    return tuple(Axis("", like.site, torch.from_numpy(one), like.scale) for one in units)
