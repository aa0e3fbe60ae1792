"""What does a row of the journal hold, and how does a signal, an alert or an event become one and come back equal?"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tracker.events import (
    AlertAcknowledged,
    AlertChanged,
    CheckpointSaved,
    Event,
    InterventionChanged,
    RunEnded,
    RunStarted,
    StepEnded,
)
from tracker.signals import Alert, DriftSignal

SIGNAL_COLUMNS = "name, step, value, unit, low, high, n, reference"
ALERT_COLUMNS = "rule, signal, step, value, low, threshold, unit, since, severity, evidence"
EVENT_COLUMNS = "kind, step, body"


@dataclass(frozen=True)
class Attempt:
    """One start of the training process in this run directory.

    Attributes:
        number: 0 for the first start, one more for every resume or restart.
        step: optimizer steps already done when it started.
        started_ms: milliseconds since the epoch.
        config: resolved settings of tracker and trainer.
        ended_step: optimizer steps done when it ended, None where it never said so (still running, or killed).
        status: `finished`, `failed`, `stopped`, or None likewise.
    """

    number: int
    step: int
    started_ms: int
    config: Mapping[str, Any]
    ended_step: int | None
    status: str | None


@dataclass(frozen=True)
class Failure:
    """Something that was caught so that training could go on; one entry a distinct error.

    Attributes:
        place: what failed (`probe persona/evil`, `sink mlflow`).
        error: its text, first 500 characters, memory addresses removed.
        first_step: optimizer step at which it was first seen.
        last_step: optimizer step at which it was last seen.
        count: how often.
    """

    place: str
    error: str
    first_step: int
    last_step: int
    count: int


@dataclass(frozen=True)
class OutboxEntry:
    """One record that a sink has not acknowledged yet.

    Attributes:
        id: position in the journal; ascending in order of commit.
        time_ms: when it was recorded, milliseconds since the epoch; fixed for ever, so that sending it again is
            sending the same thing.
        item: the record.
    """

    id: int
    time_ms: int
    item: DriftSignal | Alert | Event


def signal_to_row(signal: DriftSignal) -> tuple[Any, ...]:
    """Values in the order of SIGNAL_COLUMNS."""
    numbers = (_number(signal.low), _number(signal.high), int(signal.n))
    return signal.name, int(signal.step), _number(signal.value), signal.unit, *numbers, signal.reference


def signal_from_row(row: Sequence[Any]) -> DriftSignal:
    """Reads what `signal_to_row` wrote; equal to it, NaN included."""
    name, step, value, unit, low, high, n, reference = row
    return DriftSignal(name, float(value), step, unit, _float(low), _float(high), n, reference)


def alert_to_row(alert: Alert) -> tuple[Any, ...]:
    """Values in the order of ALERT_COLUMNS."""
    numbers = (_number(alert.value), _number(alert.low), _number(alert.threshold))
    window = (alert.unit, int(alert.since), alert.severity)
    return alert.rule, alert.signal, int(alert.step), *numbers, *window, to_json(alert.evidence)


def alert_from_row(row: Sequence[Any]) -> Alert:
    """Reads what `alert_to_row` wrote."""
    rule, signal, step, value, low, threshold, unit, since, severity, evidence = row
    numbers = (float(value), _float(low), float(threshold))
    return Alert(rule, signal, step, *numbers, unit, since, severity, json.loads(evidence))


def event_to_row(event: Event) -> tuple[Any, ...]:
    """Values in the order of EVENT_COLUMNS."""
    match event:
        case RunStarted():
            body: dict[str, Any] = {"attempt": event.attempt, "config": event.config}
        case StepEnded():
            body = {"logs": event.logs}
        case CheckpointSaved():
            body = {"path": str(event.path)}
        case RunEnded():
            body = {"status": event.status}
        case AlertChanged() | AlertAcknowledged() | InterventionChanged():
            body = {name: value for name, value in asdict(event).items() if name != "step"}
    return type(event).__name__, int(event.step), to_json(body)


def event_from_row(row: Sequence[Any]) -> Event:
    """Reads what `event_to_row` wrote."""
    kind, step, text = row
    body = json.loads(text)
    if kind == "CheckpointSaved":
        return CheckpointSaved(step, Path(body["path"]))
    return _PLAIN_EVENTS[kind](step, **body)


_PLAIN_EVENTS: dict[str, Callable[..., Event]] = {
    event.__name__: event
    for event in (RunStarted, StepEnded, RunEnded, AlertChanged, AlertAcknowledged, InterventionChanged)
}


# What sinks send, in the journal's tables: (table, columns, row -> record).
OUTBOX: tuple[tuple[str, str, Callable[[Sequence[Any]], DriftSignal | Alert | Event]], ...] = (
    ("signals", SIGNAL_COLUMNS, signal_from_row),
    ("alerts", ALERT_COLUMNS, alert_from_row),
    ("events", EVENT_COLUMNS, event_from_row),
)

_COLUMNS = {table: f"id, attempt, time_ms, {columns}" for table, columns, _ in OUTBOX}
_INSERT = {
    table: f"INSERT INTO {table} ({columns}) VALUES ({', '.join('?' * len(columns.split(', ')))})"
    for table, columns in _COLUMNS.items()
}


def insert(connection: sqlite3.Connection, table: str, values: Sequence[Any]) -> None:
    """Adds one row: id, attempt, time_ms, then the record's own columns."""
    connection.execute(_INSERT[table], values)


def hide_earlier(connection: sqlite3.Connection, signal: DriftSignal, attempt: int, now: int) -> int | None:
    """Makes room for a measurement of which an earlier one, of the same name and step, may exist.

    Returns:
        the time to record it under, or None where the very same measurement already stands.
    """
    found = connection.execute(
        f"SELECT id, time_ms, superseded_by, {SIGNAL_COLUMNS} FROM signals WHERE name = ? AND step = ? "
        "ORDER BY id DESC LIMIT 1",
        (signal.name, int(signal.step)),
    ).fetchone()
    if found is None:
        return now
    row, time_ms, superseded_by, *columns = found
    same = tuple(columns) == signal_to_row(signal)
    if superseded_by is None:
        if same:
            return None
        connection.execute("UPDATE signals SET superseded_by = ? WHERE id = ?", (attempt, row))
    # A new value must be younger than the one it replaces even when the clock was set back: MLflow shows the youngest.
    return time_ms if same else max(now, time_ms + 1)


def to_json(value: Any) -> str:
    """JSON text; what JSON cannot say (paths, enums, tensors in a config) is written as its text."""
    return json.dumps(value, default=str, ensure_ascii=False)


def _number(value: float | None) -> float | str | None:
    if value is None:
        return None
    number = float(value)
    return "nan" if math.isnan(number) else number


def _float(value: float | str | None) -> float | None:
    return None if value is None else float(value)
