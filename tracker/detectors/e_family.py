"""Of many noisy series at once, which have left their baselines, with a stated share of false alarms?"""

from __future__ import annotations

from dataclasses import dataclass, field

from diffing.errors import InputError
from tracker.alarms.multiplicity import called_by_e_values
from tracker.detectors.contract import check_severity, concerns
from tracker.detectors.e_detector import EDetector, Follower, shift_alert
from tracker.signals import Alert, DriftSignal


@dataclass
class EFamily:
    """Fires on the series of a family that the e-BH procedure calls: traits, layers and signals together.

    Every series that the pattern matches is held against its own baseline, as `EDetector` does, with an e-process in
    place of the sum: whatever the length of the run, a single series ever gives 1 / level of evidence with probability
    of at most `level` where nothing happened. e-BH then corrects for the number of series, whose dependence does not
    matter. Stated rate: expected share of false alerts among alerts at most `level`, plus 1 - confidence for each
    baseline that happened to be low; where nothing happened at all, that is the probability of any alert in the run.

    One alert a series; it is told of at its own next measurement.

    Args:
        pattern: shell pattern on the signals' names.
        level: share of false alerts, between 0 and 1.
        n_series: how many series the family has, where they do not all begin together; 0: those seen so far.
        baseline: measurements that a baseline is learnt from, and that are not judged.
        floor: smallest shift that is news, in standard deviations of the baseline.
        least: smallest shift that is news, in the signal's unit; the larger of the two counts.
        confidence: of each baseline's bound. The default is strict, since every series has one.
        side: `up` for rises, `down` for falls.
        severity: `warning` or `critical`.
        name: what to call this rule; its settings where it has none.

    Raises:
        InputError: a setting is out of range.
    """

    pattern: str
    level: float = 0.05
    n_series: int = 0
    baseline: int = 100
    floor: float = 0.5
    least: float = 0.0
    confidence: float = 0.999
    side: str = "up"
    severity: str = "warning"
    name: str = ""
    _series: dict[str, Follower] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_severity(self.severity)
        if not (0 < self.level < 1 and self.n_series >= 0):
            raise InputError(
                f"Expected a level between 0 and 1 and n_series of at least 0, got level={self.level}, "
                f"n_series={self.n_series}. Correct the detector for {self.pattern!r}."
            )
        self._alone = EDetector(
            self.pattern,
            baseline=self.baseline,
            floor=self.floor,
            least=self.least,
            confidence=self.confidence,
            side=self.side,
        )

    @property
    def rule(self) -> str:
        """`e_family(level 5 %, floor 0.5 sd)`, or its name."""
        side = "" if self.side == "up" else ", down"
        return self.name or f"e_family(level {100 * self.level:g} %, floor {self.floor:g} sd{side})"

    def observe(self, signal: DriftSignal) -> Alert | None:
        """Takes one measurement of any series."""
        if not concerns(self.pattern, None, signal):
            return None
        series = self._series.setdefault(signal.name, Follower())
        if not series.take(signal, self._alone) or series.fired:
            return None
        e_values = {name: one.evidence.e_process for name, one in self._series.items()}
        if signal.name not in called_by_e_values(e_values, level=self.level, n_series=self.n_series):
            return None
        series.fired = True
        family = {"e_value": e_values[signal.name], "level": self.level, "series": max(self.n_series, len(e_values))}
        return shift_alert(self, signal, series, family)
