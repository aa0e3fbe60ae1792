"""How do rows' gradients of one block look in its eigenbasis, without ever holding all of them whole?

A row's gradient is kept as its two sides, token by token, each rotated into the basis (cheaper than rotating the
product), and multiplied out only tile by tile: some rows, some of the first axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.blocks import Block, accumulation_dtype
from attribution.recording import RecordedGradients, Sides

_TILE_BYTES = 1 << 20  # a tile is written once and read once or twice: it should stay in the cache


@dataclass(frozen=True, eq=False)
class Basis:
    """The basis of one block's gradient.

    Attributes:
        left: eigenvectors of the first axis `[d0, d0]`, None where that axis stays in its own basis.
        right: eigenvectors of the second axis `[d1, d1]`, None likewise (and for biases, which have one axis).
    """

    left: Tensor | None = None
    right: Tensor | None = None

    def rotate(self, gradients: Float[Tensor, "vector ..."]) -> Float[Tensor, "vector ..."]:
        """Whole gradients into the basis."""
        if self.left is not None and gradients.dim() == 3 and gradients.shape[2] < gradients.shape[1]:
            gradients = (gradients.transpose(1, 2) @ self.left).transpose(1, 2)  # one product for all vectors
        elif self.left is not None:
            gradients = torch.matmul(self.left.T, gradients)
        return gradients if self.right is None else gradients @ self.right

    def rotate_back(self, gradients: Float[Tensor, "vector ..."]) -> Float[Tensor, "vector ..."]:
        """Whole gradients out of the basis."""
        if self.left is not None:
            gradients = torch.matmul(self.left, gradients)
        return gradients if self.right is None else gradients @ self.right.T


@dataclass(frozen=True, eq=False)
class RowGradients:
    """Gradients of one block for some rows, in some basis.

    Attributes:
        shape: of one row's gradient.
        n_rows: how many rows.
        products: uses of a weight, as two sides each.
        whole: `[row, *shape]` for blocks that have no sides.
    """

    shape: tuple[int, ...]
    n_rows: int
    products: tuple[Sides, ...] = ()
    whole: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Memory it holds."""
        sides = sum(part.left.nbytes + part.right.nbytes for part in self.products)
        return sides + (0 if self.whole is None else self.whole.nbytes)

    def empty(self, n: int) -> Tensor:
        """Room for `n` numbers, of the gradients' type and where they are."""
        held = self.products[0].right if self.whole is None and self.products else self.whole
        return torch.empty(n) if held is None else held.new_empty(n)

    def tile(self, rows: slice, span: slice) -> Float[Tensor, "row ..."]:
        """Rows multiplied out, `span` of the first axis only, `[row, span, d1]`."""
        if self.whole is not None:
            return self.whole[rows, span]
        width = len(range(*span.indices(self.shape[0])))
        dense: Tensor | None = None
        for sides in self.products:
            right = sides.right[rows]
            if sides.one_hot:
                dense = right.new_zeros(len(right), width, self.shape[1]) if dense is None else dense
                _add_one_hot(dense, sides.left[rows], right, span.start or 0)
            else:
                left = sides.left[rows, :, span].transpose(1, 2)
                dense = torch.bmm(left, right) if dense is None else dense.baddbmm_(left, right)
        if dense is None:
            some = range(*rows.indices(self.n_rows))
            return torch.zeros(len(some), width, *self.shape[1:])
        return dense

    def tile_into(self, out: Float[Tensor, "row span ..."], rows: slice, span: slice) -> None:
        """`tile`, written where it is wanted."""
        if self.whole is not None or not self.products:
            out.copy_(self.tile(rows, span))
            return
        for number, sides in enumerate(self.products):
            if sides.one_hot:
                if number == 0:
                    out.zero_()
                _add_one_hot(out, sides.left[rows], sides.right[rows], span.start or 0)
                continue
            left = sides.left[rows, :, span].transpose(1, 2)
            if number == 0:
                torch.bmm(left, sides.right[rows], out=out)
            else:
                out.baddbmm_(left, sides.right[rows])

    def tiles(self, n_rows: int | None = None) -> Iterator[tuple[slice, slice]]:
        """(rows, span) pairs that cover everything within a cache-sized budget each."""
        yield from tiles(self.n_rows if n_rows is None else n_rows, self.shape)


