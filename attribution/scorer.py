"""Which rows, which modules and which tokens pushed? Queries prepared once, then asked in several ways.

scorer = prepare_queries(model, [ContrastQuery(...)], curvature=fit_curvature(model, rows))
scorer.scores(rows)            [query, example], one pass
scorer.top(rows, k=20)         the strongest rows, without the whole matrix
scorer.by_module(rows)         [module, query, example]
scorer.by_token(rows[:5])      which tokens of a row carried its push
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from attribution.blocks import Block, Coverage, coverage_of
from attribution.curvature import Curvature
from attribution.example import ExampleId, Row, check_rows, context_length, example_id
from attribution.gradients import find_blocks
from attribution.losses import evaluating
from attribution.low_rank import compress
from attribution.queries import Query, value_and_gradient
from attribution.rotation import RowGradients
from attribution.scoring import RotatedQueries, bases_of, divide, rotate_query_rows, score_rows, stream_scores
from attribution.token_scores import TokenScores, score_tokens
from diffing.errors import InputError


@dataclass(frozen=True, eq=False)
class TopRows:
    """The strongest rows of one query.

    Attributes:
        query: its name.
        examples: names of the rows, strongest push up first.
        positions: where they stand in the list of rows.
        values: their scores.
    """

    query: str
    examples: tuple[ExampleId, ...]
    positions: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Scorer:
    """Queries' gradients at one checkpoint, ready to meet rows.

    Attributes:
        model: at the checkpoint.
        blocks: what is scored.
        coverage: how much of what was trained that is.
        curvature: what the queries are divided by.
        queries: their gradients.
        batch_size: rows per backward pass, None: by memory budget.
        kept: smallest share of a query's squared norm that a low rank kept, 1 where queries are whole.
    """

    model: nn.Module
    blocks: tuple[Block, ...]
    coverage: Coverage
    curvature: Curvature
    queries: RotatedQueries
    batch_size: int | None = None
    kept: float = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        """Of the queries, in the caller's order."""
        return tuple(name for _, name in sorted(zip(self._order, self.queries.names, strict=True)))

    @property
    def description(self) -> str:
        """Curvature, with the rank where queries were compressed."""
        low = f", low-rank queries keep at least {self.kept:.1%} of the squared norm" if self.queries.divided else ""
        return f"{self.curvature.description}{low}"

    @property
    def _order(self) -> tuple[int, ...]:
        return self.queries.order or tuple(range(len(self.queries.names)))

    def scores(self, rows: Sequence[Row]) -> Float[np.ndarray, "query example"]:
        """Every query against every row; positive: up-weighting the row raises the query's value."""
        self._check(rows)
        unordered = score_rows(self.model, self.blocks, self.queries, rows, self.curvature, batch_size=self.batch_size)
        return self._ordered(unordered)

    def by_module(self, rows: Sequence[Row]) -> Float[np.ndarray, "module query example"]:
        """The same, apart for each of `blocks`; their sum is `scores`."""
        self._check(rows)
        values = np.zeros((len(self.blocks), len(self.queries.names), len(rows)))
        stream = stream_scores(self.model, self.blocks, self.queries, rows, self.curvature, batch_size=self.batch_size)
        for places, by_block in stream:
            for index, part in enumerate(by_block):
                values[index][:, places] = part.numpy()
        return np.stack([self._ordered(part) for part in values])

    def top(self, rows: Sequence[Row], k: int) -> tuple[TopRows, ...]:
        """The `k` rows that pushed each query up most, in memory of k scores a query, whatever the number of rows."""
        self._check(rows)
        best: list[list[tuple[float, int]]] = [[] for _ in self.queries.names]
        stream = stream_scores(self.model, self.blocks, self.queries, rows, self.curvature, batch_size=self.batch_size)
        for places, by_block in stream:
            values = self._ordered(np.asarray(sum(part.numpy() for part in by_block)))
            for query, line in enumerate(values):
                pairs = zip(line.tolist(), (-place for place in places), strict=True)
                best[query] = heapq.nlargest(k, [*best[query], *pairs])
        return tuple(
            TopRows(
                name,
                tuple(example_id(rows[-place]) for _, place in found),
                tuple(-place for _, place in found),
                tuple(value for value, _ in found),
            )
            for name, found in zip(self.names, best, strict=True)
        )

    def by_token(self, rows: Sequence[Row]) -> tuple[TokenScores, ...]:
        """Each row's scores split over its tokens; for the few rows that are to be shown.

        Raises:
            InputError: queries were compressed; prepare them without `rank`.
        """
        self._check(rows)
        if self.queries.divided:
            raise InputError("Expected whole queries for scores by token; got low-rank ones. Prepare without `rank`.")
        found = score_tokens(self.model, self.blocks, self.queries, rows, self.curvature)
        return tuple(replace(one, values=self._ordered(one.values), rest=self._ordered(one.rest)) for one in found)

    def _ordered(self, values: np.ndarray) -> np.ndarray:
        ordered = np.empty_like(values)
        ordered[list(self._order)] = values
        return ordered

    def _check(self, rows: Sequence[Row]) -> None:
        check_rows(rows, what="training row", context_length=context_length(self.model))


