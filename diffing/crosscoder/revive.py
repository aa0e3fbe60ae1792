"""Which unexplained directions should idle latents take over?"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# A residual that resembles no other is chance; rare features come in pairs.
_FEWEST = 2


def find_missing_directions(
    residuals: Float[Tensor, "row width"], n: int, *, alike: float = 0.5
) -> tuple[Float[Tensor, "direction width"], Float[Tensor, " direction"]]:
    """At most n unit directions that several of the residuals have in common, most shared first.

    Greedy: the residual whose direction explains most of all others leads a group, the group's weighted mean is the
    direction, and its members lead no further group. Cost: one product row · row · width.

    Args:
        residuals: what is left of tokens.
        n: directions wanted.
        alike: cosine from which two residuals are taken to miss the same feature.

    Returns:
        The directions, and how far the residuals of each group reach along theirs on average.
    """
    norms = residuals.norm(dim=1)
    residuals = residuals[norms > 0]
    unit = residuals / residuals.norm(dim=1, keepdim=True)
    cosine = unit @ unit.T
    same = cosine >= alike
    # What the direction of row i explains of the rows like it: their projections, squared.
    gains = (torch.where(same, cosine, 0.0) * residuals.norm(dim=1)).square().sum(dim=1)
    free = same.sum(dim=1) >= _FEWEST
    directions, lengths = [residuals.new_zeros(0, residuals.shape[1])], [residuals.new_zeros(0)]
    while len(directions) <= n and bool(free.any()):
        leader = int(torch.where(free, gains, -1.0).argmax())
        members = residuals[same[leader]]
        direction = (cosine[leader, same[leader], None] * members).sum(dim=0, keepdim=True)
        direction = direction / direction.norm()
        directions.append(direction)
        lengths.append((members @ direction[0]).mean(dim=0, keepdim=True))
        free &= ~same[leader]
    return torch.cat(directions), torch.cat(lengths)
