"""How hard does each row push each watched number, and how much of the row's own pull is that?

One pass over the rows, one backward a batch. For a linear map with inputs a_t and output gradients g_t a row's gradient
is sum_t g_t a_t^T; its inner product with a query, its norm and its part in the sum over rows are read off the two
sides, so that no row's gradient is ever held whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attribution.blocks import Block, accumulation_dtype
from attribution.example import IGNORED, ExampleBatch, ExampleId, Row, check_rows, context_length, example_id
from attribution.gradients import find_blocks, record_rows
from attribution.losses import evaluating, row_losses
from attribution.passes import row_batches
from attribution.queries import Query, value_and_gradient
from attribution.recording import RecordedGradients
from diffing.errors import InputError

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Pushes:
    """Rows against queries at one checkpoint.

    Attributes:
        queries: names.
        values: what the queries are now.
        examples: names of the rows.
        scores: `[query, row]`, minus the inner product of a query's gradient and a row's loss gradient: by how much
            the query's value rises, to first order, for a step of plain descent on the row with learning rate 1.
        squares: `[row]`, squared norm of the row's loss gradient.
        tokens: `[row]`, labelled tokens; a row's loss is the sum over them.
        losses: `[row]`, nats, summed over labelled tokens.
        query_norms: `[query]`, norms of the queries' gradients.
        mean_norm: norm of the mean row's gradient.
        adam: `[query]`, minus the inner product of a query's gradient and the mean gradient over the root of the
            batches' mean squared gradients: what one step of Adam with learning rate 1 makes of this dataset.
        along_mean: `[row]`, inner product of each row's gradient and the mean row's; empty where not asked for.
        blocks: names of the parameters that were looked at.
    """

    queries: tuple[str, ...]
    values: tuple[float, ...]
    examples: tuple[ExampleId, ...]
    scores: Float[np.ndarray, "query row"]
    squares: Float[np.ndarray, " row"]
    tokens: Int[np.ndarray, " row"]
    losses: Float[np.ndarray, " row"]
    query_norms: Float[np.ndarray, " query"]
    mean_norm: float
    adam: Float[np.ndarray, " query"]
    along_mean: Float[np.ndarray, " _"]
    blocks: tuple[str, ...]

    def centred(self) -> Float[np.ndarray, "query row"]:
        """Cosine of a row's push with each query once what all rows share is taken out of the row, -1 to 1.

        What every row of a dataset has in common (a format, a missing greeting) moves every query a little and tells
        no row from another; what is left, over its own norm, says what this row wants beside the rest.

        Raises:
            InputError: the pushes were measured without `centre`.
        """
        if not len(self.along_mean):
            raise InputError("Expected pushes measured with centre=True, got none along the mean. Measure them again.")
        own = self.squares - 2 * self.along_mean + self.mean_norm**2
        norms = np.sqrt(np.maximum(own, 1e-30))
        return (self.scores - self.scores.mean(axis=1, keepdims=True)) / (norms * self.query_norms[:, None])


def measure_pushes(
    model: nn.Module,
    rows: Sequence[Row],
    queries: Sequence[Query],
    *,
    centre: bool = False,
    embeddings: bool = False,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Pushes:
    """Measures every row's push on every query, at the weights as they are.

    Args:
        model: with the parameters trainable that would be trained: whole, or a LoRA model as it starts, whose first
            steps move its up-projections alone.
        rows: tokenised, with labels.
        queries: what is watched.
        centre: also how each row lies along the mean row, for `centred`; a second pass over the rows.
        embeddings: count embeddings, heads tied to them and norms too. Left out by default: their gradients say which
            words occur, more than what is meant by them.
        batch_size: rows a backward; None: by memory.
        progress: called with rows done and in all.

    Raises:
        InputError: nothing trainable, a query that depends on nothing trainable, rows without loss, numbers that
            are not finite.

    Cost: one forward and backward over the rows (two with `centre`), one backward a query. Memory: one gradient of the
    looked-at parameters for each query and two for the sums.
    """
    check_rows(rows, what="training row", context_length=context_length(model))
    if not queries:
        raise InputError("Expected at least one query; got none. Name what is to be watched.")
    found, _ = find_blocks(model)
    blocks = found if embeddings else [block for block in found if _is_linear(block)]
    if not blocks:
        raise InputError("Expected trainable linear maps, got none. Unfreeze some, or pass embeddings=True.")
    with evaluating(model):
        taken = [value_and_gradient(model, blocks, query) for query in queries]
        wanted = [torch.stack([gradients[at] for _, gradients in taken]) for at in range(len(blocks))]
        first = _Sums(len(queries), len(rows), blocks)
        passes = 2 if centre else 1
        for batch in row_batches(model, blocks, rows, batch_size):
            recorded, losses = _recorded(model, blocks, batch)
            first.add(recorded, batch, wanted, losses)
            if progress is not None:
                progress(first.done, passes * len(rows))
        mean = [total / len(rows) for total in first.totals]
        along = np.zeros(0)
        if centre:
            along = np.zeros(len(rows))
            done = len(rows)
            for batch in row_batches(model, blocks, rows, batch_size):
                recorded, _ = _recorded(model, blocks, batch)
                parts = [_inner(recorded, block, one[None])[0] for block, one in zip(blocks, mean, strict=True)]
                along[list(batch.positions)] = torch.stack(parts).sum(0).double().cpu().numpy()
                done += len(batch.ids)
                if progress is not None:
                    progress(done, passes * len(rows))
    norms = torch.stack([one.flatten(1).double().square().sum(1).cpu() for one in wanted]).sum(0).sqrt().numpy()
    return Pushes(
        queries=tuple(query.name for query in queries),
        values=tuple(value for value, _ in taken),
        examples=tuple(example_id(row) for row in rows),
        scores=-first.scores,
        squares=first.squares,
        tokens=first.tokens,
        losses=first.losses,
        query_norms=norms,
        mean_norm=float(torch.stack([one.double().square().sum().cpu() for one in mean]).sum().sqrt()),
        adam=first.adam(wanted),
        along_mean=along,
        blocks=tuple(block.name for block in blocks),
    )


class _Sums:
    """What one pass over the rows adds up to."""

    def __init__(self, n_queries: int, n_rows: int, blocks: Sequence[Block]) -> None:
        self.scores = np.zeros((n_queries, n_rows))
        self.squares, self.losses = np.zeros(n_rows), np.zeros(n_rows)
        self.tokens = np.zeros(n_rows, np.int64)
        self.totals = [
            torch.zeros(block.shape, dtype=accumulation_dtype(block), device=block.parameter.device) for block in blocks
        ]
        self.done = 0
        self._blocks = blocks
        self._squared = [torch.zeros_like(total) for total in self.totals]
        self._batches = 0

    def add(self, recorded: RecordedGradients, batch: ExampleBatch, wanted: Sequence[Tensor], losses: Tensor) -> None:
        places = list(batch.positions)
        counted = (batch.labels[:, 1:] != IGNORED).sum(1)
        tokens = int(counted.sum())
        for block, queries, total, squared in zip(self._blocks, wanted, self.totals, self._squared, strict=True):
            self.scores[:, places] += _inner(recorded, block, queries).double().cpu().numpy()
            squares, summed = _own(recorded, block)
            self.squares[places] += squares.double().cpu().numpy()
            total += summed
            squared += (summed / tokens).square()
        self.losses[places] = losses.double().cpu().numpy()
        self.tokens[places] = counted.cpu().numpy()
        self._batches += 1
        self.done += len(places)

    def adam(self, wanted: Sequence[Tensor]) -> Float[np.ndarray, " query"]:
        """Minus each query's gradient times the mean gradient a token, divided entry by entry as Adam divides."""
        found = np.zeros(len(self.scores))
        tokens = int(self.tokens.sum())
        for queries, total, squared in zip(wanted, self.totals, self._squared, strict=True):
            below = (squared / self._batches).sqrt()
            # Entries that hardly ever had a gradient would otherwise count as much as all others.
            moved = (total / tokens) / (below + 0.1 * below.mean()).clamp(min=1e-30)
            found -= (queries.flatten(1) @ moved.flatten()).double().cpu().numpy()
        return found


