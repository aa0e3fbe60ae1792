"""Has this noisy series left its baseline, with a stated rate of false alarms?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from diffing.errors import InputError
from tracker.alarms.evidence import Evidence, standardise
from tracker.alarms.whitening import Baseline
from tracker.detectors.contract import Clock, check_severity, concerns
from tracker.signals import Alert, DriftSignal

SIDES = {"up": 1, "down": -1}
_FEWEST = 10


@dataclass
class Follower:
    """One series: its baseline while it is being learnt, then its evidence.

    Attributes:
        baseline: None until it is learnt.
        evidence: against "still at the baseline".
    """

    clock: Clock = field(default_factory=Clock)
    baseline: Baseline | None = None
    evidence: Evidence = field(default_factory=Evidence)
    fired: bool = False
    _steps: list[int] = field(default_factory=list)
    _values: list[float] = field(default_factory=list)
    _last: tuple[int, float] | None = None

    def take(self, signal: DriftSignal, settings: EDetector) -> bool:
        """Takes a measurement; True where it was judged rather than learnt from, missing, or a repetition."""
        if self.clock.repeats(signal.step) or not math.isfinite(signal.value):
            return False
        value, last, self._last = float(signal.value), self._last, (signal.step, float(signal.value))
        self._steps.append(signal.step)
        if self.baseline is None:
            self._values.append(value)
            if len(self._values) >= settings.baseline:
                self.baseline = Baseline.learn(self._steps, self._values, confidence=settings.confidence)
                self._values.clear()
            return False
        assert last is not None
        gap = signal.step - last[0]
        innovation, spread = self.baseline.innovation(value, last[1], gap), self.baseline.spread(gap)
        floor = max(settings.floor * self.baseline.sigma, settings.least)
        z = standardise(self.baseline, innovation, spread, floor=floor, side=SIDES[settings.side])
        self.evidence.update(z, most=settings.highest)
        del self._steps[: -max(1, self.evidence.rising)]
        return True

    @property
    def since(self) -> int:
        """Step at which the rise under way most likely began."""
        return self._steps[0]


@dataclass
class EDetector:
    """Fires when a series has risen above the level of its own first measurements.

    For noisy series that are level until something happens: losses, gradient norms, projections of training batches.
    A series that trends by nature, such as a drift from step 0, always leaves its baseline; judge that by `EffectFloor`
    or against a bank of benign runs.

    Stated rate: under the null, the mean number of measurements to a false alarm is at least `average_run_length`, and
    n measurements hold one with probability of at most n / average_run_length, plus 1 - confidence for a baseline that
    happened to be low. The null: the series is a first-order autoregression around one level with symmetric
    innovations, of any variance and tails, or rises by no more than the floor. Shifts below the floor are missed on
    purpose.

    Missing measurements (NaN, infinite, steps left out) are evidence of nothing; a longer gap is a weaker memory.
    After an alert it is silent until its evidence has fallen to the root of what it fired at.

    Args:
        pattern: shell pattern on the signal's name; every series has a baseline of its own.
        average_run_length: mean number of measurements between false alarms, at least.
        baseline: measurements that the baseline is learnt from, and that are not judged.
        floor: smallest shift that is news, in standard deviations of the baseline.
        least: smallest shift that is news, in the signal's unit; the larger of the two counts.
        confidence: of the baseline's bound.
        side: `up` for rises, `down` for falls.
        severity: `warning` or `critical`.
        name: what to call this rule; its settings where it has none.

    Raises:
        InputError: a setting is out of range.
    """

    pattern: str
    average_run_length: float = 10_000.0
    baseline: int = 100
    floor: float = 0.5
    least: float = 0.0
    confidence: float = 0.99
    side: str = "up"
    severity: str = "warning"
    name: str = ""
    _series: dict[str, Follower] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_severity(self.severity)
        if self.side not in SIDES:
            raise InputError(f"Expected side out of {', '.join(SIDES)}, got {self.side!r}. Write one of these.")
        fine = self.average_run_length > 1 and self.baseline >= _FEWEST and 0.5 < self.confidence < 1
        if not (fine and 0 <= self.floor < math.inf and 0 <= self.least < math.inf):
            raise InputError(
                f"Expected an average_run_length above 1, a baseline of {_FEWEST} or more, floor and least "
                f"of at least 0 and a confidence between 0.5 and 1; got average_run_length={self.average_run_length}, "
                f"baseline={self.baseline}, floor={self.floor}, least={self.least}, confidence={self.confidence}. "
                f"Correct the detector for {self.pattern!r}."
            )

    @property
    def rule(self) -> str:
        """`e_detector(run length 10000, floor 0.5 sd)`, or its name."""
        side = "" if self.side == "up" else ", down"
        return self.name or f"e_detector(run length {self.average_run_length:g}, floor {self.floor:g} sd{side})"

    def false_alarm_bound(self, n: int) -> float:
        """Largest probability of a false alarm in a series of `n` judged measurements."""
        return min(1.0, n / self.average_run_length + (1 - self.confidence))

    @property
    def highest(self) -> float:
        """What evidence is held at; more of it would only be longer in falling."""
        return self.average_run_length

    def observe(self, signal: DriftSignal) -> Alert | None:
        """Takes one measurement of any series."""
        if not concerns(self.pattern, None, signal):
            return None
        series = self._series.setdefault(signal.name, Follower())
        if not series.take(signal, self):
            return None
        reached = series.evidence.run_length_sum
        if series.fired:
            series.fired = reached > math.sqrt(self.average_run_length)
            return None
        if reached < self.average_run_length:
            return None
        series.fired = True
        return shift_alert(self, signal, series, {"evidence": reached, "needed": self.average_run_length})


@runtime_checkable
class Shift(Protocol):
    """What an alert needs to know of the detector that raises it."""

    side: str
    floor: float
    least: float
    severity: str

    @property
    def rule(self) -> str: ...  # noqa: D102


def shift_alert(detector: Shift, signal: DriftSignal, series: Follower, evidence: dict[str, Any]) -> Alert:
    """The alert of a series that left its baseline."""
    baseline = series.baseline
    assert baseline is not None
    side = SIDES[detector.side]
    edge = baseline.level_high if side > 0 else baseline.level_low
    threshold = edge + side * max(detector.floor * baseline.sigma, detector.least)
    learnt = {"level": baseline.level, "sigma": baseline.sigma, "memory": baseline.memory, "n": baseline.n}
    return Alert(
        rule=detector.rule,
        signal=signal.name,
        step=signal.step,
        value=signal.value,
        low=signal.low,
        threshold=threshold,
        unit=signal.unit,
        since=series.since,
        severity=detector.severity,
        evidence={**evidence, "baseline": learnt, "judged": series.evidence.n, "reference": signal.reference},
    )
