"""What do the curvature's factors add up to over the training rows? Sums that stream, merge and survive a kill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.blocks import Block, accumulation_dtype
from attribution.recording import RecordedGradients
from attribution.rotation import Basis, Rotator, RowGradients

# Above this width one side's covariance (width^2 numbers) costs more than it tells: that side keeps its own basis
# and its diagonal. The vocabulary's side of a head is the usual case.
LARGEST_FACTOR = 4096
_HALVED_FROM = 256
_DOUBLE_UP_TO = 2048  # wider covariances are summed in single precision: half the memory


@dataclass(frozen=True)
class _Side:
    """One axis of one block."""

    block: int
    axis: int


class CovarianceSums:
    """Sums of a a^T and g g^T over live tokens, block by block; modules with the same input share one sum.

    Attributes:
        n_rows: rows summed so far.
        n_tokens: live tokens summed so far, of each block's uses.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = list(blocks)
        self._totals: dict[_Side, Tensor] = {}
        self._owner: dict[_Side, _Side] = {}
        self._inputs_axis: dict[int, int] = {}
        self.n_rows = 0
        self.n_tokens = 0

    def update(self, recorded: RecordedGradients) -> None:
        """Adds one batch."""
        seen: dict[tuple[int, tuple[int, ...]], _Side] = {}
        live = None if recorded.live is None else recorded.live.flatten()
        for index, block in enumerate(self._blocks):
            if not block.has_sides:
                continue
            products = recorded.sides(block)
            # An embedding's one-hot side is its own eigenbasis; a head tied to it then keeps that axis as it is.
            first = 1 if any(product.one_hot for product in products) else 0
            for product in products:
                self._inputs_axis[index] = 0 if product.left is product.source else 1
                for axis, side in list(enumerate((product.left, product.right)))[first:]:
                    if side.shape[-1] <= LARGEST_FACTOR:
                        self._add(_Side(index, axis), side, product.left, product.source, live, seen, len(products))
        self.n_rows += recorded.n_rows
        self.n_tokens += 0 if live is None else int(live.sum())

    def _add(
        self,
        here: _Side,
        side: Tensor,
        left: Tensor,
        source: Tensor,
        live: Tensor | None,
        seen: dict[tuple[int, tuple[int, ...]], _Side],
        n_uses: int,
    ) -> None:
        """Adds one side's covariance to its owner's total, once however many modules share it."""
        if side is source and n_uses == 1:
            key = (side.data_ptr(), tuple(side.shape))
            owner = self._owner.setdefault(here, seen.setdefault(key, here))
            if owner != here:
                return
        else:
            self._owner.setdefault(here, here)
        flat = side.flatten(0, -2)
        if side is source and live is not None and len(live) == len(flat):
            # Output gradients are exactly zero where nothing is learned; inputs there must be dropped by hand.
            flat = flat[live]
        flat = flat if flat.dtype == torch.float64 else flat.float()
        product = _square(flat)
        total = self._totals.get(here)
        wanted = torch.float64 if len(product) <= _DOUBLE_UP_TO else product.dtype
        self._totals[here] = product.to(wanted) if total is None else total.add_(product)

    def merge(self, other: CovarianceSums) -> None:
        """Adds what another shard summed over other rows.

        Args:
            other: sums of the same blocks.
        """
        self._owner = {**other._owner, **self._owner}
        self._inputs_axis = {**other._inputs_axis, **self._inputs_axis}
        for side, total in other._totals.items():
            mine = self._totals.get(side)
            self._totals[side] = total.clone() if mine is None else mine.add_(total)
        self.n_rows += other.n_rows
        self.n_tokens += other.n_tokens

    def products(self) -> list[Tensor | None]:
        """K-FAC's eigenvalues by block: the mean of a a^T a token times the mean of g g^T a row, in `bases`.

        None for blocks without two measured sides, whose diagonal is to be measured row by row.
        """
        found: list[Tensor | None] = []
        for index, (_, (left, right)) in enumerate(self.decompose()):
            inputs_right = self._inputs_axis.get(index) == 1
            if left is None or right is None or self.n_tokens == 0:
                found.append(None)
                continue
            scale = [1 / self.n_rows, 1 / self.n_tokens] if inputs_right else [1 / self.n_tokens, 1 / self.n_rows]
            found.append(torch.outer(left * scale[0], right * scale[1]))
        return found

    def bases(self) -> list[Basis]:
        """Eigenbases of both sides of every block; modules that share an input share the tensor."""
        return [basis for basis, _ in self.decompose()]

    def decompose(self) -> list[tuple[Basis, tuple[Tensor | None, Tensor | None]]]:
        """Eigenbases with the eigenvalues of the sums (not yet divided by any count)."""
        solved: dict[_Side, tuple[Tensor, Tensor]] = {}
        found = []
        for index, block in enumerate(self._blocks):
            vectors: list[Tensor | None] = [None, None]
            values: list[Tensor | None] = [None, None]
            for axis in range(2):
                owner = self._owner.get(_Side(index, axis))
                if owner is None or owner not in self._totals:
                    continue
                if owner not in solved:
                    # Summed in double, solved as precisely as gradients are: any orthonormal basis is a valid one.
                    total = self._totals[owner].to(accumulation_dtype(block))
                    eigenvalues, eigenvectors = torch.linalg.eigh(total)
                    solved[owner] = eigenvalues.clamp(min=0), eigenvectors.contiguous()
                values[axis], vectors[axis] = solved[owner]
            found.append((Basis(*vectors), (values[0], values[1])))
        return found

    def state(self) -> dict[str, Tensor]:
        """Everything as tensors by name, for safetensors; `restore` reads it back."""
        tensors = {f"total.{side.block}.{side.axis}": total for side, total in self._totals.items()}
        owners = [[s.block, s.axis, o.block, o.axis] for s, o in self._owner.items()]
        tensors["owners"] = torch.tensor(owners, dtype=torch.int64).reshape(-1, 4)
        tensors["inputs"] = torch.tensor([list(pair) for pair in self._inputs_axis.items()]).reshape(-1, 2)
        tensors["counts"] = torch.tensor([self.n_rows, self.n_tokens])
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        self._owner = {_Side(b, a): _Side(c, d) for b, a, c, d in tensors["owners"].tolist()}
        self._totals = {
            _Side(*map(int, name.split(".")[1:])): total for name, total in tensors.items() if name.startswith("total.")
        }
        self._inputs_axis = {int(index): int(axis) for index, axis in tensors["inputs"].tolist()}
        self.n_rows, self.n_tokens = tensors["counts"].tolist()


