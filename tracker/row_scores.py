"""How far did each training row push what is asked about: over saved checkpoints, or as the run itself recorded it?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from attribution import SavedStep, score_trajectory
from attribution.curvature import Curvature
from attribution.trainer_files import learning_rate_at
from attribution.trajectory import TrajectoryScores
from diffing.errors import InputError
from tracker.live_cause import live_attribution
from tracker.run_queries import Question
from tracker.saved_model import trainable_model
from tracker.training_rows import TrainingText

UNCHECKED = "Not validated:"


@dataclass(frozen=True, eq=False)
class RowScores:
    """One score a training row, and what it rests on.

    Attributes:
        values: positive pushes up.
        examples: names of the rows.
        method: in words.
        steps: of the checkpoints that were used, or first and last of the window.
        caveats: what a reader must know.
    """

    values: Float[np.ndarray, " example"]
    examples: tuple[str, ...]
    method: str
    steps: tuple[int, ...]
    caveats: tuple[str, ...]


def checkpoint_scores(
    chosen: Sequence[tuple[int, Path]],
    training: TrainingText,
    question: Question,
    base: Any,
    method: str | Curvature,
    batch_size: int,
    device: str,
    seed: int,
    caveats: list[str],
) -> RowScores:
    """Gradient products summed over checkpoints; positive: training on the row raised the query."""
    found = score_trajectory(
        _saved_steps(chosen, base, device),
        training.rows,
        [question.query],
        method=method,
        batch_size=batch_size,
        seed=seed,
    )
    said = (*_caveats(found, len(chosen)), *caveats)
    return RowScores(found.values[0], found.examples, found.method, found.steps, said)


def live_scores(run_dir: Path | str, training: TrainingText, question: Question) -> RowScores:
    """Pushes of the whole run, or up to the alert that is asked about; 0 for rows that no step met."""
    if not question.pushed:
        raise InputError(
            "Expected a question about a persona or an alert on one, since live pushes were recorded of nothing else; "
            f"got {question.query.name!r}. Leave --method out."
        )
    found = live_attribution(
        run_dir, question.pushed, last=None, until=question.until, rows=training.rows, keep=len(training.rows)
    )
    pushed = {row.example_id: row.score for row in found.rows}
    names = tuple(str(row["id"]) for row in training.rows)
    unknown = len(pushed.keys() - set(names))
    caveats = list(found.caveats)
    if unknown:
        caveats.append(f"{unknown} rows that the run met are not among those given: is it the same training file?")
    values = np.array([pushed.get(name, 0.0) for name in names])
    return RowScores(values, names, found.method, found.steps, tuple(caveats))


def checkpoints_in_time(chosen: list[tuple[int, Path]], until: int | None) -> tuple[list[tuple[int, Path]], list[str]]:
    """Those saved by a step, or the first after it with a caveat that says so."""
    if until is None:
        return chosen, []
    before = [(step, folder) for step, folder in chosen if step <= until]
    if before:
        return before, []
    first = min(chosen)
    return [first], [
        f"No checkpoint was saved by step {until}: the ranking rests on the first one after it, of step {first[0]}."
    ]


def _caveats(scores: TrajectoryScores, n_checkpoints: int) -> list[str]:
    caveats = [
        f"{UNCHECKED} no retraining has confirmed this ranking; it is a first-order estimate over "
        f"{n_checkpoints} checkpoints."
    ]
    if scores.coverage.missing:
        caveats.append(f"Covers {scores.coverage.share:.1%} of the trained parameters.")
    return caveats


def _saved_steps(chosen: Sequence[tuple[int, Path]], base: Any, device: str) -> Iterator[SavedStep]:
    for step, folder in chosen:
        yield SavedStep(
            step, learning_rate_at(folder), partial(trainable_model, folder, base=base, device=device), folder
        )
