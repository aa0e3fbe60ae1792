"""Is this drift surely larger than a floor?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from diffing.errors import InputError
from tracker.detectors.contract import Clock, check_severity, concerns
from tracker.signals import Alert, DriftSignal


@dataclass
class _Stretch:
    """Where one series stands with its floor."""

    clock: Clock = field(default_factory=Clock)
    above: list[DriftSignal] = field(default_factory=list)  # the unbroken stretch above the floor, first `in_a_row`
    fired: bool = False


@dataclass
class EffectFloor:
    """Fires when a drift is surely larger than a floor, several measurements in a row.

    "Surely" is the lower end of its 95 % interval; a signal without interval is judged by its value. A drift that
    is merely different from zero is not news in a fine-tune; one that clears an effect size is. One alert a
    crossing: it fires again only after the value has fallen below `rearm` times the floor. A measurement that is
    NaN is missing: it neither counts nor breaks the stretch. Measurements need not be equally spaced.

    The false alarm rate at a floor is a property of the run (see calibration); no floor here is calibrated by itself.

    Args:
        pattern: shell pattern on the signal's name (`persona/*/prompt`; `*` matches `/` too).
        floor: what must be exceeded, in `unit`.
        unit: the unit that floor and signals share.
        in_a_row: consecutive measurements needed.
        rearm: fraction of the floor below which the value must fall before the next alert, 0 to 1.
        severity: `warning` or `critical`.
        name: what to call this rule; its settings where it has none.

    Raises:
        InputError: a setting is out of range.
    """

    pattern: str
    floor: float
    unit: str = "gap"
    in_a_row: int = 2
    rearm: float = 0.8
    severity: str = "warning"
    name: str = ""
    _series: dict[str, _Stretch] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_severity(self.severity)
        if not (0 <= self.floor < math.inf and self.in_a_row >= 1 and 0 <= self.rearm <= 1):
            raise InputError(
                f"Expected a finite floor of at least 0, in_a_row of at least 1 and rearm from 0 to 1, got "
                f"floor={self.floor}, in_a_row={self.in_a_row}, rearm={self.rearm}. "
                f"Correct the detector for {self.pattern!r}."
            )

    @property
    def rule(self) -> str:
        """`effect_floor(0.25 gap, 2 in a row)`, or its name."""
        return self.name or f"effect_floor({self.floor:g} {self.unit}, {self.in_a_row} in a row)"

    def standing(self, signal: str) -> str:
        """`pending` while a series is above the floor, `firing` from its alert until it has fallen, else `quiet`."""
        series = self._series.get(signal, _Stretch())
        return "firing" if series.fired else "pending" if series.above else "quiet"

    def observe(self, signal: DriftSignal) -> Alert | None:
        """Takes one measurement of any series.

        Raises:
            InputError: the pattern matches a signal of another unit; its numbers cannot be held against the floor.
        """
        if not concerns(self.pattern, self.unit, signal):
            return None
        series = self._series.setdefault(signal.name, _Stretch())
        sure = signal.value if signal.low is None else signal.low
        if series.clock.repeats(signal.step) or math.isnan(signal.value) or math.isnan(sure):
            return None
        if signal.value < self.rearm * self.floor:
            series.fired = False
        if sure <= self.floor:
            series.above.clear()
            return None
        if len(series.above) < self.in_a_row:
            series.above.append(signal)
        if series.fired or len(series.above) < self.in_a_row:
            return None
        series.fired = True
        return self._alert(signal, series.above)

    def _alert(self, signal: DriftSignal, above: list[DriftSignal]) -> Alert:
        measured = [{"step": one.step, "value": one.value, "low": one.low} for one in above]
        return Alert(
            rule=self.rule,
            signal=signal.name,
            step=signal.step,
            value=signal.value,
            low=signal.low,
            threshold=self.floor,
            unit=self.unit,
            since=above[0].step,
            severity=self.severity,
            evidence={"measured": measured, "high": signal.high, "n": signal.n, "reference": signal.reference},
        )
