"""What happened in this run? The journal is the truth: written before every sink, read by every report.

One SQLite file (WAL) in the run directory. A batch of signals is one commit; a kill at any moment loses nothing
that was acknowledged. Resuming at step s starts a new attempt and hides (never deletes) what earlier attempts
measured after s, so that a run that crashed at 7 and resumed from 5 reads like one that never crashed.
"""

from __future__ import annotations

import heapq
import json
import re
import sqlite3
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tracker import journal_rows as rows
from tracker.events import AlertChanged, CheckpointSaved, Event, InterventionChanged, RunEnded, StepEnded
from tracker.journal_file import (
    JournalCorruptError,
    JournalError,
    JournalFile,
    JournalLockedError,
    JournalMissingError,
    JournalWriteError,
    RunLock,
)
from tracker.journal_rows import Attempt, Failure, OutboxEntry
from tracker.signals import Alert, DriftSignal

__all__ = [
    "Attempt",
    "Failure",
    "Journal",
    "JournalCorruptError",
    "JournalError",
    "JournalLockedError",
    "JournalMissingError",
    "JournalWriteError",
    "OutboxEntry",
]

_ERROR_CHARACTERS = 500


class Journal:
    """The record of one run. Any thread may use one object; any number of processes may read.

    Open with `create_or_open` to record, with `attach` to send on and add afterwards, with `read` to look.
    Every `record_*` either has committed when it returns or raises JournalWriteError (an OSError), in which case
    nothing of that call was written. Cost: one commit a call, see benchmarks; no fsync except for run starts,
    run ends and checkpoints.
    """

    def __init__(self, file: JournalFile, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.attempt: int | None = None
        self._file = file
        self._lock = RunLock(run_dir)

    @classmethod
    def create_or_open(cls, run_dir: Path | str) -> Journal:
        """Opens the run directory's journal for recording, making both where they are missing.

        Raises:
            JournalCorruptError: `journal.db` there is not a journal.
            JournalWriteError: it cannot be created (disk full, read-only).
        """
        return cls(JournalFile(Path(run_dir), create=True), Path(run_dir))

    @classmethod
    def attach(cls, run_dir: Path | str) -> Journal:
        """Opens an existing journal to read, to send on (sinks, `palimpsest sync`) and to add to.

        Raises:
            JournalMissingError: the folder holds no journal.
            JournalCorruptError: `journal.db` there is not a journal.
        """
        return cls(JournalFile(Path(run_dir)), Path(run_dir))

    @classmethod
    def read(cls, run_dir: Path | str) -> Journal:
        """Opens an existing journal to read only; errors as `attach`. Safe while the run is being recorded."""
        return cls(JournalFile(Path(run_dir), read_only=True), Path(run_dir))

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Journal({str(self.run_dir)!r}, attempt={self.attempt})"

    def close(self) -> None:
        """Closes the file and lets go of the run directory. Harmless when repeated."""
        self._file.close()
        self._lock.release()

    # -- recording -----------------------------------------------------------------------------------------------

    def start_attempt(self, step: int, config: Mapping[str, Any] | None = None) -> int:
        """Claims the run directory and hides what earlier attempts recorded after `step`.

        Args:
            step: optimizer steps already done. 0 is a fresh start and hides everything recorded before.
            config: resolved settings of tracker and trainer, JSON values.

        Returns:
            the attempt's number, 0 for the first.

        Raises:
            JournalLockedError: another living process is recording here.
            JournalWriteError: it could not be written.
        """
        try:
            self._lock.acquire()
        except OSError as error:
            raise JournalWriteError(f"Could not lock {self.run_dir}: {error.strerror}.") from error
        with self._file.writing(durable=True) as connection:
            (number,) = connection.execute("SELECT coalesce(max(number) + 1, 0) FROM attempts").fetchone()
            connection.execute(
                "INSERT INTO attempts VALUES (?, ?, ?, ?, NULL, NULL)",
                (number, step, _now_ms(), rows.to_json(config or {})),
            )
            kept = step if step > 0 else -1
            kinds = [one.__name__ for one in (StepEnded, CheckpointSaved, AlertChanged, InterventionChanged)]
            marks = ", ".join("?" * len(kinds))
            for table in ("signals", "alerts"):
                connection.execute(
                    f"UPDATE {table} SET superseded_by = ? WHERE step > ? AND superseded_by IS NULL", (number, kept)
                )
            connection.execute(
                f"UPDATE events SET superseded_by = ? WHERE step > ? AND superseded_by IS NULL AND kind IN ({marks})",
                (number, kept, *kinds),
            )
        self.attempt = number
        return number

    def record_signals(self, signals: Sequence[DriftSignal]) -> None:
        """Commits a batch of measurements, all or none.

        Of two measurements of one name at one step the later stands. One that equals what an earlier attempt
        measured keeps its time, so that a sink that already sent it sends the same thing again.
        """
        if not signals:
            return
        with self._file.writing() as connection:
            attempt, next_id, now = self._begin(connection)
            for signal in signals:
                time_ms = rows.hide_earlier(connection, signal, attempt, now)
                if time_ms is not None:
                    rows.insert(connection, "signals", (next_id, attempt, time_ms, *rows.signal_to_row(signal)))
                    next_id += 1

    def record_event(self, event: Event) -> None:
        """Commits one event; run starts, run ends and checkpoints also wait for the disk."""
        with self._file.writing(durable=not isinstance(event, StepEnded)) as connection:
            attempt, next_id, now = self._begin(connection)
            rows.insert(connection, "events", (next_id, attempt, now, *rows.event_to_row(event)))
            if isinstance(event, RunEnded):
                connection.execute(
                    "UPDATE attempts SET ended_step = ?, status = ? WHERE number = ?",
                    (event.step, event.status, attempt),
                )

    def record_alert(self, alert: Alert) -> bool:
        """Commits an alert once: the same rule firing on the same signal at the same step is the same alert.

        Returns:
            True when it was new.
        """
        with self._file.writing() as connection:
            attempt, next_id, now = self._begin(connection)
            if connection.execute(
                "SELECT 1 FROM alerts WHERE signal = ? AND step = ? AND rule = ? AND superseded_by IS NULL",
                (alert.signal, alert.step, alert.rule),
            ).fetchone():
                return False
            rows.insert(connection, "alerts", (next_id, attempt, now, *rows.alert_to_row(alert)))
        return True

    def record_failure(self, where: str, step: int, error_text: str) -> None:
        """Counts a failure that was caught; the same text at the same place is one entry."""
        error = re.sub(r"0x[0-9a-fA-F]{6,}", "0x…", error_text.strip() or "no message")[:_ERROR_CHARACTERS]
        now = _now_ms()
        with self._file.writing() as connection:
            connection.execute(
                "INSERT INTO failures VALUES (?, ?, ?, ?, 1, ?, ?) ON CONFLICT DO UPDATE SET "
                "last_step = excluded.last_step, last_ms = excluded.last_ms, count = count + 1",
                (where, error, step, step, now, now),
            )

    def _begin(self, connection: sqlite3.Connection) -> tuple[int, int, int]:
        (latest,) = connection.execute("SELECT coalesce(max(number), 0) FROM attempts").fetchone()
        if self.attempt is not None and self.attempt != latest:
            raise JournalError(
                f"Attempt {self.attempt} no longer records in {self.run_dir}: attempt {latest} took over. "
                "Give each run its own output_dir."
            )
        (next_id,) = connection.execute(
            "SELECT max(coalesce((SELECT max(id) FROM signals), 0), coalesce((SELECT max(id) FROM alerts), 0), "
            "coalesce((SELECT max(id) FROM events), 0)) + 1"
        ).fetchone()
        return latest, next_id, _now_ms()

    # -- reading -------------------------------------------------------------------------------------------------

    def signals(self, name: str | None = None) -> list[DriftSignal]:
        """Measurements that stand, by step and then in order of recording; all names, or one."""
        where, values = ("AND name = ?", (name,)) if name is not None else ("", ())
        with self._file.reading() as connection:
            found = connection.execute(
                f"SELECT {rows.SIGNAL_COLUMNS} FROM signals WHERE superseded_by IS NULL {where} ORDER BY step, id",
                values,
            ).fetchall()
        return [rows.signal_from_row(row) for row in found]

    def frame(self) -> pd.DataFrame:
        """Measurements that stand, one row each: the fields of DriftSignal, `attempt`, and `time` (UTC)."""
        with self._file.reading() as connection:
            found = connection.execute(
                f"SELECT {rows.SIGNAL_COLUMNS}, attempt, time_ms FROM signals WHERE superseded_by IS NULL "
                "ORDER BY step, id"
            ).fetchall()
        frame = pd.DataFrame(found, columns=[*rows.SIGNAL_COLUMNS.split(", "), "attempt", "time"])
        frame["time"] = pd.to_datetime(frame["time"], unit="ms", utc=True)
        return frame.astype({"value": float, "low": float, "high": float})

    def events(self) -> list[Event]:
        """Events that stand, in order of recording; starts and ends of all attempts."""
        with self._file.reading() as connection:
            found = connection.execute(
                "SELECT kind, step, body FROM events WHERE superseded_by IS NULL ORDER BY id"
            ).fetchall()
        return [rows.event_from_row(row) for row in found]

    def alerts(self) -> list[Alert]:
        """Alerts that stand, by step."""
        with self._file.reading() as connection:
            found = connection.execute(
                f"SELECT {rows.ALERT_COLUMNS} FROM alerts WHERE superseded_by IS NULL ORDER BY step, id"
            ).fetchall()
        return [rows.alert_from_row(row) for row in found]

    def failures(self) -> list[Failure]:
        """What was caught in all attempts, oldest first."""
        with self._file.reading() as connection:
            found = connection.execute(
                "SELECT place, error, first_step, last_step, count FROM failures ORDER BY first_ms, rowid"
            ).fetchall()
        return [Failure(*row) for row in found]

    def attempts(self) -> list[Attempt]:
        """All starts of the run, first to last."""
        with self._file.reading() as connection:
            found = connection.execute(
                "SELECT number, step, started_ms, config, ended_step, status FROM attempts ORDER BY number"
            ).fetchall()
        return [
            Attempt(number, step, started, json.loads(config), ended, status)
            for number, step, started, config, ended, status in found
        ]

    def latest(self, step: int) -> list[OutboxEntry]:
        """Every signal's newest measurement at or before `step`."""
        with self._file.reading() as connection:
            found = connection.execute(
                f"SELECT id, time_ms, {rows.SIGNAL_COLUMNS}, max(step) FROM signals "
                "WHERE superseded_by IS NULL AND step <= ? GROUP BY name ORDER BY name",
                (step,),
            ).fetchall()
        return [OutboxEntry(row[0], row[1], rows.signal_from_row(row[2:-1])) for row in found]

    def last_ms(self) -> int | None:
        """When something was last recorded, milliseconds since the epoch; None in an empty journal."""
        with self._file.reading() as connection:
            times = [
                connection.execute(f"SELECT max(time_ms) FROM {table}").fetchone()[0] for table, _, _ in rows.OUTBOX
            ]
        return max((time_ms for time_ms in times if time_ms is not None), default=None)

    def is_live(self) -> bool:
        """Whether a living process, this one included, is recording here."""
        return self._lock.is_held()

    # -- the outbox: what each sink still has to send ------------------------------------------------------------

    def pending(self, sink: str, limit: int = 1000) -> list[OutboxEntry]:
        """The oldest `limit` records that stand and that the sink has not acknowledged."""
        with self._file.reading() as connection:
            # One transaction over the three tables: a record between two queries would be skipped for ever.
            cursor = _cursor(connection, sink)
            streams = [
                [
                    OutboxEntry(row[0], row[1], restore(row[2:]))
                    for row in connection.execute(
                        f"SELECT id, time_ms, {columns} FROM {table} WHERE id > ? AND superseded_by IS NULL "
                        "ORDER BY id LIMIT ?",
                        (cursor, limit),
                    )
                ]
                for table, columns, restore in rows.OUTBOX
            ]
        return list(heapq.merge(*streams, key=lambda entry: entry.id))[:limit]

    def n_pending(self, sink: str) -> int:
        """How many records the sink has not acknowledged."""
        with self._file.reading() as connection:
            cursor = _cursor(connection, sink)
            return sum(
                connection.execute(
                    f"SELECT count(*) FROM {table} WHERE id > ? AND superseded_by IS NULL", (cursor,)
                ).fetchone()[0]
                for table, _, _ in rows.OUTBOX
            )

    def acknowledge(self, sink: str, up_to_id: int) -> None:
        """Says that the sink has safely sent every record up to this id; never moves backwards."""
        with self._file.writing() as connection:
            if up_to_id > _cursor(connection, sink):
                _put(connection, sink, "cursor", up_to_id)

    def sink_state(self, sink: str) -> dict[str, Any]:
        """What a sink remembers across restarts (MLflow's run id, what was uploaded)."""
        with self._file.reading() as connection:
            found = connection.execute("SELECT key, value FROM sinks WHERE sink = ?", (sink,)).fetchall()
        return {key: json.loads(value) for key, value in found}

    def remember(self, sink: str, **state: Any) -> None:
        """Adds to what the sink remembers; JSON values; None forgets."""
        with self._file.writing() as connection:
            for key, value in state.items():
                _put(connection, sink, key, value)


def _cursor(connection: sqlite3.Connection, sink: str) -> int:
    found = connection.execute("SELECT value FROM sinks WHERE sink = ? AND key = 'cursor'", (sink,)).fetchone()
    return int(found[0]) if found else 0


def _put(connection: sqlite3.Connection, sink: str, key: str, value: Any) -> None:
    if value is None:
        connection.execute("DELETE FROM sinks WHERE sink = ? AND key = ?", (sink, key))
    else:
        connection.execute("INSERT OR REPLACE INTO sinks VALUES (?, ?, ?)", (sink, key, rows.to_json(value)))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
