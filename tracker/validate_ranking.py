"""Is this run's ranking true? Checks by a further step and by retraining, with the run's own settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from attribution import (
    CompletionQuery,
    ContrastQuery,
    Outcomes,
    ProjectionQuery,
    Query,
    Retraining,
    Validation,
    check_datamodel,
    check_leave_out,
    check_tail_patch,
)
from attribution.check import Check
from attribution.example import Row
from tracker.journal import Journal
from tracker.saved_model import starting_model, trainable_model


@dataclass(frozen=True)
class CheckPlan:
    """What is checked, and what it costs.

    Attributes:
        leave_out: share of the rows left out in one retraining, beside `n_random` retrainings without random ones.
        n_random: see `leave_out`.
        n_subsets: retrainings on random halves for the linear datamodeling score; 0 leaves it out. Under 40 its
            interval is wide.
    """

    leave_out: float = 0.05
    n_random: int = 10
    n_subsets: int = 0

    @property
    def n_retrainings(self) -> int:
        """How often the model is trained again."""
        return 1 + self.n_random + self.n_subsets


def validate_ranking(
    run_dir: Path | str,
    rows: Sequence[Row],
    query: Query,
    scores: Float[np.ndarray, " example"],
    checkpoint: Path | str,
    *,
    base: Any = None,
    plan: CheckPlan | None = None,
    method: str = "",
    device: str = "cpu",
    seed: int = 0,
) -> Validation:
    """Holds a ranking against what happens when the run is trained again.

    Retrainings use AdamW with the rate, batch, epochs, decay and clipping that the journal recorded; a run that
    differed in more (another optimizer, packing, data order that matters) is only approximated. Their outcomes are
    kept in `outcomes.jsonl`, so that a killed check goes on.

    Args:
        run_dir: the tracked run's directory.
        rows: every row that was trained on.
        query: what was asked; its value is what helpful rows raise.
        scores: one a row, positive pushes up.
        checkpoint: the run's last one; an adapter is trained again from scratch on its base.
        base: what a full fine-tune started from, or an adapter's base where its own record is stale.
        plan: what is checked.
        method: how rows were scored, in words.
        device: where to compute.
        seed: of subsets, random rows and orders.

    Raises:
        InputError: a full fine-tune without `base`: there is nothing to train again.
    """
    plan = plan or CheckPlan()
    start = starting_model(checkpoint, base=base, device=device)
    retrain = Retraining(start=start, rows=rows, **_settings(run_dir, len(rows)))
    parts = parts_of(query)
    # One ranking, asked of every prompt on its own: the intervals are over prompts.
    values, names = np.tile(np.asarray(scores), (len(parts), 1)), [str(row["id"]) for row in rows]
    outcomes = Outcomes(Path(run_dir) / "outcomes.jsonl")

    def measure(model: nn.Module) -> Float[np.ndarray, " query"]:
        # A check wants what helpful rows lower.
        with torch.enable_grad():
            return np.array([-float(part.value(model).detach()) for part in parts])

    checks: list[Check] = [
        check_tail_patch(trainable_model(checkpoint, base=base, device=device), rows, values, measure, seed=seed),
        check_leave_out(
            values, names, retrain, measure, share=plan.leave_out, n_random=plan.n_random, seed=seed, outcomes=outcomes
        ),
    ]
    if plan.n_subsets:
        checks.append(
            check_datamodel(
                values, names, retrain, measure, n_subsets=plan.n_subsets, n_repeats=0, seed=seed, outcomes=outcomes
            )
        )
    return Validation(method, tuple(checks))


def parts_of(query: Query) -> tuple[Query, ...]:
    """The same question of each prompt or answer alone; the query itself where it cannot be divided."""
    if isinstance(query, ProjectionQuery):
        n = len(query.inputs["input_ids"])
        each = [{name: tensor[i : i + 1] for name, tensor in query.inputs.items()} for i in range(n)]
        return tuple(replace(query, inputs=inputs) for inputs in each)
    if isinstance(query, CompletionQuery):
        return tuple(replace(query, rows=[row]) for row in query.rows)
    if isinstance(query, ContrastQuery) and len(query.wanted) == len(query.unwanted):
        pairs = zip(query.wanted, query.unwanted, strict=True)
        return tuple(replace(query, wanted=[wanted], unwanted=[unwanted]) for wanted, unwanted in pairs)
    return (query,)


def _settings(run_dir: Path | str, n_rows: int) -> dict[str, Any]:
    attempts = Journal.read(run_dir).attempts()
    config: Mapping[str, Any] = attempts[-1].config if attempts else {}
    batch = int(config.get("per_device_train_batch_size", 8)) * int(config.get("gradient_accumulation_steps", 1))
    steps = int(config.get("max_steps", 0) or 0)
    epochs = round(steps * batch / n_rows) if steps > 0 else round(float(config.get("num_train_epochs", 3)))
    clip = float(config.get("max_grad_norm", 1.0) or 0.0)
    return {
        "epochs": max(1, epochs),
        "batch_size": batch,
        "learning_rate": float(config.get("learning_rate", 5e-5)),
        "weight_decay": float(config.get("weight_decay", 0.0)),
        "max_grad_norm": clip or None,
    }
