"""What does a run directory prove, and what is missing from it?"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from attribution.ranking import Attribution
from diffing.diff_result import DiffResult
from diffing.errors import InputError, PathMissingError
from tracker.alert_life import Incident, incidents
from tracker.events import CheckpointSaved
from tracker.explanation import explanation_path
from tracker.interventions import InterventionSpan, intervention_spans
from tracker.journal import Attempt, Failure, Journal
from tracker.report.names import BEHAVIOUR
from tracker.report.text import number
from tracker.signals import Alert, DriftSignal

TOLERATED_RATE = 0.05  # share of misaligned answers that the page holds the behaviour against


@dataclass(frozen=True)
class RunReport:
    """Everything that one run directory proves.

    Attributes:
        name: the folder's name.
        signals: measurements that stand, by step.
        alerts: alerts that stand, by step.
        failures: what was caught so that training could go on.
        attempts: starts of the run, first to last.
        incidents: where every alert stands: pending, firing, acknowledged or resolved.
        interventions: what was done to the training itself, in order.
        explanations: alert's id to its page, relative to the folder, where `palimpsest explain` made one.
        checkpoints: (step, folder) of every checkpoint saved, by step.
        attribution: the training rows that pushed, None where nobody asked.
        diff: what changed from the base, None where no diff was made.
        probes: the probe set as the run kept it, empty where it kept none.
        personas: file names of the persona vectors kept with the run.
        live: whether a process was recording when the report was made.
        missing: what the directory does not hold, one sentence each, with the way to get it.
    """

    name: str
    signals: tuple[DriftSignal, ...] = ()
    alerts: tuple[Alert, ...] = ()
    failures: tuple[Failure, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    incidents: tuple[Incident, ...] = ()
    interventions: tuple[InterventionSpan, ...] = ()
    explanations: Mapping[str, str] = field(default_factory=dict)
    checkpoints: tuple[tuple[int, str], ...] = ()
    attribution: Attribution | None = None
    diff: DiffResult | None = None
    probes: Mapping[str, Any] = field(default_factory=dict)
    personas: tuple[str, ...] = ()
    live: bool = False
    missing: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all signals, sorted."""
        return tuple(self._by_name)

    @property
    def last_step(self) -> int:
        """The latest step anything is known of."""
        steps = [signal.step for signal in self.signals] + [alert.step for alert in self.alerts]
        steps += [attempt.ended_step or attempt.step for attempt in self.attempts]
        return max(steps, default=0)

    @property
    def status(self) -> str:
        """`finished`, `failed`, `stopped`, `running`, or `broken off` when the last attempt never said how it ended."""
        if self.attempts and self.attempts[-1].status:
            return str(self.attempts[-1].status)
        return "running" if self.live else "broken off"

    @property
    def n_failures(self) -> int:
        """How many times something was caught."""
        return sum(failure.count for failure in self.failures)

    def series(self, name: str) -> tuple[DriftSignal, ...]:
        """One signal's measurements, by step."""
        return self._by_name.get(name, ())

    @functools.cached_property
    def _by_name(self) -> dict[str, tuple[DriftSignal, ...]]:
        found: dict[str, list[DriftSignal]] = {}
        for signal in self.signals:
            found.setdefault(signal.name, []).append(signal)
        return {name: tuple(found[name]) for name in sorted(found)}

    def behaviour_crossing(self, tolerated: float = TOLERATED_RATE) -> int | None:
        """First step at which the misaligned-answer rate was above what is tolerated, None where it never was."""
        return next((signal.step for signal in self.series(BEHAVIOUR) if signal.value > tolerated), None)

    def to_json(self) -> dict[str, Any]:
        """The twin for machines: everything but the diff, which has its own."""
        return {
            "format": 1,
            "name": self.name,
            "status": self.status,
            "last_step": self.last_step,
            "signals": [asdict(signal) for signal in self.signals],
            "alerts": [{"id": alert.id, **asdict(alert)} for alert in self.alerts],
            "incidents": [
                {"fingerprint": one.fingerprint, "rule": one.rule, "state": one.state, "since": one.since, "by": one.by}
                for one in self.incidents
            ],
            "interventions": [asdict(one) for one in self.interventions],
            "failures": [asdict(failure) for failure in self.failures],
            "attempts": [asdict(attempt) for attempt in self.attempts],
            "checkpoints": [{"step": step, "path": path} for step, path in self.checkpoints],
            "attribution": None if self.attribution is None else asdict(self.attribution),
            "diff": None if self.diff is None else self.diff.counts(),
            "behaviour_crossing": self.behaviour_crossing(),
            "probes": {key: value for key, value in self.probes.items() if key != "input_ids"},
            "personas": list(self.personas),
            "missing": list(self.missing),
        }


