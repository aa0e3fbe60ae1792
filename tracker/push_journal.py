"""What did every row push, step by step? A record that grows with the run and survives a kill.

One SQLite file (WAL) beside the journal, in the run directory. A step is one entry: the numbers of its rows and their
pushes as packed arrays, 4 bytes a row and 4 a push. As in the journal, a resume at step s hides what earlier attempts
recorded after s, so that a killed and resumed run reads like one that never was.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import Float

from attribution.live_rows import RowName
from diffing.errors import InputError, PathMissingError

FILE_NAME = "pushes.db"
_APPLICATION_ID = 0x50555348  # "PUSH": tells our file from any other SQLite file
_VERSION = 1
_BUSY_SECONDS = 2.0
_SCHEMA = """
CREATE TABLE attempts (number INTEGER PRIMARY KEY, step INTEGER NOT NULL, queries TEXT NOT NULL);
CREATE TABLE rows (number INTEGER PRIMARY KEY, example TEXT NOT NULL, tokens TEXT NOT NULL, UNIQUE (example, tokens));
CREATE TABLE steps (id INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, step INTEGER NOT NULL, rows BLOB NOT NULL,
    pushes BLOB NOT NULL, superseded_by INTEGER);
CREATE INDEX steps_by_step ON steps (step);
CREATE TABLE refreshes (id INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, step INTEGER NOT NULL, body TEXT NOT NULL,
    superseded_by INTEGER);
