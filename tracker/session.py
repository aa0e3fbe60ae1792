"""What happens between the first step of an attempt and its last? One session: probes, journal, judgement, record."""

from __future__ import annotations

import copy
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffing.errors import InputError, PalimpsestError
from tracker.alarms.fusion import MisalignmentScore, ScoreStream
from tracker.detectors import Detector
from tracker.events import CheckpointSaved, RunEnded, RunStarted
from tracker.interventions import intervention_spans
from tracker.journal import Journal
from tracker.leading_persona import leading_persona
from tracker.pipeline import Pipeline
from tracker.plan import Plan
from tracker.preventive import PreventiveSteering, RunningSteering
from tracker.probes.base import Probe, RunningProbe, Subject
from tracker.probes.reference import read_tensors, write_tensors
from tracker.processes import n_processes
from tracker.report import write_run_report
from tracker.schedule import Schedule
from tracker.signals import Alert, DriftSignal
from tracker.sinks import RunInfo, Sink
from tracker.undisturbed import undisturbed

_log = logging.getLogger(__name__)
_PATIENCE = 3  # failures in a row before a probe is switched off
_SINK_SECONDS = 30.0


class TrackingError(PalimpsestError):
    """Something failed while tracking, and the tracker was told to be strict."""


@dataclass
class _Watched:
    """A running probe with its luck so far."""

    name: str
    schedule: Schedule
    running: RunningProbe
    failures: Counter[str] = field(default_factory=Counter)  # in a row, by what was called
    off: bool = False


@dataclass(frozen=True)
class SessionSettings:
    """What a session needs to know of the tracker that opens it.

    Attributes:
        run_dir: the run directory.
        schedule: when probes without a schedule of their own measure.
        detectors: judges; copied, since they remember.
        sinks: where the record goes.
        strict: raise what would otherwise be journalled.
        intervention: what is done to training passes, None for nothing.
        score: what several signals are fused into, None for nothing.
    """

    run_dir: Path
    schedule: Schedule
    detectors: tuple[Detector, ...]
    sinks: tuple[Sink, ...]
    strict: bool
    intervention: PreventiveSteering | None = None
    score: MisalignmentScore | None = None


