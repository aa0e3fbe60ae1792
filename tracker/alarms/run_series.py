"""What did one run measure, and which other runs may it be held against?"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffing.errors import InputError
from diffing.persona import PersonaVector
from tracker.journal import Journal
from tracker.personas import FOLDER
from tracker.signals import DriftSignal

_SETTINGS = ("learning_rate", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "optim")


@dataclass(frozen=True)
class RunSeries:
    """The series of one run, and what they were measured with.

    Attributes:
        source: where it was read, to be recognised by a person.
        signature: what must be the same in runs that are compared: model, personas, prompts, canaries, schedule.
        series: measurements by signal name, each in order of its steps.
        last_step: optimizer steps of the run.
        settings: how it was trained, for a reader; runs that differ here may be compared.
    """

    source: str
    signature: Mapping[str, str]
    series: Mapping[str, tuple[DriftSignal, ...]]
    last_step: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits of its content; the same run has the same."""
        points = [[one.name, one.step, one.value] for name in sorted(self.series) for one in self.series[name]]
        return hashlib.sha256(json.dumps(points).encode()).hexdigest()[:12]

    @classmethod
    def of(
        cls, signals: Iterable[DriftSignal], *, source: str, signature: Mapping[str, str], **settings: Any
    ) -> RunSeries:
        """A run from its signals; of two measurements of one step the later counts."""
        found: dict[str, dict[int, DriftSignal]] = {}
        for one in signals:
            found.setdefault(one.name, {})[one.step] = one
        series = {name: tuple(points[step] for step in sorted(points)) for name, points in found.items()}
        last = max((points[-1].step for points in series.values()), default=0)
        return cls(source, dict(signature), series, last, settings)

    @classmethod
    def from_run(cls, run_dir: Path | str) -> RunSeries:
        """Reads a tracked run.

        Raises:
            JournalMissingError: the folder holds no journal.
            InputError: nothing was measured.
        """
        run_dir = Path(run_dir)
        with Journal.read(run_dir) as journal:
            signals, attempts = journal.signals(), journal.attempts()
        if not signals:
            raise InputError(f"Expected measurements in {run_dir}, found none. Name a run that was tracked.")
        config = dict(attempts[-1].config) if attempts else {}
        settings = {name: config[name] for name in _SETTINGS if name in config}
        return cls.of(signals, source=str(run_dir), signature=_signature(run_dir, config), **settings)

    def signals(self) -> list[DriftSignal]:
        """All measurements, series by series."""
        return [one for points in self.series.values() for one in points]

    def to_json(self) -> dict[str, Any]:
        """JSON values; `from_json` gives an equal object back."""
        series = {
            name: {
                "unit": points[0].unit,
                "reference": points[0].reference,
                "points": [
                    [one.step, _number(one.value), _number(one.low), _number(one.high), one.n] for one in points
                ],
            }
            for name, points in self.series.items()
            if points
        }
        return {
            "source": self.source,
            "signature": dict(self.signature),
            "last_step": self.last_step,
            "settings": dict(self.settings),
            "series": series,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunSeries:
        """Reads what `to_json` wrote."""
        series = {
            name: tuple(
                DriftSignal(name, float(point), step, kept["unit"], _ends(low), _ends(high), n, kept["reference"])
                for step, point, low, high, n in kept["points"]
            )
            for name, kept in value["series"].items()
        }
        return cls(value["source"], value["signature"], series, value["last_step"], value["settings"])


def by_step(signals: Iterable[DriftSignal]) -> list[tuple[int, list[DriftSignal]]]:
    """Measurements step by step, ascending."""
    found: dict[int, list[DriftSignal]] = {}
    for one in signals:
        found.setdefault(one.step, []).append(one)
    return sorted(found.items())


def _signature(run_dir: Path, config: Mapping[str, Any]) -> dict[str, str]:
    vectors = [PersonaVector.load(path) for path in sorted((run_dir / FOLDER).glob("*.safetensors"))]
    probes = _read_json(run_dir / "probes.json")
    return {
        "model": " ".join(sorted({vector.model_fingerprint for vector in vectors})),
        "personas": " ".join(sorted(f"{vector.trait}:{vector.site}:{vector.digest[:12]}" for vector in vectors)),
        "prompts": str(probes.get("digest", "")),
        "canaries": str(probes.get("canary_digest", "")),
        "schedule": str(config.get("schedule", "")),
    }


def _read_json(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _number(value: float | None) -> float | str | None:
    # Strict JSON has no word for what is not finite.
    return value if value is None or math.isfinite(value) else str(value)


def _ends(value: float | str | None) -> float | None:
    return None if value is None else float(value)


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Names that a pattern matches, in the order of the patterns and then of the alphabet."""
    known = sorted(names)
    return list(dict.fromkeys(name for pattern in patterns for name in known if fnmatch.fnmatchcase(name, pattern)))
