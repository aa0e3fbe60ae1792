"""How is a query's gradient kept so small that every row of a training step can be held against it in passing?

A query's gradient Q `[d_out, d_in]` with respect to one weight meets a row's gradient G = sum_t g_t a_t^T only in the
inner product <Q, G> = sum_t g_t^T Q a_t. With Q ~ left core right^T the tokens are first led into a few coordinates,
`right^T a_t` and `left^T g_t`, and the product is taken there: T k (d_out + d_in) multiplications and not T d_out d_in.
Several queries share one pair of bases and differ in their cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

NARROW = 32  # the shorter side of a matrix that is kept whole for several queries: bases would save nothing
_OVERSAMPLING = 8
_POWER_ITERATIONS = 2


@dataclass(frozen=True, eq=False)
class QueryFactors:
    """Gradients of several queries with respect to one weight, in shared bases.

    Attributes:
        left: `[d_out, k_out]`, None where output gradients are taken as they are.
        right: `[d_in, k_in]`, None where inputs are taken as they are.
        core: `[query, k_out, k_in]`; None for one query whose core is the identity (k_out = k_in).
        scale: what the product is to be multiplied by; keeps the bases near one, so that half precision holds them.
        features: which output features `left` speaks of, where all others are zero in every query; None: all.
        n_queries: how many.
        kept: `[query]`, share of each query's squared norm that the factors hold, 0 to 1.
    """

    left: Float[Tensor, "d_out k_out"] | None
    right: Float[Tensor, "d_in k_in"] | None
    core: Float[Tensor, "query k_out k_in"] | None
    scale: float
    features: Tensor | None
    n_queries: int
    kept: Float[Tensor, " query"]

    def dense(self, d_out: int, d_in: int) -> Float[Tensor, "query d_out d_in"]:
        """The matrices that the factors stand for; for tests and for a look."""
        left, right, found = self.left, self.right, self.core
        if found is None:
            found = (left @ right.T if left is not None and right is not None else _whole(left, right))[None]
        else:
            found = found if left is None else left @ found
            found = found if right is None else found @ right.T
        found = found * self.scale
        if self.features is None:
            return found
        whole = found.new_zeros(self.n_queries, d_out, d_in)
        whole[:, self.features] = found
        return whole


@dataclass(frozen=True, eq=False)
class Skinny:
    """One query's gradient as a product `left right^T`, with the squared norm of what it stands for."""

    left: Float[Tensor, "d_out k"] | None  # None: the identity
    right: Float[Tensor, "d_in k"] | None
    square: float


def shrink(matrix: Float[Tensor, "d_out d_in"], rank: int, generator: torch.Generator) -> Skinny:
    """The best product of at most `rank` columns for one matrix; exact where that is no dearer.

    Randomised range finder with two power iterations (Halko, Martinsson & Tropp 2011); the random test matrix comes
    from `generator` (CPU), so that the result is the same wherever it is made.
    """
    d_out, d_in = matrix.shape
    square = float(torch.linalg.vector_norm(matrix)) ** 2
    if min(d_out, d_in) <= rank or rank * (d_out + d_in) >= d_out * d_in:
        return Skinny(None, matrix.T, square) if d_out <= d_in else Skinny(matrix, None, square)
    width = min(rank + _OVERSAMPLING, d_out, d_in)
    test = torch.randn(d_in, width, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(matrix @ test).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    small_left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return Skinny((basis @ small_left)[:, :rank], right[:rank].T * values[:rank], square)


def join(parts: Sequence[Skinny], rank: int, features: Tensor | None = None) -> QueryFactors:
    """One pair of bases for all queries.

    Args:
        parts: one a query, all of one weight.
        rank: most columns of a basis.
        features: which output features the parts speak of.
    """
    if len(parts) == 1:
        return _single(parts[0], features)
    if all(part.left is None or part.right is None for part in parts):
        matrices = torch.stack([_whole(part.left, part.right) for part in parts])
        if min(matrices.shape[1:]) <= NARROW:
            size = float(matrices.abs().max()) or 1.0
            return QueryFactors(None, None, matrices / size, size, features, len(parts), matrices.new_ones(len(parts)))
    left = _basis([_columns(part.left, part.right) for part in parts], rank)
    right = _basis([_columns(part.right, part.left) for part in parts], rank)
    core = torch.stack([_core(left, right, part) for part in parts])
    size = float(core.abs().max()) or 1.0
    squares = torch.tensor([part.square for part in parts], dtype=core.dtype, device=core.device)
    kept = torch.where(squares > 0, core.square().sum(dim=(1, 2)) / squares, 1.0)
    return QueryFactors(left, right, core / size, size, features, len(parts), kept)


def multiplications(factors: QueryFactors, d_out: int, d_in: int) -> int:
    """Multiplications a token that the factors cost; d_out d_in a query is what the whole matrix would."""
    k_out = d_out if factors.left is None else factors.left.shape[1]
    k_in = d_in if factors.right is None else factors.right.shape[1]
    sides = (0 if factors.left is None else d_out * k_out) + (0 if factors.right is None else d_in * k_in)
    return sides + (k_out if factors.core is None else k_out * k_in)


def _single(part: Skinny, features: Tensor | None) -> QueryFactors:
    # Of two sides the right one carries the sizes; the left one's columns are then orthonormal.
    left, right = part.left, part.right
    sized = left if right is None else right
    assert sized is not None
    size = float(sized.abs().max()) or 1.0
    held = float(torch.linalg.vector_norm(sized)) ** 2
    kept = sized.new_tensor([held / part.square if part.square else 1.0])
    if right is None:
        return QueryFactors(sized / size, None, None, size, features, 1, kept)
    return QueryFactors(left, sized / size, None, size, features, 1, kept)


def _whole(left: Tensor | None, right: Tensor | None) -> Tensor:
    """The product of which one side is the identity."""
    found = left if right is None else right.T
    assert found is not None
    return found


def _columns(side: Tensor | None, other: Tensor | None) -> Tensor:
    """Columns that span one side of a product, each as long as the product is in its direction."""
    if side is None:
        assert other is not None
        return other.T
    # left right^T has the columns of left, weighted by the triangular factor of right.
    return side if other is None else side @ torch.linalg.qr(other).R.T


def _basis(sides: Sequence[Tensor], rank: int) -> Tensor | None:
    if sides[0].shape[0] <= rank:
        return None
    return torch.linalg.svd(torch.cat(list(sides), dim=1), full_matrices=False).U[:, :rank].contiguous()


def _core(left_basis: Tensor | None, right_basis: Tensor | None, part: Skinny) -> Tensor:
    left, right = _within(left_basis, part.left), _within(right_basis, part.right)
    if left is None or right is None:
        return _whole(left, right)
    return left @ right.T


def _within(basis: Tensor | None, side: Tensor | None) -> Tensor | None:
    """A side's columns in the basis; None is the identity."""
    if basis is None:
        return side
    return basis.T if side is None else basis.T @ side
