"""How are all queries scored against all rows in one pass over the rows, within a memory budget?

Queries are kept as token sides where that is smaller than whole gradients, and multiplied out block by block while
some hundred rows wait beside them; so neither the queries nor the rows are ever held whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from attribution.blocks import Block
from attribution.curvature import Curvature, EkfacCurvature, Identity
from attribution.example import ExampleBatch, Row
from attribution.gradients import record_rows
from attribution.losses import evaluating, row_losses
from attribution.low_rank import add_low_rank
from attribution.passes import row_batches
from attribution.rotation import Basis, Rotator, RowGradients
from diffing.errors import InputError

_TILE_BYTES = 1 << 21
_QUERY_BYTES = 16 << 20  # one tile of preconditioned queries
_WAITING_BYTES = 32 << 20  # rows whose sides wait to be scored together


@dataclass(frozen=True, eq=False)
class RotatedQueries:
    """Queries' gradients in the curvature's bases, before or after they are divided by it.

    Attributes:
        names: of the queries.
        parts: for each block, groups of queries in ascending order.
        divided: whether the curvature was already applied (low-rank queries).
        order: where each query stands in the caller's list.
    """

    names: tuple[str, ...]
    parts: tuple[tuple[RowGradients, ...], ...]
    divided: bool = False
    order: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Memory they hold."""
        return sum(group.nbytes for groups in self.parts for group in groups)


def bases_of(curvature: Curvature, blocks: Sequence[Block]) -> list[Basis]:
    """Where the curvature is diagonal; the parameters' own coordinates for any other operator.

    Raises:
        InputError: the curvature belongs to other blocks (another model, or other parameters were frozen).
    """
    if not isinstance(curvature, EkfacCurvature):
        return [Basis() for _ in blocks]
    expected = tuple(block.name for block in blocks)
    fits = len(curvature.factors) == len(blocks) and all(
        tuple(factor.second_moment.shape) == block.shape
        for factor, block in zip(curvature.factors, blocks, strict=False)
    )
    if not fits or (curvature.names and curvature.names != expected):
        other = next((a for a, b in zip(curvature.names, expected, strict=False) if a != b), "their number")
        raise InputError(
            f"Expected factors of this model's {len(blocks)} blocks; got {len(curvature.factors)} of another model "
            f"or selection (first difference: {other}). Fit the curvature on this model with the same parameters "
            "trainable."
        )
    return [factor.basis for factor in curvature.factors]


def rotate_query_rows(
    model: nn.Module,
    blocks: Sequence[Block],
    rows: Sequence[Row],
    curvature: Curvature,
    names: tuple[str, ...],
    batch_size: int | None,
) -> RotatedQueries:
    """The loss gradients of query rows, as token sides."""
    bases = bases_of(curvature, blocks)
    groups: list[tuple[RowGradients, ...]] = []
    order: list[int] = []
    with evaluating(model):
        for batch in row_batches(model, blocks, rows, batch_size, held=True):
            groups.append(_rotated(model, blocks, batch, bases))
            order.extend(batch.positions)
    parts = tuple(tuple(group[index] for group in groups) for index in range(len(blocks)))
    # Queries stay in the order of their batches; their names go along and are put right at the end.
    return RotatedQueries(tuple(names[place] for place in order), parts, order=tuple(order))


def _rotated(
    model: nn.Module, blocks: Sequence[Block], batch: ExampleBatch, bases: Sequence[Basis]
) -> tuple[RowGradients, ...]:
    return Rotator(record_rows(model, list(blocks), batch, row_losses)).take(blocks, bases)


def score_rows(
    model: nn.Module,
    blocks: Sequence[Block],
    queries: RotatedQueries,
    rows: Sequence[Row],
    curvature: Curvature,
    *,
    batch_size: int | None = None,
) -> Float[np.ndarray, "query example"]:
    """Inner products of every divided query with every row's loss gradient, one pass over the rows."""
    values = np.zeros((len(queries.names), len(rows)))
    for places, by_block in stream_scores(model, blocks, queries, rows, curvature, batch_size=batch_size):
        values[:, places] = sum(part.numpy() for part in by_block)
    return values


def stream_scores(
    model: nn.Module,
    blocks: Sequence[Block],
    queries: RotatedQueries,
    rows: Sequence[Row],
    curvature: Curvature,
    *,
    batch_size: int | None = None,
) -> Iterator[tuple[list[int], Iterator[Tensor]]]:
    """Scores as they come, some hundred rows at a time: memory does not grow with the number of rows.

    Yields:
        where these rows stand in the caller's list, and for each block in turn the scores `[query, row]`.
    """
    bases = bases_of(curvature, blocks)
    for places, waiting in _waiting_rows(model, blocks, rows, bases, batch_size):
        yield places, _by_block(queries, waiting, len(places), curvature)
        del waiting  # before the next rows are recorded, or two generations would be in memory


