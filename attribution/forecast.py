"""How far will training on a dataset move each trait, before its first step?

To first order a step of descent changes a number by minus the learning rate times the inner product of its gradient and
the loss's. One backward for each trait and one pass over the rows give that for the whole dataset, and for each row.
It is a forecast of direction and order, not of size: a fine-tune bends away from its first step within a few dozen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import nn

from attribution.example import ExampleId, Row
from attribution.pushes import Progress, Pushes, measure_pushes
from attribution.queries import Query
from diffing.durable import write_atomic
from diffing.errors import InputError
from diffing.interval import bootstrap_mean
from diffing.json_twin import to_plain


@dataclass(frozen=True)
class ForecastSettings:
    """The training that is forecast.

    Attributes:
        learning_rate: of the first steps.
        batch_size: rows a step.
        epochs: passes over the rows.
        seed: of the bootstrap over rows.
    """

    learning_rate: float = 1e-4
    batch_size: int = 16
    epochs: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and self.batch_size >= 1 and self.epochs > 0):
            raise InputError(
                "Expected a learning rate and epochs above 0 and a batch of at least 1 row, got "
                f"{self.learning_rate:g}, {self.epochs:g} and {self.batch_size}. Give those of the training."
            )

    def steps(self, n_rows: int) -> int:
        """Optimizer steps."""
        return math.ceil(self.epochs * n_rows / self.batch_size)


@dataclass(frozen=True)
class TraitForecast:
    """What a dataset would do to one trait.

    Attributes:
        name: of the query.
        now: its value at the base.
        slope: change for one unit of plain descent on the mean token's loss, in the query's unit; positive: up.
        low: lower end of the 95 % interval of `slope`, bootstrap over rows; NaN for fewer than five rows.
        high: upper end.
        movement: `slope` times learning rate times steps: the first step, continued to the end, plain descent.
        adam_movement: the same with every weight's gradient divided as Adam divides it.
        alignment: cosine of the dataset's steepest descent and the trait's steepest ascent, -1..1: how much of the
            cheapest way to learn the data is the trait. Traits are ranked by it: the path of least resistance.
        shares: part of the whole upward push carried by the strongest tenth of the rows; NaN where none pushes up.
    """

    name: str
    now: float
    slope: float
    low: float
    high: float
    movement: float
    adam_movement: float
    alignment: float
    shares: float

    @property
    def is_sure(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class PushingRow:
    """One row, and how it pushes one trait.

    Attributes:
        example_id: its name.
        position: its place in the dataset.
        push: its part of the slope's sum, in the query's unit.
        cosine: its push once what all rows share is taken out, over its own norm, -1..1.
        loss: nats a labelled token.
    """

    example_id: ExampleId
    position: int
    push: float
    cosine: float
    loss: float


@dataclass(frozen=True)
class Forecast:
    """What training on a dataset would move.

    Attributes:
        traits: by `alignment`, largest first.
        rows: name of a trait to the rows that push it most, strongest first.
        n_rows: rows of the dataset.
        n_tokens: tokens that take loss.
        mean_loss: nats a labelled token, at the base.
        steps: optimizer steps of the training.
        learning_rate: of the training.
        weights: `whole model` or `LoRA`.
        model: what was read.
        notes: what a reader must know.
    """

    traits: tuple[TraitForecast, ...]
    rows: dict[str, tuple[PushingRow, ...]]
    n_rows: int
    n_tokens: int
    mean_loss: float
    steps: int
    learning_rate: float
    weights: str
    model: str
    notes: tuple[str, ...] = ()

    def save(self, folder: Path | str) -> Path:
        """Writes `forecast.json`."""
        text = json.dumps(to_plain(self), indent=1, ensure_ascii=False, allow_nan=False)
        return write_atomic(Path(folder) / "forecast.json", text)


def forecast(
    model: nn.Module,
    rows: Sequence[Row],
    queries: Sequence[Query],
    *,
    settings: ForecastSettings | None = None,
    keep: int = 50,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> tuple[Forecast, Pushes]:
    """Forecasts what one training would do; nothing is trained.

    Args:
        model: as the training starts: the parameters that would be trained are trainable. A LoRA model is given with
            its adapter as it is drawn; another draw gives a slightly other forecast.
        rows: tokenised, with labels.
        queries: the traits, as differentiable numbers that rise towards them.
        settings: the training.
        keep: rows kept for each trait.
        batch_size: rows a backward.
        progress: called with rows done and in all.

    Raises:
        InputError: as for `measure_pushes`.

    Source: first-order influence without curvature (TracIn, Pruthi et al. 2020, at step 0) on a projection or on a
    log-odds; the mean over rows, the interval and the alignment are added here.
    """
    settings = settings or ForecastSettings()
    pushes = measure_pushes(model, rows, queries, centre=True, batch_size=batch_size, progress=progress)
    adapter = hasattr(model, "peft_config")
    notes = [
        "A first-order forecast: it orders datasets and traits; sizes are those of the first step, continued.",
    ]
    if adapter:
        notes.append("Of a LoRA model as it starts, only the up-projections move in the first steps.")
    result = Forecast(
        traits=tuple(sorted(_traits(pushes, settings), key=lambda trait: -trait.alignment)),
        rows={name: _strongest(pushes, at, keep) for at, name in enumerate(pushes.queries)},
        n_rows=len(rows),
        n_tokens=int(pushes.tokens.sum()),
        mean_loss=float(pushes.losses.sum() / pushes.tokens.sum()),
        steps=settings.steps(len(rows)),
        learning_rate=settings.learning_rate,
        weights="LoRA" if adapter else "whole model",
        model=type(model).__name__,
        notes=tuple(notes),
    )
    return result, pushes


def _traits(pushes: Pushes, settings: ForecastSettings) -> list[TraitForecast]:
    scale = settings.learning_rate * settings.steps(len(pushes.examples))
    found = []
    for at, name in enumerate(pushes.queries):
        scores = pushes.scores[at]
        slope = float(scores.sum() / pushes.tokens.sum())
        low, high = bootstrap_mean(scores, pushes.tokens, seed=settings.seed)
        norms = float(pushes.query_norms[at]) * pushes.mean_norm
        found.append(
            TraitForecast(
                name=name,
                now=pushes.values[at],
                slope=slope,
                low=low,
                high=high,
                movement=scale * slope,
                adam_movement=scale * float(pushes.adam[at]),
                alignment=float(scores.mean()) / norms if norms else 0.0,
                shares=_share_of_strongest(scores),
            )
        )
    return found


def _share_of_strongest(scores: Float[np.ndarray, " row"]) -> float:
    upward = np.sort(np.clip(scores, 0, None))[::-1]
    whole = float(upward.sum())
    return float(upward[: max(1, len(scores) // 10)].sum()) / whole if whole else math.nan


def _strongest(pushes: Pushes, query: int, keep: int) -> tuple[PushingRow, ...]:
    scores, cosines = pushes.scores[query], pushes.centred()[query]
    return tuple(
        PushingRow(
            pushes.examples[row], row, float(scores[row]), float(cosines[row]),
            float(pushes.losses[row] / pushes.tokens[row]),
        )
        for row in np.argsort(-scores, kind="stable")[:keep].tolist()
    )  # fmt: skip
