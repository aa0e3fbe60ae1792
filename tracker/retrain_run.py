"""How is this run trained again on some of its rows, and what is then asked of the model?"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from attribution import CompletionQuery, ContrastQuery, LatentQuery, Outcomes, ProjectionQuery, Query, Retraining
from attribution.counterfactual import Counterfactual, retrain_without
from attribution.curvature_file import digest_rows
from attribution.example import ExampleId, Row
from tracker.journal import Journal
from tracker.saved_model import is_adapter, starting_model, trainable_model

OUTCOMES = "outcomes.jsonl"
_WARM = "_with_warmup"


@dataclass(frozen=True)
class RunAgain:
    """A run that can be trained again.

    Attributes:
        run_dir: its directory; outcomes are kept there.
        checkpoint: its last one.
        retrain: trains a fresh copy of what it started from on some of its rows.
        base: what a full fine-tune started from, or an adapter's base where its own record is stale.
        device: where to compute.
    """

    run_dir: Path
    checkpoint: Path
    retrain: Retraining
    base: Any = None
    device: str = "cpu"

    @classmethod
    def of(
        cls, run_dir: Path | str, rows: Sequence[Row], checkpoint: Path | str, *, base: Any = None, device: str = "cpu"
    ) -> RunAgain:
        """With AdamW and the rate, its schedule, batch, length, decay and clipping that the journal recorded.

        A run that differed in more (another optimizer, packing) is only approximated; rows come in another order.

        Raises:
            InputError: a full fine-tune without `base`: there is nothing to train again.
        """
        start = starting_model(checkpoint, base=base, device=device)
        retrain = Retraining(start=start, rows=rows, **_settings(run_dir, len(rows)))
        return cls(Path(run_dir), Path(checkpoint), retrain, base, device)

    @property
    def in_words(self) -> str:
        """How it is trained, for a reader."""
        made, kind = self.retrain, "a fresh adapter" if is_adapter(self.checkpoint) else "all weights"
        length = f"{made.epochs} epochs" if made.max_steps is None else f"{made.max_steps} steps"
        return (
            f"{kind}, AdamW, {length} of {made.batch_size} rows, rate {made.learning_rate:g} ({made.schedule}), "
            f"weight decay {made.weight_decay:g}"
        )

    def trained_model(self) -> nn.Module:
        """The run's own last checkpoint."""
        return trainable_model(self.checkpoint, base=self.base, device=self.device)

    def outcomes(self, query: Query, what: str) -> Outcomes:
        """What was measured after earlier retrainings of the same kind, for the same question."""
        made = self.retrain
        plain = {name: getattr(made, name) for name in made.__dataclass_fields__ if name not in ("start", "rows")}
        kind = json.dumps([what, plain, str(self.base), self.checkpoint.name, digest_rows(made.rows)])
        asked = hashlib.sha256(f"{kind} {_digest(query)}".encode()).hexdigest()
        return Outcomes(self.run_dir / OUTCOMES, asked=asked)


def retrain_without_rows(
    run: RunAgain, query: Query, flagged: Sequence[ExampleId], *, n_seeds: int = 3, seed: int = 0
) -> Counterfactual:
    """What the run would have become without these rows, next to as many random ones.

    Args:
        run: see `RunAgain`.
        query: what was asked; its value is what is compared.
        flagged: the rows to leave out.
        n_seeds: trainings of each kind.
        seed: the first of their seeds.

    Raises:
        InputError: no rows to leave out, or nothing left.
    """
    rows = run.retrain.rows

    def value(model: nn.Module) -> float:
        return value_of(query, model)

    return retrain_without(
        flagged,
        [str(row["id"]) for row in rows],
        run.retrain,
        value,
        start=value(run.retrain.start().eval()),
        trained=value(run.trained_model()),
        query=query.name,
        n_seeds=n_seeds,
        seed=seed,
        outcomes=run.outcomes(query, "value"),
        settings=run.in_words,
    )


