"""Why did this alert fire? Recomputed from the run directory alone.

Each part says where it comes from, and what could not be told is a caveat, not an error: an alert without its rows is
still an alert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffing.checkpoint import LoadedCheckpoint, load_checkpoint
from diffing.errors import InputError, PalimpsestError, PathMissingError
from diffing.json_twin import from_plain
from diffing.persona import PersonaVector
from diffing.tap import Tap
from tracker.alarms.fusion import SCORE
from tracker.explain import explain_question, saved_checkpoints
from tracker.explanation import Explanation, PushedRows, Reading, SpecificityAt
from tracker.flagged_rows import flag_rows
from tracker.journal import Journal
from tracker.leading_persona import leading_persona
from tracker.live_cause import live_attribution
from tracker.probes.axes import group_axes
from tracker.probes.live_push import STEPS_IN_ALERT
from tracker.push_journal import PushJournal
from tracker.run_queries import alert_question, find_alert, probe_inputs_of, tracked_vectors
from tracker.saved_model import load_saved
from tracker.score_parts import score_parts
from tracker.signals import Alert, DriftSignal
from tracker.specificity import Specificity, measure_specificity
from tracker.training_rows import TrainingText

_AT_ONCE = 32
_NOT_JUDGED = ("n", "high")


@dataclass(frozen=True)
class Means:
    """What an explanation is computed with.

    Attributes:
        training: the rows that were trained on; needed for exact gradients, and for texts beside live pushes.
        base: what a full fine-tune started from, or an adapter's base where its own record is stale.
        tokenizer: of the canaries, for an alert on them.
        method: how rows are scored where the run recorded no pushes: `dot` or `ekfac`.
        batch_size: rows a backward pass.
        device: where to compute.
        keep: rows at either end.
        seed: of the random directions and of sampled labels.
    """

    training: TrainingText | None = None
    base: Any = None
    tokenizer: Any = None
    method: str = "ekfac"
    batch_size: int = 16
    device: str = "cpu"
    keep: int = 20
    seed: int = 0


@dataclass(frozen=True)
class _Case:
    """An alert with what the run has to say of it."""

    run_dir: Path
    alert: Alert
    leading: str
    checkpoints: tuple[tuple[int, Path], ...]
    means: Means


def explain_alert(run_dir: Path | str, alert_id: str, means: Means | None = None) -> Explanation:
    """Recomputes an alert's explanation and keeps it in the run directory.

    Args:
        run_dir: of a tracked run, finished or not.
        alert_id: as `palimpsest report` shows it.
        means: what it is computed with.

    Raises:
        InputError: no such alert; names those there are.
    """
    run_dir, alert = Path(run_dir), find_alert(run_dir, alert_id)
    signals = Journal.read(run_dir).signals()
    leading = leading_persona(alert, signals)
    caveats: list[str] = []
    if leading and not alert.signal.startswith(f"{leading}/"):
        why = "that made most of the score" if alert.signal == SCORE else "that had moved furthest"
        caveats.append(f"The comparison and the rows are about {leading}, the persona {why}.")
    case = _Case(run_dir, alert, leading, _checkpoints(run_dir, caveats), means or Means())
    compared = _specificity(case, caveats)
    pushed = _pushed(case, caveats)
    clean = [(step, str(folder)) for step, folder in case.checkpoints if step < alert.since]
    if case.checkpoints and not clean:
        caveats.append(f"No checkpoint was saved before step {alert.since}, where it began.")
    series = [_reading(one) for one in signals if one.name == alert.signal]
    fired = Reading(alert.step, alert.value, alert.low)
    found = Explanation(
        alert=alert.id,
        rule=alert.rule,
        signal=alert.signal,
        unit=alert.unit,
        threshold=alert.threshold,
        since=alert.since,
        step=alert.step,
        start=series[0] if series else fired,
        before=next((one for one in reversed(series) if one.step < alert.since), None),
        at=next((one for one in series if one.step == alert.step), fired),
        series=tuple(series),
        reference=str(alert.evidence.get("reference", "")),
        leading=leading,
        parts=score_parts(signals, step=alert.step, since=alert.since) if alert.signal == SCORE else (),
        judged=_judged(alert.evidence),
        specificity=compared,
        rows=pushed,
        called=_called(case),
        checkpoint=clean[-1] if clean else None,
        caveats=tuple(caveats),
    )
    found.save(run_dir)
    return found


def _judged(evidence: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of the detector, those of its baseline under `baseline_…`; what probes added has parts of its own."""
    baseline = evidence.get("baseline")
    inner = {f"baseline_{name}": value for name, value in baseline.items()} if isinstance(baseline, Mapping) else {}
    numbers = {name: value for name, value in {**evidence, **inner}.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items() if name not in _NOT_JUDGED}


def _called(case: _Case) -> tuple[int, int] | None:
    """Rows that `flag_rows` calls out up to the alert, and those that were met by then."""
    training = case.means.training
    if training is None or not case.leading:
        return None
    try:
        found = flag_rows(case.run_dir, case.leading.split("/")[1], training.rows, until=case.alert.step)
    except InputError:
        return None
    return len(found.places), len(found.met)


def _reading(signal: DriftSignal) -> Reading:
    return Reading(signal.step, signal.value, signal.low, signal.high)


def _checkpoints(run_dir: Path, caveats: list[str]) -> tuple[tuple[int, Path], ...]:
    try:
        return tuple(saved_checkpoints(run_dir))
    except InputError:
        caveats.append("No saved checkpoint is on disk: nothing could be measured again.")
        return ()