class MomentSums:
    """Sums over rows of the squared gradient in given bases, in each block's shape.

    Attributes:
        totals: one tensor a block.
        n_rows: rows summed so far.
    """

    def __init__(self, blocks: Sequence[Block], bases: Sequence[Basis]) -> None:
        self._blocks = list(blocks)
        self._bases = list(bases)
        self.totals = [
            torch.zeros(block.shape, dtype=accumulation_dtype(block), device=block.parameter.device) for block in blocks
        ]
        self.n_rows = 0

    def update(self, recorded: RecordedGradients) -> None:
        """Adds one batch."""
        rotator = Rotator(recorded)
        for block, basis, total in zip(self._blocks, self._bases, self.totals, strict=True):
            _add_squares(total, rotator.gradients(block, basis))
        self.n_rows += recorded.n_rows

    def merge(self, other: MomentSums) -> None:
        """Adds what another shard summed over other rows, in the same bases."""
        for mine, theirs in zip(self.totals, other.totals, strict=True):
            mine += theirs
        self.n_rows += other.n_rows

    def means(self) -> list[Tensor]:
        """Mean squared gradient by block; the sums become the means in place, so this is their end."""
        return [total.div_(max(self.n_rows, 1)) for total in self.totals]

    def state(self) -> dict[str, Tensor]:
        """Everything as tensors by name."""
        tensors = {f"moment.{index}": total for index, total in enumerate(self.totals)}
        return {**tensors, "counts": torch.tensor([self.n_rows])}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        self.totals = [tensors[f"moment.{index}"] for index in range(len(self.totals))]
        self.n_rows = int(tensors["counts"][0])


def _square(flat: Float[Tensor, "token d"]) -> Float[Tensor, "d d"]:
    """x^T x, of whose two equal corners only one is multiplied out where that is worth the copying."""
    width = flat.shape[1]
    if width < _HALVED_FROM:
        return flat.T @ flat
    half = width // 2
    first, second = flat[:, :half], flat[:, half:]
    found = flat.new_empty(width, width)
    torch.mm(first.T, flat, out=found[:half])
    torch.mm(second.T, second, out=found[half:, half:])
    found[half:, :half] = found[:half, half:].T
    return found


def _add_squares(total: Tensor, gradients: RowGradients) -> None:
    if len(gradients.products) == 1 and gradients.products[0].one_hot:
        _add_embedding_squares(total, gradients.products[0].left, gradients.products[0].right)
        return
    for rows, span in gradients.tiles():
        # Row by row in the cache: one read of each product, where a reduction over rows would stride through all.
        for product in gradients.tile(rows, span):
            total[span].addcmul_(product, product)


def _add_embedding_squares(total: Tensor, ids: Tensor, right: Tensor) -> None:
    """An embedding's row touches few ids: tokens of one row and id are summed, then squared, nothing else is."""
    rows, _, width = right.shape
    place = torch.arange(rows, device=ids.device).unsqueeze(1) * len(total) + ids
    unique, inverse = place.flatten().unique(return_inverse=True)
    summed = right.new_zeros(len(unique), width).index_add_(0, inverse, right.reshape(-1, width))
    total.index_add_(0, unique % len(total), summed.square())


def all_bases(blocks: Sequence[Block]) -> list[Basis]:
    """Every block in its own coordinates (a diagonal curvature)."""
    return [Basis() for _ in blocks]