def _by_block(
    queries: RotatedQueries, waiting: list[tuple[RowGradients, ...]], n_rows: int, curvature: Curvature
) -> Iterator[Tensor]:
    for index in range(len(queries.parts)):
        total = torch.zeros(len(queries.names), n_rows, dtype=torch.float64)
        parts = [group[index] for group in waiting]
        if queries.divided:
            add_low_rank(total, queries.parts[index], parts)
        else:
            _add_block(total, queries, parts, index, curvature)
        yield total
    waiting.clear()


def _waiting_rows(
    model: nn.Module, blocks: Sequence[Block], rows: Sequence[Row], bases: Sequence[Basis], batch_size: int | None
) -> Iterator[tuple[list[int], list[tuple[RowGradients, ...]]]]:
    places: list[int] = []
    waiting: list[tuple[RowGradients, ...]] = []
    held = 0
    with evaluating(model):
        for batch in row_batches(model, blocks, rows, batch_size, held=True):
            waiting.append(_rotated(model, blocks, batch, bases))
            places.extend(batch.positions)
            newest = sum(part.nbytes for part in waiting[-1])
            held += newest
            if held + newest > _WAITING_BYTES:  # the next would not fit beside them
                ready, waiting = (places, waiting), []
                yield ready
                del ready  # its rows are done with
                places, held = [], 0
    if waiting:
        yield places, waiting


def _add_block(
    total: Tensor, queries: RotatedQueries, waiting: list[RowGradients], index: int, curvature: Curvature
) -> None:
    """Adds one block's inner products to `total` `[query, row]`: all rows, a few lines of the block at a time.

    Narrow spans of many rows, rather than few rows whole, so that queries and rows both stay in the cache.
    """
    shape, n_queries = waiting[0].shape, len(queries.names)
    diagonal = isinstance(curvature, EkfacCurvature | Identity)
    lines = _lines(shape, n_queries + total.shape[1]) if diagonal else shape[0]
    room, asking = _Room(waiting[0], lines), _Room(waiting[0], lines)
    step = max(_QUERY_BYTES // (4 * room.span_size), 1)
    for start in range(0, shape[0], lines):
        span = slice(start, min(start + lines, shape[0]))
        rows = room.fill(waiting, 0, total.shape[1], span).flatten(1)
        for first in range(0, n_queries, step):
            last = min(first + step, n_queries)
            tile = asking.fill(queries.parts[index], first, last, span)
            wanted = _divide_in_place(curvature, index, span, tile).flatten(1)
            total[first:last] += (rows @ wanted.T).T.to(total)


class _Room:
    """Memory that one span of many gradients after another is written to."""

    def __init__(self, like: RowGradients, lines: int) -> None:
        self._like = like
        self.span_size = lines * int(torch.Size(like.shape[1:]).numel())
        self._held = like.empty(0)

    def fill(self, groups: Sequence[RowGradients], first: int, last: int, span: slice) -> Float[Tensor, "row ..."]:
        """Gradients `first` to `last`, counted through the groups, in this span of their first axis."""
        shape = (last - first, span.stop - span.start, *self._like.shape[1:])
        size = int(torch.Size(shape).numel())
        if len(self._held) < size:
            self._held = self._like.empty(size)
        out, at = self._held[:size].view(shape), 0
        for group in groups:
            some = slice(max(first - at, 0), min(last - at, group.n_rows))
            if some.start < some.stop:
                group.tile_into(out[at + some.start - first : at + some.stop - first], some, span)
            at += group.n_rows
        return out


def _lines(shape: tuple[int, ...], n_vectors: int) -> int:
    line = 4 * int(torch.Size(shape[1:]).numel())
    return max(min(_TILE_BYTES // (line * n_vectors), shape[0]), 1)


def _divide_in_place(curvature: Curvature, index: int, span: slice, tile: Tensor) -> Tensor:
    if isinstance(curvature, EkfacCurvature):
        factor = curvature.factors[index]
        return tile.div_(factor.second_moment[span] + factor.damping)
    return divide(curvature, index, span, tile)


def divide(curvature: Curvature, index: int, span: slice, tile: Tensor) -> Tensor:
    """(H + damping)^-1 of gradients in the curvature's basis, `span` of the first axis."""
    if isinstance(curvature, EkfacCurvature):
        factor = curvature.factors[index]
        return tile / (factor.second_moment[span] + factor.damping)
    # Any other operator mixes the whole block, and is then given the whole of it.
    return curvature.solve(index, tile)
