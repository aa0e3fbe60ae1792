"""How large do the signals of benign fine-tunes of this model become? A bank of runs to hold a new one against."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffing.durable import write_json
from diffing.errors import InputError, PathMissingError
from diffing.provenance import check_comparable, installed_versions, utc_now
from tracker.alarms.fusion import PATTERNS, MisalignmentScore, patterns_of
from tracker.alarms.fusion_fit import fit_score
from tracker.alarms.run_series import RunSeries

SCHEMA_VERSION = 1
_FILE = "bank.json"
_FIX = "Give every model, probe set and schedule a bank of its own."


@dataclass(frozen=True)
class NullBank:
    """Benign runs that were measured alike: same model, personas, prompts, canaries and schedule.

    What a bank says of a new run rests on one assumption: that the new run, if it is benign, could as well have been
    one of these (exchangeability). A bank of one kind of rows says little about another kind.

    Attributes:
        signature: what all runs have in common, and a new run must have.
        runs: the benign runs, ordered by id.
        fused: patterns of the signals that the misalignment score is made of. Chosen before a run is judged, as
            personas that would be harmful (`patterns_of`), it keeps what other personas do out of the score.
        versions: packages with which it was last written.
        written_at: UTC, ISO 8601.
    """

    signature: Mapping[str, str]
    runs: tuple[RunSeries, ...]
    fused: tuple[str, ...] = PATTERNS
    versions: Mapping[str, str] = field(default_factory=installed_versions)
    written_at: str = field(default_factory=utc_now)

    def __len__(self) -> int:
        return len(self.runs)

    def __repr__(self) -> str:
        return f"NullBank({len(self.runs)} runs of {self.horizon} steps)"

    @classmethod
    def of(cls, runs: Iterable[RunSeries]) -> NullBank:
        """A bank of these runs; the same run given twice counts once.

        Raises:
            InputError: there are none.
            ComparabilityError: they were not measured alike.
        """
        found = list(runs)
        if not found:
            raise InputError("Expected benign runs to make a bank of, got none. Name their run directories.")
        return cls(dict(found[0].signature), ()).with_runs(found)

    def with_runs(self, runs: Iterable[RunSeries]) -> NullBank:
        """The bank with further runs.

        Raises:
            ComparabilityError: a run was not measured as the bank's runs were.
        """
        kept = {run.id: run for run in self.runs}
        for run in runs:
            self.check(run)
            kept[run.id] = run
        return NullBank(self.signature, tuple(kept[name] for name in sorted(kept)), self.fused)

    def check(self, run: RunSeries) -> None:
        """Raises ComparabilityError where a run was not measured as the bank's runs were."""
        names = ("bank", run.source)
        check_comparable("Bank and run", self.signature, run.signature, names=names, fix=_FIX)

    @property
    def horizon(self) -> int:
        """Steps up to which every run of the bank was measured; beyond them it vouches for nothing."""
        return min((run.last_step for run in self.runs), default=0)

    @property
    def signals(self) -> tuple[str, ...]:
        """Names that every run of the bank has."""
        common = set.intersection(*(set(run.series) for run in self.runs)) if self.runs else set()
        return tuple(sorted(common))

    def counting(self, personas: Sequence[str]) -> NullBank:
        """The bank with a score that is made of these personas and the canaries alone.

        Raises:
            InputError: a persona was not tracked in every run.
        """
        known = sorted({name.split("/")[1] for name in self.signals if name.startswith("persona/")})
        if unknown := [name for name in personas if name not in known]:
            raise InputError(f"Expected personas out of {', '.join(known)}; got {unknown[0]!r}. Name one of these.")
        return replace(self, fused=patterns_of(personas))

    def score(self) -> MisalignmentScore:
        """The misalignment score that these runs give.

        Raises:
            InputError: they are fewer than three, or have no signal to fuse.
        """
        return fit_score(self.runs, signals=self.fused)

    def without(self, place: int) -> NullBank:
        """The bank less one run."""
        return replace(self, runs=(*self.runs[:place], *self.runs[place + 1 :]))

    def save(self, folder: Path | str) -> Path:
        """Writes `bank.json` and a file a run; complete at any moment, since the list of runs is written last."""
        folder = Path(folder)
        for run in self.runs:
            path = folder / "runs" / f"{run.id}.json"
            if not path.exists():
                write_json(path, run.to_json())
        listed = [{"id": run.id, "source": run.source, "last_step": run.last_step} for run in self.runs]
        record: dict[str, Any] = {
            "schema": SCHEMA_VERSION,
            "signature": dict(self.signature),
            "runs": listed,
            "fused": list(self.fused),
            "versions": dict(self.versions),
            "written_at": self.written_at,
        }
        return write_json(folder / _FILE, record)

    @classmethod
    def load(cls, folder: Path | str) -> NullBank:
        """Reads what `save` wrote.

        Raises:
            PathMissingError: there is no bank.
            InputError: it is damaged or of a newer version.
        """
        folder = Path(folder)
        path = folder / _FILE
        if not path.is_file():
            raise PathMissingError(f"Expected a bank at {folder}, found no {_FILE}. Make one: palimpsest calibrate.")
        try:
            record = json.loads(path.read_text())
            if record["schema"] > SCHEMA_VERSION:
                raise InputError(
                    f"Expected a bank of schema {SCHEMA_VERSION}, got {record['schema']}. Update palimpsest."
                )
            runs = [_run(folder / "runs" / f"{one['id']}.json", one["id"]) for one in record["runs"]]
            fused = tuple(record.get("fused", PATTERNS))
            return cls(record["signature"], tuple(runs), fused, record["versions"], record["written_at"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"Expected a bank in {path}, got something else ({error}). Make it anew.") from error


def _run(path: Path, name: str) -> RunSeries:
    if not path.is_file():
        raise InputError(f"Expected the bank's run {path}, it is missing. Restore the file or make the bank anew.")
    run = RunSeries.from_json(json.loads(path.read_text()))
    if run.id != name:
        raise InputError(f"Expected the run that was banked in {path}, got other numbers. Make the bank anew.")
    return run
