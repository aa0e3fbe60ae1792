"""Which training rows made the model answer like this?

`influence` scores every query row against every training row at one checkpoint; `score_query` does the same for
any differentiable number. Positive means that up-weighting the row helps: it lowers the query row's loss, or
raises the query's value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from attribution.blocks import Block, Coverage, coverage_of
from attribution.curvature import Curvature
from attribution.example import ExampleId, Row, check_rows, context_length, example_id, split_packed
from attribution.fit import CurvatureKind, fit_curvature
from attribution.gradients import find_blocks
from attribution.queries import Query
from attribution.scorer import Scorer, prepare_queries, prepare_rows
from diffing.errors import InputError

_KINDS: dict[str, CurvatureKind] = {
    "dot": "identity",
    "ekfac": "ekfac",
    "kfac": "kfac",
    "diagonal": "diagonal",
    "exact": "exact",
    "datainf": "datainf",
}


@dataclass(frozen=True, eq=False)
class InfluenceScores:
    """Scores of every query against every training row.

    Attributes:
        values: `[query, example]`; positive: up-weighting the row lowers the query's loss (or raises its value).
            First order, up to one positive factor per query: ranks and ratios mean something, sizes do not.
        queries: names of the queries.
        examples: names of the training rows, in the caller's order.
        method: the curvature used, with its settings.
        coverage: how much of what was trained the scores see.
        validated: whether retraining has confirmed these scores; here always False, see `caveats`.
    """

    values: Float[np.ndarray, "query example"]
    queries: tuple[str, ...]
    examples: tuple[ExampleId, ...]
    method: str
    coverage: Coverage
    validated: bool = False

    def __repr__(self) -> str:
        return (
            f"InfluenceScores({len(self.queries)} queries x {len(self.examples)} rows, {self.method}, "
            f"covers {self.coverage.share:.0%} of trained parameters, not validated)"
        )

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a reader must know before acting on a score."""
        notes = ["Not validated: no retraining has confirmed these scores; they are first-order estimates."]
        if self.coverage.change_share is not None:
            notes.append(f"Covers {self.coverage.change_share:.1%} of the squared change from base to tuned weights.")
        if self.coverage.missing:
            shown = ", ".join(self.coverage.missing[:3])
            notes.append(
                f"Covers {self.coverage.share:.1%} of the trained parameters; outside: {shown}"
                f"{', …' if len(self.coverage.missing) > 3 else ''}."
            )
        return tuple(notes)


def influence(
    model: nn.Module,
    train_rows: Sequence[Row],
    query_rows: Sequence[Row],
    *,
    method: str | Curvature = "ekfac",
    batch_size: int | None = None,
    seed: int = 0,
    base: Mapping[str, Tensor] | None = None,
) -> InfluenceScores:
    """Scores how much each training row taught the model each query row.

    Args:
        model: causal language model at the checkpoint to explain; its trainable parameters are scored (with LoRA
            the adapter). Left as found: modes, gradients, hooks.
        train_rows: mappings of `input_ids`, `labels`, optionally `attention_mask`, `position_ids` and `id`. A packed
            row, whose positions start anew, counts as its segments, each with a name of its own.
        query_rows: the same; the loss on their labelled tokens is what is explained.
        method: `ekfac`, `kfac`, `diagonal`, `exact`, `datainf`, `dot`, or a `Curvature`.
        batch_size: rows per backward pass, None: as many as fit a memory budget. Changes memory and speed only.
        seed: of the labels sampled for the Fisher factors.
        base: the untuned model's tensors by name; the coverage then says what share of the change is scored.

    Returns:
        `values [query, example]`, positive: up-weighting the row lowers the query's loss.

    Raises:
        InputError: a row without labels, too long or with a non-finite loss; nothing trainable; unknown method.

    Source: Koh & Liang 2017; Grosse et al. 2023 for the curvature.
    """
    rows = split_packed(train_rows)
    check_rows(rows, what="training row", context_length=context_length(model))
    check_rows(query_rows, what="query", context_length=context_length(model))
    blocks, _ = find_blocks(model)
    curvature = _curvature(method, model, blocks, rows, batch_size, seed)
    return _scores(
        prepare_rows(model, query_rows, curvature=curvature, blocks=blocks, batch_size=batch_size), rows, base
    )


def score_query(
    model: nn.Module,
    train_rows: Sequence[Row],
    queries: Sequence[Query],
    *,
    method: str | Curvature = "dot",
    batch_size: int | None = None,
    seed: int = 0,
    base: Mapping[str, Tensor] | None = None,
) -> InfluenceScores:
    """Scores how much each training row pushes each query's value up.

    Args:
        model: as for `influence`.
        train_rows: as for `influence`.
        queries: what is to be explained, one row of `values` each.
        method: `ekfac`, `kfac`, `diagonal`, `exact`, `datainf`, `dot`, or a `Curvature`.
        batch_size: rows per backward pass.
        seed: of the labels sampled for the Fisher factors.
        base: the untuned model's tensors by name; the coverage then says what share of the change is scored.

    Returns:
        `values [query, example]`, positive: a step of gradient descent on the row raises the query's value.

    Raises:
        InputError: as for `influence`.
    """
    rows = split_packed(train_rows)
    check_rows(rows, what="training row", context_length=context_length(model))
    blocks, _ = find_blocks(model)
    curvature = _curvature(method, model, blocks, rows, batch_size, seed)
    return _scores(
        prepare_queries(model, queries, curvature=curvature, blocks=blocks, batch_size=batch_size), rows, base
    )


def _curvature(
    method: str | Curvature,
    model: nn.Module,
    blocks: list[Block],
    rows: Sequence[Row],
    batch_size: int | None,
    seed: int,
) -> Curvature:
    if not isinstance(method, str):
        return method
    if method not in _KINDS:
        raise InputError(f"Expected a method among {', '.join(_KINDS)}; got {method!r}. Or pass a Curvature.")
    return fit_curvature(model, rows, kind=_KINDS[method], blocks=blocks, batch_size=batch_size, seed=seed)


def _scores(scorer: Scorer, rows: Sequence[Row], base: Mapping[str, Tensor] | None) -> InfluenceScores:
    values = scorer.scores(rows)
    examples = tuple(example_id(row) for row in rows)
    coverage = scorer.coverage if base is None else coverage_of(scorer.model, scorer.blocks, base=base)
    return InfluenceScores(values, scorer.names, examples, scorer.description, coverage)


def top_examples(scores: InfluenceScores, query: int, n: int) -> Iterator[tuple[ExampleId, float]]:
    """The `n` rows that pushed a query up the most, strongest first."""
    for index in np.argsort(-scores.values[query], kind="stable")[:n]:
        yield scores.examples[index], float(scores.values[query, index])