def collect_run(run_dir: Path | str) -> RunReport:
    """Reads a run directory; nothing in it is changed, and it may still be written by the run.

    Raises:
        PathMissingError: there is no journal.
        JournalCorruptError: the journal is damaged.
    """
    folder = Path(run_dir)
    with Journal.read(folder) as journal:
        events, alerts = journal.events(), journal.alerts()
        checkpoints = sorted({(e.step, str(e.path)) for e in events if isinstance(e, CheckpointSaved)})
        report = RunReport(
            name=folder.resolve().name,
            signals=tuple(journal.signals()),
            alerts=tuple(alerts),
            incidents=tuple(incidents(alerts, events)),
            interventions=intervention_spans(journal),
            failures=tuple(journal.failures()),
            attempts=tuple(journal.attempts()),
            checkpoints=tuple(checkpoints),
            live=journal.is_live(),
        )
    return _with_files(report, folder)


def find_runs(folder: Path | str) -> list[Path]:
    """The run itself when the folder is one, else the runs directly inside it, by name.

    Raises:
        PathMissingError: the folder does not exist.
        InputError: there is no run in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PathMissingError(
            f"Expected a run directory at {folder}, found none. Give the output_dir of a tracked run."
        )
    if (folder / "journal.db").is_file():
        return [folder]
    runs = sorted(path.parent for path in folder.glob("*/journal.db"))
    if not runs:
        raise InputError(
            f"Expected a tracked run in {folder}, found no journal.db there or one level below. "
            "Give the output_dir of a run made with CheckpointTracker."
        )
    return runs


def _with_files(report: RunReport, folder: Path) -> RunReport:
    notes: list[str] = []
    attribution = _optional(Attribution.load, folder, folder / "attribution.json", notes)
    diff = _optional(DiffResult.load, folder / "diff", folder / "diff" / "diff.json", notes)
    probes = _optional(_read_json, folder / "probes.json", folder / "probes.json", notes)
    personas = tuple(sorted(path.name for path in folder.glob("personas/*.safetensors")))
    pages = {alert.id: explanation_path(folder, alert.id).with_suffix(".html") for alert in report.alerts}
    explained = {name: str(page.relative_to(folder)) for name, page in pages.items() if page.is_file()}
    whole = replace(
        report, attribution=attribution, diff=diff, probes=probes or {}, personas=personas, explanations=explained
    )
    return replace(whole, missing=(*notes, *_missing(whole)))


def _optional(load: Any, argument: Path, path: Path, notes: list[str]) -> Any:
    """A part that a run may lack; one that is there but cannot be read is said, never silently dropped."""
    if not path.exists():
        return None
    try:
        return load(argument)
    except (InputError, OSError) as error:
        notes.append(str(error))
        return None


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"Expected JSON in {path}, got something else ({error}). Restore the file.") from error
    return value if isinstance(value, dict) else {}


def _missing(report: RunReport) -> list[str]:
    said = []
    if not report.signals:
        said.append("No measurement was recorded: the run ended before the first probe, or every probe failed.")
    if not any(name.startswith("persona/") for name in report.names):
        said.append("No persona was tracked. Pass personas=[…] to the tracker to watch one.")
    elif not report.probes:
        said.append("The probe prompts were not kept (no probes.json): these projections cannot be measured again.")
    if BEHAVIOUR not in report.names:
        said.append(
            "No behaviour was measured: drift is read from activations, no answers were sampled and judged in this run."
        )
    if report.attribution is None:
        said.append("No training rows are ranked. `palimpsest attribute` asks which rows pushed the projection.")
    if report.diff is None:
        said.append(
            "No diff with the base model was made. `palimpsest diff` with --out in this folder’s diff/ adds one."
        )
    if not report.checkpoints:
        said.append("No checkpoint was saved under the tracker, so nothing can be measured again later.")
    bare = sorted({s.name for s in report.signals if s.low is None and s.n > 1 and s.name.startswith("persona/")})
    if bare:
        said.append(f"No interval could be given for {', '.join(bare)}: judge these by their value alone.")
    broken = sum(not math.isfinite(signal.value) for signal in report.signals)
    if broken:
        said.append(f"{broken} measurements are not a number and are left out of the charts.")
    return said


def evidence_rows(evidence: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """An alert's evidence as (name, text), sorted."""
    return sorted((str(key), _specificity(value) or _evidence(value)) for key, value in evidence.items())


def _specificity(value: Any) -> str:
    """A comparison with random directions as a sentence; empty for anything else."""
    if not isinstance(value, Mapping) or not {"n_as_far", "n_random", "p_value", "traits"} <= value.keys():
        return ""
    others = ", ".join(f"{name} {number(moved, 2)}" for name, moved in dict(value["traits"]).items())
    return (
        f"{number(value['n_as_far'])} of {number(value['n_random'])} random directions were moved along as far "
        f"(p {number(value['p_value'], 2)}){f'; other traits there: {others}' if others else ''}"
    )


def _evidence(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    return value if isinstance(value, str) else json.dumps(value)
