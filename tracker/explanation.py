"""On what does an alert rest? From what to what, how special that is, which rows pushed, what was clean before it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from attribution import AttributionRow
from diffing.durable import write_json
from diffing.errors import InputError, PathMissingError
from diffing.json_twin import from_plain, to_plain
from tracker.score_parts import PartAt
from tracker.specificity import Specificity

FOLDER = "explanations"


@dataclass(frozen=True)
class Reading:
    """One measurement of the signal.

    Attributes:
        step: optimizer step.
        value: its value.
        low: lower end of its 95 % interval, None where it had none.
        high: upper end.
    """

    step: int
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class SpecificityAt:
    """A drift beside random directions and styles, and where that was read.

    Attributes:
        found: the comparison.
        step: of the model it was read on.
        reference: what the shift is held against.
        source: `live` (kept with the alert when it fired) or `checkpoint`.
    """

    found: Specificity
    step: int
    reference: str
    source: str


@dataclass(frozen=True)
class PushedRows:
    """The rows that pushed the signal up most.

    Attributes:
        rows: strongest first, both ends.
        n_rows: how many were ranked.
        since: first step that counts.
        until: last one.
        source: `live` (each step's own backward) or `checkpoint` (exact gradients there).
        method: in words.
    """

    rows: tuple[AttributionRow, ...]
    n_rows: int
    since: int
    until: int
    source: str
    method: str


@dataclass(frozen=True)
class Explanation:
    """Everything that an alert rests on.

    Attributes:
        alert: its id.
        rule: what fired.
        signal: on what.
        unit: of the signal.
        threshold: what was exceeded.
        since: first step of the stretch above the threshold.
        step: where it fired.
        start: the signal's first measurement in the run.
        before: its last one before `since`.
        at: the one that fired.
        series: all measurements up to the end of the run.
        reference: what the signal is measured against.
        leading: the persona that the comparison and the rows speak of, where the alert's signal is made of several.
        parts: what the misalignment score was made of when it fired, for an alert on it.
        judged: figures of the judgement by name, as the detector gave them: p-value, level, number of benign runs,
            evidence, its own baseline.
        specificity: None where it could not be read.
        rows: likewise.
        called: how many rows the run's record calls out by the alert, of how many met; None where that is not known.
        checkpoint: (step, folder) of the last one saved before `since`; None where there is none on disk.
        caveats: what a reader must know.
    """

    alert: str
    rule: str
    signal: str
    unit: str
    threshold: float
    since: int
    step: int
    start: Reading
    before: Reading | None
    at: Reading
    series: tuple[Reading, ...]
    reference: str
    leading: str
    parts: tuple[PartAt, ...] = ()
    judged: Mapping[str, float] = field(default_factory=dict)
    specificity: SpecificityAt | None = None
    rows: PushedRows | None = None
    called: tuple[int, int] | None = None
    checkpoint: tuple[int, str] | None = None
    caveats: tuple[str, ...] = ()

    def save(self, run_dir: Path | str) -> Path:
        """Writes the JSON twin into the run directory."""
        return write_json(explanation_path(run_dir, self.alert), to_plain(self))

    @classmethod
    def load(cls, run_dir: Path | str, alert_id: str) -> Explanation:
        """Reads what `save` wrote.

        Raises:
            PathMissingError: this alert was not explained yet.
            InputError: the file is something else.
        """
        path = explanation_path(run_dir, alert_id)
        if not path.exists():
            raise PathMissingError(f"Expected {path}; it does not exist. Run `palimpsest explain {run_dir}` first.")
        try:
            return from_plain(cls, json.loads(path.read_text()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"Expected an explanation in {path}; got {error}. Explain the alert again.") from error


def explanation_path(run_dir: Path | str, alert_id: str) -> Path:
    """Where an alert's explanation is kept; the page stands beside it as `.html`."""
    kept = "".join(letter if letter.isalnum() or letter in "._-@~" else "_" for letter in alert_id)
    # Two ids that differ only in what a file name cannot hold must not share a file.
    mark = "" if kept == alert_id else f"-{hashlib.sha256(alert_id.encode()).hexdigest()[:8]}"
    return Path(run_dir) / FOLDER / f"{kept}{mark}.json"
