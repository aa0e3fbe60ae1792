"""How does a measurement become a record, an alert, and news elsewhere, without ever stopping the training?

signals → journal → detectors → alerts → journal → sinks are woken. Nothing here raises for what fails underneath:
the health says it, the journal counts it, and what the journal could not take is held in memory and written later.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tracker.alarms.run_series import by_step
from tracker.alert_life import Chronicle
from tracker.detectors import Detector
from tracker.events import AlertChanged, Event
from tracker.journal import Journal
from tracker.signals import Alert, DriftSignal
from tracker.sinks import RunInfo, Sink

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Health:
    """Whether the run's record is whole.

    Attributes:
        degraded: False while everything worked.
        reason: the first thing that went wrong, or ``.
        n_failures: how many failures were caught, in this process.
        n_held: records waiting in memory for a journal that does not take them.
        n_lost: records that had to be dropped because too many were waiting.
    """

    degraded: bool
    reason: str
    n_failures: int
    n_held: int
    n_lost: int


class Pipeline:
    """The one door between what measures and what records. All methods belong to the training thread.

    No method raises for a failing journal, detector or sink (disk full, a bug, a dead server): each is caught,
    counted in `health` and, as soon as the journal takes it, journalled. While the journal cannot be written,
    detectors still judge, and up to `hold` records wait in memory in order; beyond that the oldest are dropped and
    counted. Sinks see nothing that the journal does not hold.

    Args:
        journal: opened with `create_or_open`, its attempt started.
        detectors: asked in this order.
        sinks: woken in this order.
        hold: most records to keep in memory while the journal cannot be written.
        explain: what is known of an alert's cause when it fires, JSON values; added to its evidence.
        derive: makes further signals of those of one step, as a score of several; a function of what it was given so
            far, so that a resume which replays the journal brings it to where it was.
    """

    def __init__(
        self,
        journal: Journal,
        detectors: Sequence[Detector] = (),
        sinks: Sequence[Sink] = (),
        *,
        hold: int = 10_000,
        explain: Callable[[Alert], Mapping[str, Any]] | None = None,
        derive: Callable[[Sequence[DriftSignal]], Sequence[DriftSignal]] | None = None,
    ) -> None:
        self.journal = journal
        self.detectors = tuple(detectors)
        self.sinks = tuple(sinks)
        self._waiting: deque[tuple[Callable[..., object], tuple[object, ...]]] = deque()
        self._hold = hold
        self._explain = explain
        self._derive = derive
        self._reason = ""
        self._blocked = ""  # why the journal did not take the last record
        self._n_failures = 0
        self._n_lost = 0

    @property
    def health(self) -> Health:
        """Whether anything failed so far."""
        return Health(bool(self._reason), self._reason, self._n_failures, len(self._waiting), self._n_lost)

    def start(self, run: RunInfo) -> list[Alert]:
        """Brings the detectors to where the journal stands, then starts the sinks.

        Returns:
            alerts that the replayed series makes but the journal did not hold: the process was killed between a
            measurement and its judgement, or the detectors changed since. They are journalled now.
        """
        missed: list[Alert] = []
        try:
            recorded, known = self.journal.signals(), {(alert.id, alert.rule) for alert in self.journal.alerts()}
            lived = {event for event in self.journal.events() if isinstance(event, AlertChanged)}
        except Exception as error:  # noqa: BLE001  an unreadable journal must not stop training
            self.failure("journal replay", run.step, error)
            recorded, known, lived = [], set(), set()
        for _, measured in by_step(recorded):
            self._derived(measured)
        for signal in recorded:
            missed += [alert for alert in self._judge(signal) if (alert.id, alert.rule) not in known]
        for alert in missed:
            self._record(self.journal.record_alert, alert)
        for change in self._changes():
            if change not in lived:
                self._record(self.journal.record_event, change)
        for sink in self.sinks:
            self._guarded(f"sink {_name(sink)}", run.step, sink.start, run)
        if recorded or missed:
            self._wake(run.step)
        return missed

    def feed(self, signals: Sequence[DriftSignal]) -> list[Alert]:
        """Records measurements, judges them, records the alerts and wakes the sinks.

        Cost: one commit for all signals and one an alert; no fsync, no network.

        Returns:
            the alerts that these measurements raised, also when the journal could not take them.
        """
        if not signals:
            return []
        signals = [*signals, *self._derived(signals)]
        self._record(self.journal.record_signals, tuple(signals))
        alerts = [alert for signal in signals for alert in self._judge(signal)]
        for alert in alerts:
            self._record(self.journal.record_alert, alert)
        for change in self._changes():
            self._record(self.journal.record_event, change)
        self._wake(max(signal.step for signal in signals))
        return alerts

    def event(self, event: Event) -> None:
        """Records that something happened in the run and wakes the sinks."""
        self._record(self.journal.record_event, event)
        self._wake(event.step)

    def failure(self, where: str, step: int, error: BaseException | str) -> None:
        """Counts and journals a failure that the caller caught (a probe that raised)."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self._note(where, text)
        self._record(self.journal.record_failure, where, step, text)

    def close(self, timeout: float = 30.0) -> Health:
        """Writes what waits in memory and closes the sinks, which share the timeout in seconds; not the journal."""
        deadline = time.monotonic() + timeout
        self._write_waiting()
        for sink in self.sinks:
            self._guarded(f"sink {_name(sink)}", -1, sink.close, max(0.0, deadline - time.monotonic()))
        if self._waiting:
            _log.error("%d records could not be written to %s and are lost.", len(self._waiting), self.journal.run_dir)
        return self.health

    def _judge(self, signal: DriftSignal) -> list[Alert]:
        alerts = []
        for detector in self.detectors:
            try:
                alert = detector.observe(signal)
            except Exception as error:  # noqa: BLE001  a detector is the user's code; training goes on
                self.failure(f"detector {_rule(detector)}", signal.step, error)
                continue
            if alert is not None:
                alerts.append(self._explained(alert))
        return alerts

    def _derived(self, signals: Sequence[DriftSignal]) -> Sequence[DriftSignal]:
        if self._derive is None:
            return ()
        try:
            return self._derive(signals)
        except Exception as error:  # noqa: BLE001  a score that cannot be made must not stop training
            self.failure("derived signals", signals[-1].step if signals else -1, error)
            return ()

    def _changes(self) -> list[AlertChanged]:
        return [change for one in self.detectors if isinstance(one, Chronicle) for change in one.changes()]

    def _explained(self, alert: Alert) -> Alert:
        if self._explain is None:
            return alert
        try:
            return replace(alert, evidence={**alert.evidence, **self._explain(alert)})
        except Exception as error:  # noqa: BLE001  an alert without its cause is still an alert
            self.failure("alert evidence", alert.step, error)
            return alert

    def _wake(self, step: int) -> None:
        for sink in self.sinks:
            self._guarded(f"sink {_name(sink)}", step, sink.wake, step)

    def _guarded(self, where: str, step: int, call: Callable[..., object], *arguments: object) -> None:
        try:
            call(*arguments)
        except Exception as error:  # noqa: BLE001  a sink is the user's code; training goes on
            self.failure(where, step, error)

    def _record(self, write: Callable[..., object], *arguments: object) -> None:
        self._waiting.append((write, arguments))
        self._write_waiting()
        while len(self._waiting) > self._hold:
            self._waiting.popleft()
            self._n_lost += 1

    def _write_waiting(self) -> None:
        # Always through the queue: what waits longest is written first, so the journal keeps the order of events.
        while self._waiting:
            write, arguments = self._waiting[0]
            try:
                write(*arguments)
            except Exception as error:  # noqa: BLE001  disk full, a journal deleted underneath: training goes on
                text = f"{type(error).__name__}: {error}"
                self._note("journal", text)
                if isinstance(error, OSError):
                    self._blocked = text
                    return  # may pass: keep it and try again with the next record
                self._n_lost += 1  # will not pass: this record can never be written
            self._waiting.popleft()
            if self._blocked:
                story = f"{len(self._waiting) + 1} records had to wait: {self._blocked}"
                self._waiting.appendleft((self.journal.record_failure, ("journal", -1, story)))
                self._blocked = ""

    def _note(self, where: str, text: str) -> None:
        self._n_failures += 1
        if not self._reason:
            self._reason = f"{where}: {text}"
            _log.warning("Tracking is degraded, training goes on. %s", self._reason)


def _name(sink: Sink) -> str:
    return str(getattr(sink, "name", type(sink).__name__))


def _rule(detector: Detector) -> str:
    return str(getattr(detector, "rule", type(detector).__name__))