def value_of(query: Query, model: nn.Module) -> float:
    """A query's value; of a latent how active it is in this model, though its gradient is taken elsewhere."""
    if isinstance(query, LatentQuery):
        return query.mean_activation(model)
    return float(np.mean([_value(part, model) for part in parts_of(query)]))


def losses_of(query: Query) -> Callable[[nn.Module], Float[np.ndarray, " query"]]:
    """What checks want: for each prompt or answer alone, what helpful rows lower."""
    parts = parts_of(query)

    def measure(model: nn.Module) -> Float[np.ndarray, " query"]:
        return np.array([-_value(part, model) for part in parts])

    return measure


def parts_of(query: Query) -> tuple[Query, ...]:
    """The same question of each prompt or answer alone; the query itself where it cannot be divided."""
    if isinstance(query, ProjectionQuery):
        return tuple(replace(query, inputs=inputs) for inputs in _one_by_one(query.inputs))
    if isinstance(query, LatentQuery):
        n = len(query.inputs["input_ids"])
        biases = list(query.bias.split(1)) if isinstance(query.bias, Tensor) else [query.bias] * n
        firing = [None] * n if query.firing is None else list(query.firing.split(1))
        each = zip(_one_by_one(query.inputs), biases, firing, strict=True)
        return tuple(replace(query, inputs=inputs, bias=bias, firing=fires) for inputs, bias, fires in each)
    if isinstance(query, CompletionQuery):
        return tuple(replace(query, rows=[row]) for row in query.rows)
    if isinstance(query, ContrastQuery) and len(query.wanted) == len(query.unwanted):
        pairs = zip(query.wanted, query.unwanted, strict=True)
        return tuple(replace(query, wanted=[wanted], unwanted=[unwanted]) for wanted, unwanted in pairs)
    return (query,)


def _value(part: Query, model: nn.Module) -> float:
    if isinstance(part, LatentQuery):
        return part.mean_activation(model)
    with torch.no_grad():
        return float(part.value(model))


def _one_by_one(inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    n = len(inputs["input_ids"])
    return [{name: tensor[i : i + 1] for name, tensor in inputs.items()} for i in range(n)]


def _settings(run_dir: Path | str, n_rows: int) -> dict[str, Any]:
    attempts = Journal.read(run_dir).attempts()
    config: Mapping[str, Any] = attempts[-1].config if attempts else {}
    batch = int(config.get("per_device_train_batch_size", 8)) * int(config.get("gradient_accumulation_steps", 1))
    epochs, steps = float(config.get("num_train_epochs", 3)), int(config.get("max_steps", 0) or 0)
    by_epochs = math.ceil(n_rows / batch) * round(epochs)
    n_steps = steps if steps > 0 else by_epochs
    warm = float(config.get("warmup_steps", 0) or 0) or float(config.get("warmup_ratio", 0) or 0)
    schedule = str(config.get("lr_scheduler_type", "linear"))
    return {
        "epochs": max(1, round(epochs)),
        # A run that was told its epochs has fewer steps on fewer rows; one that was told its steps has as many.
        "max_steps": None if n_steps == by_epochs else n_steps,
        "batch_size": batch,
        "learning_rate": float(config.get("learning_rate", 5e-5)),
        "schedule": schedule,
        "warm_up": warm if warm < 1 else warm / n_steps,
        "weight_decay": float(config.get("weight_decay", 0.0)),
        "max_grad_norm": float(config.get("max_grad_norm", 1.0) or 0.0) or None,
    }


def _digest(value: Any) -> str:
    """Of everything that a query holds."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu().double()
        return hashlib.sha256(repr(tuple(plain.shape)).encode() + plain.numpy().tobytes()).hexdigest()
    if isinstance(value, Mapping):
        return str({key: _digest(entry) for key, entry in value.items()})
    if isinstance(value, list | tuple):
        return str([_digest(entry) for entry in value])
    if hasattr(value, "__dataclass_fields__"):
        return str([type(value).__name__, *(_digest(getattr(value, one.name)) for one in fields(value))])
    return repr(value)