def _recorded(model: nn.Module, blocks: Sequence[Block], batch: ExampleBatch) -> tuple[RecordedGradients, Tensor]:
    held: list[Tensor] = []

    def loss(model: nn.Module, batch: ExampleBatch) -> Tensor:
        losses = row_losses(model, batch)
        held.append(losses.detach())
        return losses

    return record_rows(model, list(blocks), batch, loss), held[0]


def _inner(recorded: RecordedGradients, block: Block, wanted: Float[Tensor, "query ..."]) -> Float[Tensor, "query row"]:
    """Inner products of queries with the rows' gradients of one block."""
    if not _by_sides(recorded, block):
        rows = recorded.gradient(block).flatten(1)
        return wanted.flatten(1).to(rows) @ rows.T
    total = wanted.new_zeros(len(wanted), recorded.n_rows)
    for sides in recorded.sides(block):
        left, right = sides.left.to(wanted), sides.right.to(wanted)
        for number, one in enumerate(wanted):
            total[number] += ((left @ one) * right).sum(dim=(1, 2))
    return total


def _own(recorded: RecordedGradients, block: Block) -> tuple[Tensor, Tensor]:
    """Squared norms of the rows' gradients of one block `[row]`, and their sum over rows."""
    sides = recorded.sides(block) if _by_sides(recorded, block) else []
    if len(sides) != 1 or sides[0].left.shape[1] ** 2 > min(block.shape[0] * block.shape[1], 1 << 20):
        rows = recorded.gradient(block)
        return rows.flatten(1).square().sum(1), rows.sum(0)
    dtype = accumulation_dtype(block)
    left, right = sides[0].left.to(dtype), sides[0].right.to(dtype)
    squares = ((left @ left.transpose(1, 2)) * (right @ right.transpose(1, 2))).sum(dim=(1, 2))
    return squares, left.flatten(0, 1).T @ right.flatten(0, 1)


def _by_sides(recorded: RecordedGradients, block: Block) -> bool:
    return block.has_sides and block.kind == "weight" and not any(one.one_hot for one in recorded.sides(block))


def _is_linear(block: Block) -> bool:
    """A linear map or expert of a decoder block: no embedding, no head, no norm, no bias."""
    if block.kind == "expert":
        return True
    embeds = any(isinstance(module, nn.Embedding) for module in block.modules)
    heads = block.name.endswith(("lm_head.weight", "embed_out.weight"))
    return block.kind in ("weight", "rerun") and len(block.shape) == 2 and not embeds and not heads
