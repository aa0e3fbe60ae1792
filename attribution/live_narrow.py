"""How are all queries held at once against gradients that are small enough to be written out, as an adapter's are?

One product of both sides a module gives every row's gradient `[row, short, long]`, in the backward pass alone; at the
step's end comes one with the queries. Nothing is truncated, and a further query costs next to nothing.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.live_pass import Passed
from attribution.query_gradient import WatchedWeight


class NarrowQueries:
    """The queries' gradients towards narrow weights, as matrices."""

    def __init__(self) -> None:
        self._columns: dict[int, Tensor] = {}

    def clear(self) -> None:
        """Forgets them."""
        self._columns.clear()

    def add(self, weight: WatchedWeight, d_out: int, d_in: int) -> None:
        """One more weight."""
        assert weight.factors is not None
        dense = weight.factors.dense(d_out, d_in)
        self._columns[id(weight)] = (dense if d_out <= d_in else dense.transpose(1, 2)).flatten(1).T.contiguous()

    def multiply(self, passed: Passed) -> None:
        """Turns the rows' gradients that a pass has collected into products with the queries."""
        for place, weight, gradients in passed.narrow:
            columns = self._columns[id(weight)]
            if columns.dtype != gradients.dtype or columns.device != gradients.device:
                columns = self._columns[id(weight)] = columns.to(gradients)
            passed.parts.append((place, weight.group, gradients.flatten(1) @ columns))
        passed.narrow = []


def rows_of(
    output_gradient: Float[Tensor, "row token d_out"], given: Float[Tensor, "row token d_in"]
) -> Float[Tensor, "row short long"]:
    """Each row's gradient of a linear weight, in single precision or better, its shorter side first.

    Few rows times many columns is six times as fast as many rows times few columns.
    """
    short, long = output_gradient, given
    if short.dtype != torch.float32 or long.dtype != torch.float32:
        exact = torch.promote_types(short.dtype, torch.float32)
        short, long = short.to(exact), long.to(exact)
    if short.shape[2] > long.shape[2]:
        short, long = long, short
    return torch.bmm(short.transpose(1, 2), long)
