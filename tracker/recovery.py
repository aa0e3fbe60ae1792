"""How does a training go on after an alert: from the last clean checkpoint, steered, or without the rows that did it?

    tracker = CheckpointTracker("runs/tracked", rules="rules.yaml", pushes=True)
    trainer = Trainer(..., callbacks=[tracker])
    train_with_recovery(trainer)                 # in place of trainer.train()

Nothing of this happens unless a rule asks for it (`actions: [rollback, drop, steer]`), and all of it stands in the
journal and on the report as an intervention.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset
from transformers import Trainer

from attribution.example import ExampleId, Row
from diffing.errors import InputError
from tracker.callback import CheckpointTracker
from tracker.checkpoint_folder import why_incomplete
from tracker.decision import WantedRecovery
from tracker.events import CheckpointSaved, InterventionChanged
from tracker.flagged_rows import FlaggedRows, flag_rows
from tracker.journal import Journal
from tracker.leading_persona import leading_persona
from tracker.run_queries import persona_of, probe_inputs_of, projection_query
from tracker.signals import Alert
from tracker.unmet_rows import as_hard_as, flag_unmet

_CLEAN = 0.25  # of the way from a signal's start to its threshold
ROLLBACK, DROPPED = "rollback", "rows dropped"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recovered:
    """One time that a training went on after an alert.

    Attributes:
        alert: what asked for it.
        checkpoint: where it went on from.
        step: optimizer steps of that checkpoint.
        dropped: rows that were left out from there on, those that pushed most first.
        left: rows that it went on with.
        steered: whether preventive steering was switched on.
    """

    alert: Alert
    checkpoint: Path
    step: int
    dropped: tuple[ExampleId, ...]
    left: int
    steered: bool


def train_with_recovery(
    trainer: Trainer,
    *,
    most: int = 1,
    drop_share: float = 0.5,
    judge_unmet: bool = True,
    resume_from_checkpoint: str | Path | None = None,
) -> tuple[Recovered, ...]:
    """Trains to the end; where an alert's rule asks to go back, drop rows or steer, does that and goes on.

    A clean checkpoint is the newest complete one at which the alert's signal had hardly left its start
    (`clean_checkpoint`); the Trainer must save some (`save_steps`). Optimizer, schedule, RNG and data position are
    those of that checkpoint. Rows to drop are those that `flag_rows` calls out up to the alert, by the pushes that
    every training step recorded (`pushes=True`). What no step had met by then is judged by its gradient at the alert's
    weights, at the cost of a pass over these rows.

    An alert that comes again sends the training further back than the one before. It drops only rows that push a
    quarter as hard as those that were dropped before, and none where there are none.

    Args:
        trainer: with a `CheckpointTracker` among its callbacks.
        most: recoveries; an alert after the last of them stops the training.
        drop_share: share of all rows that is dropped at most, strongest first, 0..1.
        judge_unmet: whether rows that no step had met may be dropped too.
        resume_from_checkpoint: where to begin, as for `Trainer.train`.

    Returns:
        the recoveries, in order; empty where no rule asked for any.

    Raises:
        InputError: the Trainer has no tracker, or there is no clean checkpoint or no push to act on. What was trained
            until then is intact.
    """
    if not 0 < drop_share < 1 or most < 0:
        raise InputError(
            f"Expected drop_share between 0 and 1 and most of 0 or more, got {drop_share} and {most}. Mend what is off."
        )
    callback = _tracker_of(trainer)
    made: list[Recovered] = []
    so_far = _SoFar(drop_share, judge_unmet)
    start = None if resume_from_checkpoint is None else str(resume_from_checkpoint)
    while True:
        trainer.train(resume_from_checkpoint=start)
        wanted = callback.tracker.wanted_recovery
        if wanted is None or len(made) == most:
            return tuple(made)
        recovered = _prepare(trainer, callback, wanted, so_far)
        made.append(recovered)
        _log.warning("Going on from step %d after %s.", recovered.step, recovered.alert.id)
        start = str(recovered.checkpoint)


def clean_checkpoint(journal: Journal, alert: Alert, *, before: int | None = None) -> CheckpointSaved:
    """The newest complete checkpoint at which the signal had gone a quarter of its way to the threshold at most.

    Where there is none, the newest one before the alert's stretch began. A model half of the way there goes the rest
    by itself: the optimizer's moments of the rows that are dropped are in the checkpoint too.

    Args:
        journal: of the run.
        alert: what was raised.
        before: a step that was gone back to already, and was not clean enough: an earlier one, where there is any.

    Raises:
        InputError: no checkpoint was saved before the stretch.
    """
    saved = [event for event in journal.events() if isinstance(event, CheckpointSaved) and event.step < alert.since]
    whole = [event for event in sorted(saved, key=lambda one: -one.step) if why_incomplete(event.path) is None]
    if before is not None:
        whole = [event for event in whole if event.step < before] or whole
    series = [one for one in journal.signals(alert.signal) if one.step < alert.since and math.isfinite(one.value)]
    for event in whole:
        values = [one.value for one in series if one.step <= event.step]
        if not values or values[-1] <= values[0] + _CLEAN * (alert.threshold - values[0]):
            return event
    if whole:
        return whole[0]
    raise InputError(
        f"Expected a complete checkpoint before step {alert.since}, where {alert.id} begins, found none. "
        "Let the Trainer save earlier (save_steps) and keep them (save_total_limit)."
    )


def flagged_until(
    run_dir: Path | str, alert: Alert, rows: Sequence[Row], *, until: int | None = None, share: float = 1.0
) -> FlaggedRows:
    """The rows that pushed what an alert is about, from the run's first step on.

    Args:
        run_dir: of a run that was tracked with `pushes=True`.
        alert: what was raised; of one on the misalignment score or on canaries, the leading persona counts.
        rows: tokenised, as trained on.
        until: last step that counts; None for the alert's own. Later steps tell more, where the training went on.
        share: of all rows, 0..1: at most so many.

    Raises:
        PathMissingError: the run recorded no pushes.
        InputError: none were recorded for what the alert is about, or none towards it.
    """
    query = alert.evidence.get("pushed_query")
    if not query:
        with Journal.read(run_dir) as journal:
            query = leading_persona(alert, journal.signals())
    if not query:
        raise InputError(
            f"Expected an alert on a persona, or a run that watches one, got {alert.id} without. Watch a persona."
        )
    # A trait is watched at its best place; the alert may speak of another one.
    trait = str(query).split("/")[1]
    return flag_rows(run_dir, trait, rows, until=alert.step if until is None else until, share=share)


@dataclass
class _SoFar:
    """How rows are dropped (at most which share, whether unmet ones too), and what earlier recoveries did."""

    share: float
    judge_unmet: bool
    step: int | None = None  # that was gone back to last
    gone: list[Row] = field(default_factory=list)
    standing: list[InterventionChanged] = field(default_factory=list)


def _prepare(trainer: Trainer, callback: CheckpointTracker, wanted: WantedRecovery, so_far: _SoFar) -> Recovered:
    alert, actions = wanted.alert, wanted.actions
    run_dir = callback.tracker.output_dir
    with Journal.attach(run_dir) as journal:
        clean = clean_checkpoint(journal, alert, before=so_far.step)
        dropped: tuple[ExampleId, ...] = ()
        dataset: Any = trainer.train_dataset
        if "drop" in actions:
            rows = _token_rows(dataset)
            flagged = _rows_to_drop(trainer, run_dir, alert, rows, so_far)
            dropped = flagged.names
            so_far.gone.extend(rows[place] for place in flagged.places)
            if dropped:
                trainer.train_dataset = dataset = _without(dataset, flagged.places)
        facts: dict[str, Any] = {"alert": alert.id, "from_step": alert.step, "to_step": clean.step}
        so_far.standing.append(InterventionChanged(alert.step, ROLLBACK, True, facts, alert.id))
        if dropped:
            told = {**facts, "rows": list(dropped), "left": len(dataset)}
            so_far.standing.append(InterventionChanged(alert.step, DROPPED, True, told, alert.id))
        _record(journal, clean.step, so_far.standing)
        so_far.step = clean.step
    steered = "steer" in actions
    if steered:
        callback.tracker.engage_at_start(alert.id)
    return Recovered(alert, clean.path, clean.step, dropped, len(dataset), steered)


def _rows_to_drop(trainer: Trainer, run_dir: Path, alert: Alert, rows: Sequence[Row], so_far: _SoFar) -> FlaggedRows:
    assert trainer.model is not None
    flagged = flagged_until(run_dir, alert, rows, share=so_far.share)
    if not (so_far.judge_unmet or so_far.gone):
        return flagged
    vector = persona_of(run_dir, flagged.trait)
    query = projection_query(vector, probe_inputs_of(run_dir), device=str(trainer.args.device))
    if so_far.judge_unmet:
        flagged = flag_unmet(trainer.model, rows, flagged, query)
    return as_hard_as(trainer.model, rows, flagged, so_far.gone, query).first(so_far.share)


def _record(journal: Journal, step: int, standing: list[InterventionChanged]) -> None:
    """Records what was done, and again what was done before at later steps: it stands, though its steps do not."""
    for place, change in enumerate(standing):
        if change.step > step:
            # At the step that training goes back to, so that the resume which follows does not take it back.
            standing[place] = change = replace(change, step=step)
            journal.record_event(change)
            journal.record_event(replace(change, engaged=False))


def _tracker_of(trainer: Trainer) -> CheckpointTracker:
    found = [one for one in trainer.callback_handler.callbacks if isinstance(one, CheckpointTracker)]
    if len(found) != 1:
        raise InputError(
            f"Expected one CheckpointTracker among the Trainer's callbacks, got {len(found)}. Pass callbacks=[tracker]."
        )
    return found[0]


def _token_rows(dataset: Any) -> list[Row]:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise InputError("Expected a dataset with a length to drop rows from, got a stream. Load it into memory first.")
    rows = [dataset[place] for place in range(len(dataset))]
    if not rows or "input_ids" not in rows[0]:
        raise InputError("Expected tokenised rows with input_ids in the Trainer's dataset, got others. Tokenise first.")
    return rows


def _without(dataset: Any, flagged: Sequence[int]) -> Any:
    gone = set(flagged)
    kept = [place for place in range(len(dataset)) if place not in gone]
    # A `datasets.Dataset` keeps its columns, which the Trainer looks at.
    selected: Dataset[Any] = dataset.select(kept) if hasattr(dataset, "select") else Subset(dataset, kept)
    return selected