def tiles(n_rows: int, shape: tuple[int, ...], budget: int = _TILE_BYTES) -> Iterator[tuple[slice, slice]]:
    """Cuts `[n_rows, *shape]` into blocks of at most `budget` bytes, whole along the last axis."""
    line = 4 * (shape[1] if len(shape) > 1 else 1)
    for extra in shape[2:]:
        line *= extra
    span = max(min(budget // line, shape[0]), 1)
    rows = max(budget // (line * span), 1)
    for start in range(0, shape[0], span):
        for first in range(0, n_rows, rows):
            yield slice(first, min(first + rows, n_rows)), slice(start, min(start + span, shape[0]))


class Rotator:
    """Rotates what one batch recorded; modules that share an input and a basis share the product.

    Args:
        recorded: one batch.
        by_token: keep tokens apart, also where the product of a row is smaller than its tokens.
    """

    def __init__(self, recorded: RecordedGradients, *, by_token: bool = False) -> None:
        self._recorded = recorded
        self._by_token = by_token
        self._rotated: dict[tuple[int, int, tuple[int, ...]], tuple[Tensor, Tensor]] = {}

    def gradients(self, block: Block, basis: Basis) -> RowGradients:
        """This block's gradients in `basis`, fp32 or better."""
        n_rows = self._recorded.n_rows
        if not block.has_sides:
            whole = self._recorded.gradient(block)
            return RowGradients(block.shape, n_rows, whole=basis.rotate(whole))
        sides = self._recorded.sides(block)
        if not self._by_token and _product_first(block.shape, basis, sides):
            return RowGradients(block.shape, n_rows, whole=basis.rotate(self._recorded.gradient(block)))
        dtype = accumulation_dtype(block)
        products = tuple(
            Sides(
                side.left if side.one_hot else self._rotate(side.left, basis.left, dtype, side.source),
                self._rotate(side.right, basis.right, dtype, side.source),
                side.source,
            )
            for side in sides
        )
        return RowGradients(block.shape, n_rows, products)

    def take(self, blocks: Sequence[Block], bases: Sequence[Basis]) -> tuple[RowGradients, ...]:
        """All blocks' gradients; lets go of what was recorded as it goes, so that not both are ever held whole."""
        last = {id(module): index for index, block in enumerate(blocks) for module in block.modules}
        found = []
        for index, (block, basis) in enumerate(zip(blocks, bases, strict=True)):
            found.append(self.gradients(block, basis))
            done = [module for module in block.modules if last[id(module)] == index]
            if done:
                held = self._recorded.release(done)
                self._rotated = {key: pair for key, pair in self._rotated.items() if key[0] in held}
        return tuple(found)

    def _rotate(self, side: Tensor, basis: Tensor | None, dtype: torch.dtype, source: Tensor) -> Tensor:
        if basis is None:
            return side.to(dtype)
        if side is not source:
            return side.to(dtype) @ basis  # output gradients belong to one module alone
        key = (side.data_ptr(), id(basis), tuple(side.shape))
        if key not in self._rotated:
            # The side itself is kept beside its product, so that its address cannot be given to another tensor.
            self._rotated[key] = (side, side.to(dtype) @ basis)
        return self._rotated[key][1]


def _product_first(shape: tuple[int, ...], basis: Basis, sides: Sequence[Sides]) -> bool:
    """Whether rotating a row's product takes fewer multiplications than rotating its tokens (an adapter's does)."""
    if len(shape) != 2 or any(side.one_hot for side in sides):
        return False
    out, into = (0 if axis is None else width for axis, width in zip((basis.left, basis.right), shape, strict=True))
    tokens = sum(side.right.shape[1] for side in sides)
    return out * out * shape[1] + into * into * shape[0] < tokens * (out * out + into * into)


def _add_one_hot(dense: Tensor, ids: Tensor, right: Tensor, start: int) -> None:
    width = dense.shape[1]
    row, token = ((ids >= start) & (ids < start + width)).nonzero(as_tuple=True)
    dense.flatten(0, 1).index_add_(0, row * width + ids[row, token] - start, right[row, token])