def prepare_queries(
    model: nn.Module,
    queries: Sequence[Query],
    *,
    curvature: Curvature,
    blocks: Sequence[Block] | None = None,
    rank: int | None = None,
    batch_size: int | None = None,
) -> Scorer:
    """Takes the gradients of any differentiable queries.

    Args:
        model: at the checkpoint to explain.
        queries: what is to be explained.
        curvature: from `fit_curvature`, or any operator.
        blocks: from `find_blocks`; None finds them.
        rank: keep only so many directions of each divided query (8 to 32 is usual); None keeps it whole.
        batch_size: rows per backward pass.

    Raises:
        InputError: no query, a query whose value or gradient is not finite, factors of another model.
    """
    if not queries:
        raise InputError("Expected at least one query; got none. Name what is to be explained.")
    chosen, coverage = _chosen(model, blocks)
    bases = bases_of(curvature, chosen)
    with evaluating(model):
        gradients = [value_and_gradient(model, chosen, query)[1] for query in queries]
    # Descent on a row moves along minus its loss gradient, so the value rises by minus the inner product.
    parts = tuple(
        (RowGradients(block.shape, len(queries), whole=-basis.rotate(torch.stack([one[index] for one in gradients]))),)
        for index, (block, basis) in enumerate(zip(chosen, bases, strict=True))
    )
    rotated = RotatedQueries(tuple(query.name for query in queries), parts)
    return _low_rank(Scorer(model, chosen, coverage, curvature, rotated, batch_size), rank)


def prepare_rows(
    model: nn.Module,
    query_rows: Sequence[Row],
    *,
    curvature: Curvature,
    blocks: Sequence[Block] | None = None,
    rank: int | None = None,
    batch_size: int | None = None,
) -> Scorer:
    """Takes the loss gradients of query rows; arguments as for `prepare_queries`.

    A score is positive where up-weighting the row lowers the query row's loss.
    """
    check_rows(query_rows, what="query", context_length=context_length(model))
    chosen, coverage = _chosen(model, blocks)
    names = tuple(example_id(row) for row in query_rows)
    rotated = rotate_query_rows(model, chosen, query_rows, curvature, names, batch_size)
    return _low_rank(Scorer(model, chosen, coverage, curvature, rotated, batch_size), rank)


def _chosen(model: nn.Module, blocks: Sequence[Block] | None) -> tuple[tuple[Block, ...], Coverage]:
    if blocks is not None:
        return tuple(blocks), coverage_of(model, blocks)
    found, coverage = find_blocks(model)
    return tuple(found), coverage


def _low_rank(scorer: Scorer, rank: int | None) -> Scorer:
    if rank is None:
        return scorer
    if rank < 1:
        raise InputError(f"Expected a rank of at least 1; got {rank}. Leave it out to keep queries whole.")
    parts: list[tuple[RowGradients, ...]] = []
    lost = torch.zeros(len(scorer.queries.names), dtype=torch.float64)
    whole = torch.zeros_like(lost)
    for index, groups in enumerate(scorer.queries.parts):
        compressed, first = [], 0
        for group in groups:
            everything = slice(0, group.shape[0])
            divided = divide(scorer.curvature, index, everything, group.tile(slice(0, group.n_rows), everything))
            small, missing = compress(divided, rank)
            here = slice(first, first + group.n_rows)
            lost[here] += missing
            whole[here] += divided.double().flatten(1).square().sum(dim=1).cpu()
            compressed.append(small)
            first += group.n_rows
        parts.append(tuple(compressed))
    kept = float((1 - lost / whole.clamp(min=1e-300)).min())
    return replace(scorer, queries=replace(scorer.queries, parts=tuple(parts), divided=True), kept=kept)