"""
# Apart from the others, so that records without it are read as before.
_CHOICES = """CREATE TABLE IF NOT EXISTS choices (id INTEGER PRIMARY KEY, attempt INTEGER NOT NULL,
    step INTEGER NOT NULL, body TEXT NOT NULL, superseded_by INTEGER)"""


@dataclass(frozen=True, eq=False)
class StepPushes:
    """The rows of one optimizer step and their pushes.

    Attributes:
        step: number of the step that the rows took part in (the first is 1).
        names: rows, in any order; a row that the batch holds twice stands there twice.
        pushes: `[row, query]`, how far the row's share of this step moves each query's value, to first order.
    """

    step: int
    names: tuple[RowName, ...]
    pushes: Float[np.ndarray, "row query"]


@dataclass(frozen=True)
class Refresh:
    """The queries' gradients were taken anew.

    Attributes:
        step: optimizer steps done then; later steps are held against these gradients.
        metric: `adam` or `plain`.
        kept: query to the share of its gradient's squared norm that is watched.
        missing: trained parameters that the queries depend on and that are not watched.
    """

    step: int
    metric: str
    kept: Mapping[str, float] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModulesRead:
    """From the next step on, until gradients are taken anew or all modules are read again, these were read.

    Attributes:
        step: optimizer steps done then.
        n: how many modules.
        of: out of how many.
        left_out: query to what the others add to a row's push beyond their mean: root mean square over the rows of the
            last steps that read all, in standard deviations of the push between those rows.
    """

    step: int
    n: int
    of: int
    left_out: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Visits:
    """Every time that a row took part in a step of some window.

    Attributes:
        step: `[visit]`.
        row: `[visit]`, place in `names`.
        push: `[visit]`, for one query.
        names: rows.
    """

    step: np.ndarray
    row: np.ndarray
    push: np.ndarray
    names: tuple[RowName, ...]

    def totals(self) -> Float[np.ndarray, " row"]:
        """Sum over visits for each row."""
        return np.bincount(self.row, weights=self.push, minlength=len(self.names))


def coverage(steps: np.ndarray, since: int, until: int) -> tuple[int, int]:
    """How many of the steps since the first that was read are among `steps`, and how many there were.

    Args:
        steps: of every visit in the window.
        since: first step of the window.
        until: its last step.
    """
    if not len(steps):
        return 0, until - since + 1
    return len(np.unique(steps)), until - max(since, int(steps.min())) + 1


class PushJournal:
    """The record of pushes of one run. Made for writing by `start`, for reading by `read`."""

    def __init__(self, path: Path, attempt: int, queries: tuple[str, ...], *, read_only: bool) -> None:
        self.path = path
        self.attempt = attempt
        self.queries = queries
        self._read_only = read_only
        self._numbers: dict[RowName, int] = {}
        self._kept: tuple[int, sqlite3.Connection] | None = None  # the writer's, with its process

    @classmethod
    def start(cls, run_dir: Path | str, step: int, queries: Sequence[str]) -> PushJournal:
        """Begins an attempt: hides what earlier ones recorded after `step`; everything where that is 0.

        Raises:
            OSError: the file cannot be written.
            InputError: it is not a record of pushes.
        """
        journal = cls(Path(run_dir) / FILE_NAME, 0, tuple(queries), read_only=False)
        journal.path.parent.mkdir(parents=True, exist_ok=True)
        with journal._writing() as connection:
            if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in _SCHEMA.strip().rstrip(";").split(";\n"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {_VERSION}")
            _check(journal.path, connection)
            connection.execute(_CHOICES)
            (journal.attempt,) = connection.execute("SELECT coalesce(max(number) + 1, 0) FROM attempts").fetchone()
            connection.execute(
                "INSERT INTO attempts VALUES (?, ?, ?)", (journal.attempt, step, json.dumps(list(queries)))
            )
            kept = step if step > 0 else -1
            # Pushes of step s are made by the step that leads to s; gradients taken at s serve the steps after it.
            connection.execute(
                "UPDATE steps SET superseded_by = ? WHERE step > ? AND superseded_by IS NULL", (journal.attempt, kept)
            )
            for table in ("refreshes", "choices"):
                connection.execute(
                    f"UPDATE {table} SET superseded_by = ? WHERE step >= ? AND superseded_by IS NULL",
                    (journal.attempt, kept),
                )
        return journal

    @classmethod
    def read(cls, run_dir: Path | str) -> PushJournal:
        """Opens a run's record to look; safe while it grows.

        Raises:
            PathMissingError: the run has none.
            InputError: the file is something else.
        """
        path = Path(run_dir) / FILE_NAME
        if not path.is_file():
            raise PathMissingError(
                f"Expected pushes of rows in {run_dir}, found no {FILE_NAME} there. "
                "Train with CheckpointTracker(pushes=True)."
            )
        journal = cls(path, -1, (), read_only=True)
        with journal._reading() as connection:
            _check(path, connection)
            found = connection.execute("SELECT number, queries FROM attempts ORDER BY number DESC LIMIT 1").fetchone()
        if found is not None:
            journal.attempt, journal.queries = found[0], tuple(json.loads(found[1]))
        return journal

    def record(self, steps: Sequence[StepPushes]) -> None:
        """Commits some steps, all or none.

        Raises:
            OSError: they could not be written.
        """
        if not steps:
            return
        known = dict(self._numbers)
        with self._writing() as connection:
            for one in steps:
                numbers = np.array([_number(connection, known, name) for name in one.names], "<i4")
                values = np.ascontiguousarray(one.pushes, "<f4").tobytes()
                connection.execute("UPDATE steps SET superseded_by = ? WHERE step = ? AND superseded_by IS NULL",
                                   (self.attempt, one.step))  # fmt: skip
                connection.execute(
                    "INSERT INTO steps (attempt, step, rows, pushes) VALUES (?, ?, ?, ?)",
                    (self.attempt, one.step, numbers.tobytes(), values),
                )
        self._numbers = known

    def refreshed(self, refresh: Refresh) -> None:
        """Commits that the queries' gradients were taken anew."""
        body = {"metric": refresh.metric, "kept": dict(refresh.kept), "missing": list(refresh.missing)}
        with self._writing() as connection:
            connection.execute(
                "INSERT INTO refreshes (attempt, step, body) VALUES (?, ?, ?)",
                (self.attempt, refresh.step, json.dumps(body)),
            )

    def refreshes(self) -> list[Refresh]:
        """When the queries' gradients were taken, by step."""
        with self._reading() as connection:
            found = connection.execute(
                "SELECT step, body FROM refreshes WHERE superseded_by IS NULL ORDER BY step, id"
            ).fetchall()
        bodies = [(step, json.loads(body)) for step, body in found]
        return [Refresh(step, body["metric"], body["kept"], tuple(body["missing"])) for step, body in bodies]

    def chose(self, choice: ModulesRead) -> None:
        """Commits which modules are read from now on."""
        body = json.dumps({"n": choice.n, "of": choice.of, "left_out": dict(choice.left_out)})
        with self._writing() as connection:
            connection.execute(
                "INSERT INTO choices (attempt, step, body) VALUES (?, ?, ?)", (self.attempt, choice.step, body)
            )

    def choices(self) -> list[ModulesRead]:
        """When it was settled that not all modules are read, by step."""
        with self._reading() as connection:
            if not connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'choices'").fetchone()[0]:
                return []
            found = connection.execute(
                "SELECT step, body FROM choices WHERE superseded_by IS NULL ORDER BY step, id"
            ).fetchall()
        return [ModulesRead(step, **json.loads(body)) for step, body in found]

    def close(self) -> None:
        """Lets go of the file. Harmless twice; a later write opens it again."""
        if self._kept is not None and self._kept[0] == os.getpid():
            self._kept[1].close()
        self._kept = None

    def last_step(self) -> int:
        """The newest step recorded, 0 where there is none."""
        with self._reading() as connection:
            (step,) = connection.execute("SELECT max(step) FROM steps WHERE superseded_by IS NULL").fetchone()
        return int(step or 0)

    def visits(self, query: str, *, since: int = 0, until: int | None = None) -> Visits:
        """Every row's every part in the steps `since` to `until`, both included, for one query.

        Raises:
            InputError: no such query was watched.
        """
        column = self._column(query)
        with self._reading() as connection:
            found = connection.execute(
                "SELECT steps.step, steps.rows, steps.pushes, attempts.queries FROM steps JOIN attempts "
                "ON attempts.number = steps.attempt WHERE superseded_by IS NULL AND steps.step >= ? "
                "AND steps.step <= ? ORDER BY steps.step, id",
                (since, 2**62 if until is None else until),
            ).fetchall()
            parts = [(step, np.frombuffer(rows, "<i4"), pushes, queries) for step, rows, pushes, queries in found]
            wanted = np.unique(np.concatenate([part[1] for part in parts])) if parts else np.zeros(0, "<i4")
            names = _names(connection, wanted)
        steps, rows, values = [], [], []
        for step, numbers, pushes, queries in parts:
            watched = json.loads(queries)
            if self.queries[column] not in watched:
                continue
            table = np.frombuffer(pushes, "<f4").reshape(len(numbers), len(watched))
            steps.append(np.full(len(numbers), step))
            rows.append(np.searchsorted(wanted, numbers))
            values.append(table[:, watched.index(self.queries[column])].astype(float))
        empty = [np.zeros(0)]
        return Visits(
            np.concatenate(steps or empty).astype(int),
            np.concatenate(rows or empty).astype(int),
            np.concatenate(values or empty),
            names,
        )

    def _column(self, query: str) -> int:
        matching = [index for index, name in enumerate(self.queries) if query in (name, *name.split("/")[1:2])]
        if not matching:
            raise InputError(
                f"Expected a watched query among {', '.join(self.queries) or 'none'}; got {query!r}. Name one of these."
            )
        return matching[0]

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
            except sqlite3.DatabaseError as error:
                raise OSError(
                    f"Could not write to {self.path}: {error}. What was recorded before is intact; free space or make "
                    "the folder writable."
                ) from error
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as connection:
            try:
                yield connection
            except sqlite3.DatabaseError as error:
                raise InputError(
                    f"Expected a record of pushes in {self.path}, got {error}. Restore it, or train again."
                ) from error

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        # Reads come from other threads and processes: a connection a call. The writer keeps its own, for closing the
        # last one folds the log into the file, which waits for the disk.
        if self._read_only:
            with closing(self._connect()) as connection:
                yield connection
            return
        if self._kept is None or self._kept[0] != os.getpid() or not self.path.exists():
            connection = self._connect()
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            self._kept = (os.getpid(), connection)
        yield self._kept[1]

    def _connect(self) -> sqlite3.Connection:
        uri = f"file:{quote(str(self.path.absolute()))}" + ("?mode=ro" if self._read_only else "")
        return sqlite3.connect(
            uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=self._read_only
        )


