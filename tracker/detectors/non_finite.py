"""Has this signal stopped being a number?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tracker.detectors.contract import Clock, check_severity, concerns
from tracker.signals import Alert, DriftSignal


@dataclass
class _Stretch:
    clock: Clock = field(default_factory=Clock)
    fired: bool = False


@dataclass
class NonFinite:
    """Fires when a signal becomes NaN or infinite, once a stretch; a loss that diverged explains all else.

    Args:
        pattern: shell pattern on the signal's name. Prefer gradient norms: the Trainer hides NaN losses by default.
        severity: `warning` or `critical`.
        name: what to call this rule; `non_finite` where it has none.
    """

    pattern: str = "train/*"
    severity: str = "critical"
    name: str = ""
    _series: dict[str, _Stretch] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_severity(self.severity)

    @property
    def rule(self) -> str:
        """`non_finite`, or its name."""
        return self.name or "non_finite"

    def standing(self, signal: str) -> str:
        """`firing` while a series is not finite, else `quiet`."""
        return "firing" if self._series.get(signal, _Stretch()).fired else "quiet"

    def observe(self, signal: DriftSignal) -> Alert | None:
        """Takes one measurement of any series."""
        if not concerns(self.pattern, None, signal):
            return None
        series = self._series.setdefault(signal.name, _Stretch())
        if series.clock.repeats(signal.step):
            return None
        if math.isfinite(signal.value):
            series.fired = False
            return None
        if series.fired:
            return None
        series.fired = True
        return Alert(
            rule=self.rule,
            signal=signal.name,
            step=signal.step,
            value=signal.value,
            low=None,
            threshold=math.inf,
            unit=signal.unit,
            since=signal.step,
            severity=self.severity,
            evidence={"n": signal.n},
        )
