"""Has something stopped being measured? A tracker that fell silent looks like a run in which nothing happens."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field

from diffing.errors import InputError
from tracker.signals import Alert, DriftSignal


@dataclass
class Silence:
    """Fires when nothing that matches was measured for so many steps, while something else was.

    The step is known from any signal, the trainer's own loss included; where nothing at all arrives, ask from outside:
    `palimpsest alerts RUN --stale 600`. NaN counts as measured; `NonFinite` is for that.

    Args:
        pattern: shell pattern on the signal's name.
        steps: optimizer steps without a measurement that are too many.
        severity: `warning` or `critical`.

    Raises:
        InputError: `steps` is below 1.
    """

    pattern: str
    steps: int = 200
    severity: str = "warning"
    _heard: int | None = field(default=None, init=False, repr=False, compare=False)
    _fired: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"Expected steps of at least 1 for silence, got {self.steps}. Name more.")

    @property
    def rule(self) -> str:
        """`silence(200 steps)`."""
        return f"silence({self.steps} steps)"

    def standing(self, signal: str) -> str:
        """`firing` for the pattern itself while nothing that matches is measured, else `quiet`."""
        return "firing" if self._fired and signal == self.pattern else "quiet"

    def observe(self, signal: DriftSignal) -> Alert | None:
        """Takes one measurement of any series; a step measured again after a resume changes nothing."""
        if self._heard is None:
            self._heard = signal.step  # the first word of anything is when listening began
        if fnmatch.fnmatchcase(signal.name, self.pattern):
            self._heard, self._fired = max(self._heard, signal.step), False
            return None
        gap = signal.step - self._heard
        if self._fired or gap < self.steps:
            return None
        self._fired = True
        return Alert(
            rule=self.rule,
            signal=self.pattern,
            step=signal.step,
            value=float(gap),
            low=None,
            threshold=float(self.steps),
            unit="steps",
            since=self._heard,
            severity=self.severity,
            evidence={"last_measured": self._heard},
        )