def _number(connection: sqlite3.Connection, known: dict[RowName, int], name: RowName) -> int:
    if name not in known:
        connection.execute("INSERT OR IGNORE INTO rows (example, tokens) VALUES (?, ?)", (name.example, name.tokens))
        (known[name],) = connection.execute(
            "SELECT number FROM rows WHERE example = ? AND tokens = ?", (name.example, name.tokens)
        ).fetchone()
    return known[name]


def _names(connection: sqlite3.Connection, numbers: np.ndarray) -> tuple[RowName, ...]:
    found: dict[int, RowName] = {}
    for start in range(0, len(numbers), 500):
        part = [int(number) for number in numbers[start : start + 500]]
        marks = ", ".join("?" * len(part))
        rows: list[Any] = connection.execute(
            f"SELECT number, example, tokens FROM rows WHERE number IN ({marks})", part
        ).fetchall()
        found |= {number: RowName(example, tokens) for number, example, tokens in rows}
    return tuple(found[int(number)] for number in numbers)


def _check(path: Path, connection: sqlite3.Connection) -> None:
    identity = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if (identity, version) != (_APPLICATION_ID, _VERSION):
        raise InputError(
            f"Expected a record of pushes of version {_VERSION} in {path}, found another program's or version's file. "
            "Track into a new folder, or read it with the palimpsest that wrote it."
        )