def _specificity(case: _Case, caveats: list[str]) -> SpecificityAt | None:
    """At the saved checkpoint nearest to the alert; as it was when it fired where there is none."""
    alert, means, kept = case.alert, case.means, _kept_live(case.alert)
    if not case.leading or not case.checkpoints:
        return kept
    step, folder = min(case.checkpoints, key=lambda one: (abs(one[0] - alert.step), one[0]))
    try:
        tuned = load_saved(folder, base=means.base, device=means.device)
        before, reference = _reference(tuned, case, step)
        found = _measured(case, before, tuned)
    except PalimpsestError as error:
        caveats.append(f"Random directions and styles could not be read again: {error}")
        return kept
    if step != alert.step:
        caveats.append(
            f"Random directions and other traits were read at the checkpoint of step {step}, the nearest one saved."
        )
    if not found.styles:
        caveats.append("No trait of style was tracked at this place, so that only random directions are compared.")
    return SpecificityAt(found, step, reference, "checkpoint")


def _kept_live(alert: Alert) -> SpecificityAt | None:
    kept = alert.evidence.get("specificity")
    if not isinstance(kept, Mapping):
        return None
    found = from_plain(Specificity, {"random_shown": [], **kept})
    return SpecificityAt(found, alert.step, str(alert.evidence.get("reference", "")), "live")


def _reference(tuned: LoadedCheckpoint, case: _Case, step: int) -> tuple[LoadedCheckpoint, str]:
    """What the shift is held against: the base, or else the run's first checkpoint."""
    if tuned.adapter_enabled is not None and tuned.base is not None:
        return tuned.base_side(), "the base"
    if case.means.base is not None:
        return load_checkpoint(case.means.base, device=case.means.device), "the base"
    first, folder = case.checkpoints[0]
    if first == step:
        raise InputError(
            "Expected the model that training started from, or a checkpoint before the alert's; got neither. "
            "Name the first with --base."
        )
    return load_saved(folder, device=case.means.device), f"the checkpoint of step {first}"


def _measured(case: _Case, before: LoadedCheckpoint, tuned: LoadedCheckpoint) -> Specificity:
    inputs = probe_inputs_of(case.run_dir)
    for one in group_axes(tuned.model, tracked_vectors(case.run_dir)):
        places = [name.rpartition("/")[0] for name in one.names("prompt")]
        if case.leading in places:
            vector = one.vectors[places.index(case.leading)]
            start, now = (_last_activations(side, vector, inputs, case.means.device) for side in (before, tuned))
            others = [other for other in one.vectors if other is not vector]
            shift = now.double().mean(dim=0) - start.double().mean(dim=0)
            return measure_specificity(shift, now, vector, others, seed=case.means.seed)
    raise PathMissingError(
        f"Expected the vector of {case.leading} in {case.run_dir}/personas, got none. Restore that folder from the run."
    )


def _last_activations(
    side: LoadedCheckpoint, vector: PersonaVector, inputs: Mapping[str, torch.Tensor], device: str
) -> torch.Tensor:
    """Activation of every probe prompt's last token `[prompt, d_model]`."""
    found = []
    with side.active() as model, torch.no_grad(), Tap(model, [vector.site], early_exit=True) as tap:
        for start in range(0, len(inputs["input_ids"]), _AT_ONCE):
            batch = {name: tensor[start : start + _AT_ONCE].to(device) for name, tensor in inputs.items()}
            (activations,) = tap.read(**batch)
            last = batch["attention_mask"].sum(dim=1) - 1
            found.append(activations[torch.arange(len(last), device=last.device), last].float().cpu())
    return torch.cat(found)


def _pushed(case: _Case, caveats: list[str]) -> PushedRows | None:
    """Live pushes where the run recorded them, else exact gradients at the nearest checkpoint before the alert."""
    alert, means = case.alert, case.means
    since = max(1, alert.step - STEPS_IN_ALERT + 1)
    live = _pushed_live(case, since, caveats)
    if live is not None:
        return live
    if means.training is None or not case.checkpoints:
        missing = "the training rows (--train)" if means.training is None else "a checkpoint on disk"
        caveats.append(f"Which rows pushed is not told: no pushes were recorded, and exact gradients need {missing}.")
        return None
    nearest = [one for one in case.checkpoints if one[0] <= alert.step] or [case.checkpoints[0]]
    try:
        question = alert_question(case.run_dir, alert.id, means.tokenizer, device=means.device, leading=case.leading)
        found = explain_question(
            case.run_dir, means.training, question, base=means.base, checkpoints=nearest[-1:], method=means.method,
            batch_size=means.batch_size, device=means.device, keep=means.keep, seed=means.seed, save=False,
        )  # fmt: skip
    except PalimpsestError as error:
        caveats.append(f"Which rows pushed is not told: {error}")
        return None
    caveats.append(
        f"Rows are ranked by exact gradients at step {nearest[-1][0]}, whenever they were met: the run recorded "
        "no pushes. No retraining has confirmed the ranking."
    )
    return PushedRows(found.rows, found.n_rows, since, alert.step, "checkpoint", found.method)


def _pushed_live(case: _Case, since: int, caveats: list[str]) -> PushedRows | None:
    training, until = case.means.training, case.alert.step
    try:
        watched = PushJournal.read(case.run_dir).queries
    except PathMissingError:
        return None
    trait = case.leading.split("/")[1] if case.leading else ""
    query = next((name for name in watched if name.split("/")[1:2] == [trait]), None)
    if query is None:
        return None
    found = live_attribution(
        case.run_dir,
        query,
        since=since,
        until=until,
        rows=() if training is None else training.rows,
        texts={} if training is None else training.texts,
        tags={} if training is None else training.tags,
        keep=case.means.keep,
    )
    if not found.rows:
        return None
    caveats.extend(found.caveats)
    return PushedRows(found.rows, found.n_rows, since, until, "live", found.method)