class Session:
    """One attempt at a run: from its start or resume to its end, crash included.

    Never refers to the tracker that opened it, so that a tracker which is forgotten can still end its session.
    """

    def __init__(self, settings: SessionSettings, model: nn.Module, step: int, config: Mapping[str, Any]) -> None:
        self.settings = settings
        self.run_dir = settings.run_dir
        self.step = step
        self.ended = False
        self._model = model
        self._process = os.getpid()
        self._watched: list[_Watched] = []
        self.journal = Journal.create_or_open(self.run_dir)
        self.attempt = self.journal.start_attempt(step, config)
        self.pipeline = Pipeline(
            self.journal,
            copy.deepcopy(settings.detectors),
            settings.sinks,
            explain=self._evidence,
            derive=None if settings.score is None else ScoreStream(settings.score).take,
        )
        self._config = config
        self.intervention: RunningSteering | None = None

    # -- starting ------------------------------------------------------------------------------------------------

    def begin(self, plan: Plan, subject: Subject) -> list[Alert]:
        """Binds the probes, brings the detectors to where the journal stands, and measures the first point.

        Args:
            plan: what to measure.
            subject: the model under training.

        Returns:
            alerts that the first point, or the replayed series, makes.

        Raises:
            InputError: a probe that was asked for does not fit the model.
        """
        for probe in plan.probes:
            self._start_probe(probe, subject, named=probe.name in plan.named)
        self._restore_state()
        self._start_intervention(subject)
        run = RunInfo(self.run_dir, self.attempt, self.step, config=self._config, **plan.run_info(self.run_dir))
        alerts = self.pipeline.start(run)
        self.pipeline.event(RunStarted(self.step, self.attempt, self._config))
        if self.step == 0 or self.attempt == 0:
            alerts += self.measure(self._watched)
        self._check_strict()
        return alerts

    def _start_probe(self, probe: Probe, subject: Subject, *, named: bool) -> None:
        try:
            with undisturbed(self._model):
                running = probe.start(subject)
        except Exception as error:
            if named and isinstance(error, InputError):
                raise
            self._failed(f"probe {probe.name}", error)
            _log.warning("Probe %s is off: %s", probe.name, error)
            return
        self._watched.append(_Watched(probe.name, probe.schedule or self.settings.schedule, running))

    def _start_intervention(self, subject: Subject) -> None:
        settings = self.settings.intervention
        if settings is None:
            return
        if subject.compiled or n_processes() > 1:
            raise InputError(
                "Expected a training in one process without torch.compile, since an intervention acts by hooks in this "
                "process. Leave it out, or train without these."
            )
        # After the probes, so that what they read at a site is what its module made.
        spans = intervention_spans(self.journal) if self.step else ()
        earlier = [span for span in spans if span.name == settings.name]
        self.intervention = settings.start(subject.model, record=self.pipeline.event, earlier=earlier)

    def _restore_state(self) -> None:
        path = self._state_path(self.step)
        if self.step == 0 or not path.is_file():
            return
        try:
            kept = read_tensors(path).tensors
        except PalimpsestError as error:
            self._failed("probe state", error)
            return
        for watched in self._watched:
            prefix = f"{watched.name}/"
            state = {key.removeprefix(prefix): value for key, value in kept.items() if key.startswith(prefix)}
            if state:
                self._guarded(watched, watched.running.restore, state)

    # -- one training step ---------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Forward passes of a training step follow."""
        if self.intervention is not None:
            self.intervention.begin_step(self.step)
        for watched in self._watched:
            if not watched.off:
                self._guarded(watched, watched.running.begin_step)

    def before_update(self) -> None:
        """Gradients are complete; the optimizer has not stepped."""
        for watched in self._watched:
            if not watched.off:
                self._guarded(watched, watched.running.before_update)

    def end_step(self, step: int, signals: Sequence[DriftSignal] = (), *, last: bool = False) -> list[Alert]:
        """An optimizer step is complete: measures what is due, records, judges.

        Args:
            step: optimizer steps done.
            signals: further measurements of this step.
            last: no step follows: everything is measured once more.

        Returns:
            alerts raised now.
        """
        self.step = step
        if self.intervention is not None:
            self.intervention.end_step()
        for watched in self._watched:
            if not watched.off:
                self._guarded(watched, watched.running.end_step)
        due = [watched for watched in self._watched if not watched.off and (last or watched.schedule.due(step))]
        return self.measure(due, signals) if due or signals else []

    def measure(self, due: Iterable[_Watched], signals: Sequence[DriftSignal] = ()) -> list[Alert]:
        """Measures, records and judges, in one commit."""
        found = list(signals)
        # Taking and restoring the model's state costs more than a probe that only reads sums it already has.
        quiet = [watched for watched in due if not watched.off]
        touching = any(watched.running.touches_model for watched in quiet)
        around: AbstractContextManager[None] = undisturbed(self._model) if touching else nullcontext()
        with around:
            for watched in quiet:
                found += self._guarded(watched, watched.running.measure, self.step) or []
        return self.feed(found)

    def feed(self, signals: Sequence[DriftSignal]) -> list[Alert]:
        """Records and judges measurements."""
        alerts = self.pipeline.feed(signals)
        self._check_strict()
        return alerts

    def save_readings(self) -> None:
        """Probes write what they hold in memory, so that it can be read now."""
        for watched in self._watched:
            if not watched.off:
                self._guarded(watched, watched.running.save_readings)

    def _evidence(self, alert: Alert) -> dict[str, Any]:
        """What the probes know of an alert's cause; of one on no persona, what they know of the one that leads."""
        found: dict[str, Any] = {}
        about = alert
        if not alert.signal.startswith("persona/"):
            measured = [entry.item for entry in self.journal.latest(alert.step)]
            leading = leading_persona(alert, [one for one in measured if isinstance(one, DriftSignal)])
            if leading:
                found["about"], about = leading, replace(alert, signal=f"{leading}/prompt")
        for watched in self._watched:
            if not watched.off:
                found |= self._guarded(watched, watched.running.evidence, about) or {}
        return found

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save_state(self, step: int) -> None:
        """Keeps what probes have gathered since they last measured, for a resume from this step."""
        state: dict[str, Tensor] = {}
        for watched in self._watched:
            if not watched.off:
                found = self._guarded(watched, watched.running.state) or {}
                state |= {f"{watched.name}/{key}": value for key, value in found.items()}
        try:
            if state:
                write_tensors(self._state_path(step), state, f"step {step}")
        except OSError as error:
            self._failed("probe state", error)

    def checkpoint_saved(self, step: int, path: Path) -> None:
        """A checkpoint folder is complete on disk."""
        self.pipeline.event(CheckpointSaved(step, path))

    def _state_path(self, step: int) -> Path:
        return self.run_dir / "state" / f"step-{step}.safetensors"

    # -- ending --------------------------------------------------------------------------------------------------

    def end(self, status: str, *, timeout: float = _SINK_SECONDS) -> None:
        """Takes every hook off, records how it ended, writes the report, and sends what is left. Once."""
        if self.ended or os.getpid() != self._process:
            return
        self.ended = True
        if self.intervention is not None:
            self.intervention.close()
        for watched in self._watched:
            self._guarded(watched, watched.running.close)
        self.pipeline.event(RunEnded(self.step, status))
        self._write_report()
        health = self.pipeline.close(timeout)
        self.journal.close()
        if health.degraded:
            _log.warning(
                "The record of %s is degraded (%d failures): %s", self.run_dir, health.n_failures, health.reason
            )

    def abandon(self) -> None:
        """Ends a session that nobody will end: its training raised, or the process exits."""
        self.end("failed", timeout=5.0)

    def _write_report(self) -> None:
        # Before the sinks close, since they upload it.
        try:
            write_run_report(self.run_dir)
        except Exception as error:  # noqa: BLE001  the record is complete without its page
            self.pipeline.failure("report", self.step, error)

    # -- failures ------------------------------------------------------------------------------------------------

    def _guarded(self, watched: _Watched, call: Any, *arguments: Any) -> Any:
        try:
            result = call(*arguments)
        except Exception as error:  # noqa: BLE001  a probe must not stop the training it watches
            self._failed(f"probe {watched.name}", error)
            watched.failures[call.__name__] += 1
            if watched.failures[call.__name__] >= _PATIENCE:
                self._switch_off(watched, error)
            return None
        if watched.failures:
            watched.failures.pop(call.__name__, None)
        return result

    def _switch_off(self, watched: _Watched, error: Exception) -> None:
        watched.off = True
        _log.warning("Probe %s failed %d times in a row and is off: %s", watched.name, _PATIENCE, error)
        try:
            watched.running.close()
        except Exception as further:  # noqa: BLE001  already being switched off
            self._failed(f"probe {watched.name}", further)

    def _failed(self, where: str, error: Exception) -> None:
        if self.settings.strict and not self.ended:
            raise error
        self.pipeline.failure(where, self.step, error)

    def _check_strict(self) -> None:
        if self.settings.strict and self.pipeline.health.degraded:
            raise TrackingError(f"Tracking failed and strict is on: {self.pipeline.health.reason}")
