"""What must a judge of signals offer, and what do all built-in judges share?"""

from __future__ import annotations

import fnmatch
from typing import Protocol, runtime_checkable

from diffing.errors import InputError
from tracker.signals import Alert, DriftSignal

SEVERITIES = ("warning", "critical")


@runtime_checkable
class Detector(Protocol):
    """Judges signals one by one, each series in order of its steps.

    The same series must give the same alerts: after a resume the journal is replayed into a fresh detector. An
    exception is journalled by the pipeline and stops neither training nor the other detectors.
    """

    @property
    def rule(self) -> str:
        """Its name and settings in one line, as alerts state them."""

    def observe(self, signal: DriftSignal) -> Alert | None:
        """Takes one measurement; returns an alert when this one makes the case. Signals of no concern give None."""


def concerns(pattern: str, unit: str | None, signal: DriftSignal) -> bool:
    """Whether a detector of this pattern judges the signal.

    Args:
        pattern: shell pattern on the signal's name; `*` matches `/` too.
        unit: the unit that the detector's numbers are in, None where it brings its own scale.
        signal: one measurement.

    Raises:
        InputError: the pattern matches a signal of another unit; its numbers cannot be held against the detector's.
    """
    if not fnmatch.fnmatchcase(signal.name, pattern):
        return False
    if unit is not None and signal.unit != unit:
        raise InputError(
            f"Expected {pattern!r} to match signals in {unit}, but {signal.name} is in {signal.unit}. "
            "Narrow the pattern or give the detector that unit."
        )
    return True


def check_severity(severity: str) -> None:
    """Raises InputError where the severity is none of `SEVERITIES`."""
    if severity not in SEVERITIES:
        raise InputError(f"Expected a severity out of {', '.join(SEVERITIES)}, got {severity!r}. Write one of these.")


class Clock:
    """Tells a new measurement of a series from one that is measured again, after a resume or a replay."""

    def __init__(self) -> None:
        self._last: int | None = None

    def repeats(self, step: int) -> bool:
        """Whether this step, or a later one, was already judged."""
        if self._last is not None and step <= self._last:
            return True
        self._last = step
        return False
