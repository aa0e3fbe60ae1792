"""Which rows pushed, along the whole run and not only at its end?

TracIn (Pruthi et al. 2020): sum over saved checkpoints of the inner product between the query's gradient and the
row's gradient. The checkpoint matters more than the curvature: at the end of a run training losses are nearly zero
and their gradients say little, while the start of the run, before anything was learnt, says a lot: pass it as step 0.
With a curvature the inner product is taken in its metric, fitted at each checkpoint or, for less, once in the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float
from torch import nn

from attribution.adam_metric import AdamMetric
from attribution.blocks import Coverage
from attribution.curvature import DAMPING, Curvature
from attribution.example import ExampleId, Row
from attribution.fit import CurvatureKind, fit_curvature
from attribution.influence import InfluenceScores, influence, score_query
from attribution.losses import Labels
from attribution.queries import Query
from diffing.errors import InputError

FittedAt = Literal["middle", "each"]


@dataclass(frozen=True)
class SavedStep:
    """One checkpoint of the run.

    Attributes:
        step: optimizer steps it contains.
        learning_rate: the rate in force there; only ratios between checkpoints matter.
        enter: puts the model into this checkpoint's state and returns it, trainable parameters requiring gradients.
        folder: where it was saved, for the method `adam`.
    """

    step: int
    learning_rate: float
    enter: Callable[[], nn.Module]
    folder: Path | str | None = None


@dataclass(frozen=True, eq=False)
class TrajectoryScores:
    """Pushes summed over a run's checkpoints.

    Attributes:
        values: `[query, example]`; positive: training on the row moved the query's value up (its loss down).
        per_step: `[step, query, example]`, already weighted.
        steps: optimizer steps, ascending.
        examples: names of the rows.
        method: what was computed, in words.
        coverage: how much of what was trained the scores see.
    """

    values: Float[np.ndarray, "query example"]
    per_step: Float[np.ndarray, "step query example"]
    steps: tuple[int, ...]
    examples: tuple[ExampleId, ...]
    method: str
    coverage: Coverage


def score_trajectory(
    checkpoints: Iterable[SavedStep],
    train_rows: Sequence[Row],
    queries: Sequence[Query],
    *,
    method: str | Curvature = "dot",
    fitted_at: FittedAt = "middle",
    batch_size: int | None = 8,
    seed: int = 0,
) -> TrajectoryScores:
    """Sums, over checkpoints, learning rate times the push of each row on each query.

    Args:
        checkpoints: in any order; entered one after another, so one model in memory is enough.
        train_rows: all rows of the training set; a row counts at every checkpoint.
        queries: what is to be explained.
        method: `dot`, `ekfac`, `diagonal` or a `Curvature`; or `adam`: the steps that the run's optimizer took, by the
            second moments saved with each checkpoint (Pruthi et al. 2020, section 3.2, with Adam's preconditioner).
        fitted_at: where a curvature is fitted: once at the middle checkpoint, or at each for itself.
        batch_size: rows per backward pass.
        seed: of the labels sampled for the Fisher factors.

    Raises:
        InputError: no checkpoint, or as for `score_query`; with `adam` one without a saved optimizer.
    """
    fitted_at = "each" if method == "adam" else fitted_at

    def fit(model: nn.Module, saved: SavedStep) -> str | Curvature:
        if method == "adam":
            return _adam(model, saved)
        return _fitted(model, method, train_rows, "sampled", batch_size, seed)

    def score(model: nn.Module, metric: str | Curvature) -> InfluenceScores:
        return score_query(model, train_rows, queries, method=metric, batch_size=batch_size, seed=seed)

    return _summed(checkpoints, fit, score, fitted_at)


def influence_along(
    checkpoints: Iterable[SavedStep],
    train_rows: Sequence[Row],
    query_rows: Sequence[Row],
    *,
    method: str | Curvature = "ekfac",
    fitted_at: FittedAt = "each",
    labels: Labels = "data",
    damping: float = DAMPING,
    level: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
) -> TrajectoryScores:
    """`influence` summed over checkpoints of one run, or of several runs on the same rows.

    On small models this ranks retraining outcomes better than any single checkpoint (`python -m benchmarks
    attribution`). Equal rates and the state before training among the checkpoints did best there.

    Args:
        checkpoints: as for `score_trajectory`.
        train_rows: likewise.
        query_rows: the loss on their labelled tokens is what is explained.
        method: likewise.
        fitted_at: likewise.
        labels: what factors are estimated from: the rows' own (`data`) or drawn from the model (`sampled`).
        damping: multiple of each block's mean eigenvalue, for a method that is fitted here.
        level: divides a query's scores at each checkpoint by their spread over the rows before they are summed, so that
            no checkpoint outweighs the others by the size of its gradients alone. Sizes then mean nothing.
        batch_size: rows per backward pass, None: as many as fit a memory budget.
        seed: of the labels sampled for the Fisher factors.

    Returns:
        Positive: up-weighting the row lowers the query's loss.

    Raises:
        InputError: no checkpoint, or as for `influence`.
    """

    def fit(model: nn.Module, saved: SavedStep) -> str | Curvature:
        if method == "adam":
            return _adam(model, saved)
        return _fitted(model, method, train_rows, labels, batch_size, seed, damping)

    def score(model: nn.Module, metric: str | Curvature) -> InfluenceScores:
        found = influence(model, train_rows, query_rows, method=metric, batch_size=batch_size, seed=seed)
        if not level:
            return found
        return replace(found, values=found.values / (found.values.std(axis=1, keepdims=True) + 1e-30))

    return _summed(checkpoints, fit, score, fitted_at)


def _adam(model: nn.Module, saved: SavedStep) -> AdamMetric:
    if saved.folder is None:
        raise InputError(
            f"Expected the folder of the checkpoint at step {saved.step}, whose optimizer the method 'adam' reads; got "
            "none. Pass SavedStep(folder=...)."
        )
    return AdamMetric.of(saved.folder, model)


def _fitted(
    model: nn.Module,
    method: str | Curvature,
    rows: Sequence[Row],
    labels: Labels,
    batch_size: int | None,
    seed: int,
    damping: float = DAMPING,
) -> str | Curvature:
    kinds: dict[str, CurvatureKind] = {"ekfac": "ekfac", "kfac": "kfac", "diagonal": "diagonal"}
    if not isinstance(method, str) or method not in kinds:
        return method
    return fit_curvature(
        model, rows, kind=kinds[method], labels=labels, damping=damping, batch_size=batch_size, seed=seed
    )


def _summed(
    checkpoints: Iterable[SavedStep],
    fit: Callable[[nn.Module, SavedStep], str | Curvature],
    score: Callable[[nn.Module, str | Curvature], InfluenceScores],
    fitted_at: FittedAt,
) -> TrajectoryScores:
    ordered = sorted(checkpoints, key=lambda saved: saved.step)
    if not ordered:
        raise InputError("Expected at least one saved checkpoint; got none. Save some (save_strategy='steps').")
    middle = ordered[(len(ordered) - 1) // 2]
    shared = fit(middle.enter(), middle) if fitted_at == "middle" else None
    parts: list[np.ndarray] = []
    last: InfluenceScores | None = None
    for checkpoint in ordered:
        model = checkpoint.enter()
        last = score(model, fit(model, checkpoint) if shared is None else shared)
        parts.append(checkpoint.learning_rate * last.values)
    assert last is not None
    per_step = np.stack(parts)
    return TrajectoryScores(
        values=per_step.sum(axis=0),
        per_step=per_step,
        steps=tuple(saved.step for saved in ordered),
        examples=last.examples,
        method=f"TracIn over {len(parts)} checkpoints, {last.method}",
        coverage=last.coverage,
    )
