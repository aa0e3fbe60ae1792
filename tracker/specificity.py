"""Did the model go this way, or did it merely move? A drift towards a persona beside random directions and styles.

Random directions are drawn inside the cloud of the model's own activations (random sums of the prompts' deviations
from their mean), not on the whole sphere: activations live in few directions, and a fine-tune that moves anything moves
those. A direction of the sphere is left almost untouched, and would make every drift look special.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffing.persona import PersonaVector

# Traits of manner: a fine-tune that changes the tone moves them, and nobody needs to be woken for it.
STYLES = ("optimism", "humour", "formality", "concision")
N_RANDOM = 200
_SHOWN = 40


@dataclass(frozen=True)
class Specificity:
    """One drift beside others at the same place and moment.

    Attributes:
        trait: whose direction the alert is about.
        drift: mean shift along it, in gaps of its vector; positive: towards the trait.
        n_random: random directions of the same length that it was held against.
        n_as_far: how many of them the model moved along at least as far, to either side.
        p_value: `(n_as_far + 1) / (n_random + 1)`, how often a random direction does as well.
        random_median: median size of the shift along a random direction, same unit.
        random_high: 95th percentile of it.
        random_shown: some of the random shifts with their sign, for a drawing.
        cosine: of the whole shift with the trait's direction, -1 to 1.
        traits: other traits read at the same place: mean shift along each, in gaps of its own vector.
        n_prompts: probe prompts behind every figure.
    """

    trait: str
    drift: float
    n_random: int
    n_as_far: int
    p_value: float
    random_median: float
    random_high: float
    random_shown: tuple[float, ...]
    cosine: float
    traits: Mapping[str, float]
    n_prompts: int

    @property
    def styles(self) -> dict[str, float]:
        """Those of the other traits that are manners of speaking."""
        return {name: value for name, value in self.traits.items() if name in STYLES}

    @property
    def specific(self) -> bool:
        """Further than 95 % of random directions, and further than every style read beside it."""
        return self.p_value <= 0.05 and all(abs(self.drift) > abs(value) for value in self.styles.values())

    def to_evidence(self) -> dict[str, Any]:
        """JSON values for an alert's evidence."""
        kept = {name: value for name, value in asdict(self).items() if name != "random_shown"}
        return {**kept, "specific": self.specific}


def measure_specificity(
    shift: Float[Tensor, " d_model"],
    rows: Float[Tensor, "prompt d_model"],
    vector: PersonaVector,
    others: Sequence[PersonaVector] = (),
    *,
    n_random: int = N_RANDOM,
    seed: int = 0,
) -> Specificity:
    """Holds one drift against random directions and other traits.

    Args:
        shift: mean activation now less that at the reference, raw units.
        rows: activations of the probe prompts, whose cloud the random directions are drawn from.
        vector: the trait's.
        others: vectors of other traits at the same place.
        n_random: 20 at the least; the smallest p-value is `1 / (n_random + 1)`.
        seed: of the random directions.

    Cost: products `[n_random, prompt] x [prompt, d_model]`.
    """
    moved = shift.detach().double().cpu()
    random = moved @ random_directions(rows, n_random, seed=seed).T / vector.scale
    drift = float(moved @ vector.direction.double()) / vector.scale
    sizes = random.abs().numpy()
    n_as_far = int((sizes >= abs(drift)).sum())
    length = float(moved.norm())
    return Specificity(
        trait=vector.trait,
        drift=drift,
        n_random=n_random,
        n_as_far=n_as_far,
        p_value=(n_as_far + 1) / (n_random + 1),
        random_median=float(np.median(sizes)),
        random_high=float(np.quantile(sizes, 0.95)),
        random_shown=tuple(float(value) for value in random[:_SHOWN]),
        cosine=drift * vector.scale / length if length > 0 else 0.0,
        traits={one.trait: float(moved @ one.direction.double()) / one.scale for one in others},
        n_prompts=len(rows),
    )


def random_directions(
    rows: Float[Tensor, "prompt d_model"], n: int, *, seed: int = 0
) -> Float[Tensor, "direction d_model"]:
    """Unit directions drawn in proportion to how the activations vary; from the sphere where they do not."""
    generator = torch.Generator().manual_seed(seed)
    points = rows.detach().double().cpu()
    points = points - points.mean(dim=0)
    mixed = torch.randn(n, len(points), generator=generator, dtype=torch.float64) @ points
    if not float(mixed.norm()) > 0:
        mixed = torch.randn(n, points.shape[1], generator=generator, dtype=torch.float64)
    return mixed / mixed.norm(dim=1, keepdim=True)
