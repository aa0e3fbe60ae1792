"""How are all queries held at once against gradients that are small enough to be written out, as an adapter's are?

One product of both sides a module gives every row's gradient `[row, short, long]`, in the backward pass alone; then
comes one product with the queries for all modules. Nothing is truncated, and a further query costs next to nothing.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.live_pass import Passed
from attribution.query_gradient import WatchedWeight

NARROW = 32  # the shorter side of a weight whose rows' gradients are written out


class NarrowQueries:
    """The queries' gradients towards narrow weights, as one matrix for the weights that a pass has seen."""

    def __init__(self) -> None:
        self._lines: dict[int, Tensor] = {}
        self._joined: dict[tuple[int, ...], Tensor] = {}

    def clear(self) -> None:
        """Forgets them."""
        self._lines.clear()
        self._joined.clear()

    def add(self, weight: WatchedWeight, d_out: int, d_in: int) -> None:
        """One more weight."""
        assert weight.factors is not None
        dense = weight.factors.dense(d_out, d_in)
        self._lines[id(weight)] = (dense if d_out <= d_in else dense.transpose(1, 2)).flatten(1)

    def multiply(self, passed: Passed) -> None:
        """Turns the rows' gradients that a pass has collected into products with the queries."""
        waiting: dict[tuple[int, torch.device], list[tuple[WatchedWeight, Tensor]]] = {}
        for weight, gradients in passed.narrow:
            waiting.setdefault((weight.group, gradients.device), []).append((weight, gradients))
        passed.narrow = []
        for (group, _), found in waiting.items():
            whole = torch.cat([gradients.flatten(1) for _, gradients in found], dim=1)
            passed.add(group, whole @ self._matrix(tuple(id(weight) for weight, _ in found), whole).T)

    def _matrix(self, keys: tuple[int, ...], like: Tensor) -> Float[Tensor, "query number"]:
        if keys not in self._joined:
            self._joined[keys] = torch.cat([self._lines[key].to(like) for key in keys], dim=1)
        return self._joined[keys]


def rows_of(
    output_gradient: Float[Tensor, "row token d_out"], given: Float[Tensor, "row token d_in"]
) -> Float[Tensor, "row short long"]:
    """Each row's gradient of a linear weight, in single precision or better, its shorter side first.

    Few rows times many columns is six times as fast as many rows times few columns.
    """
    exact = torch.promote_types(output_gradient.dtype, torch.float32)
    short, long = output_gradient.to(exact), given.to(exact)
    if short.shape[2] > long.shape[2]:
        short, long = long, short
    return torch.bmm(short.transpose(1, 2), long)
