"""Has this run gone further than benign runs of its kind ever went?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from diffing.errors import InputError
from tracker.alarms.bank import NullBank
from tracker.alarms.fusion import LEAST_EFFECT, SCORE
from tracker.alarms.levels import conformal_p, conformal_threshold
from tracker.alarms.run_maximum import NullMaxima, Sustained, null_maxima
from tracker.detectors.contract import Clock, check_severity
from tracker.signals import Alert, DriftSignal


@dataclass
class _Member:
    held: Sustained
    clock: Clock = field(default_factory=Clock)


@dataclass
class MaxOverRun:
    """Fires, once a run, when a signal exceeds what all but a few benign runs of a bank reached.

    Stated rate: a benign run that could as well have been one of the bank's raises a false alarm, at any of its steps,
    with probability of at most `level`; nothing is assumed of the signal's noise, trend or memory. The bank must be
    large enough for the level: 19 runs for 5 %, 99 for 1 %. A smaller one is refused. Where the pattern matches several
    signals they are standardised and the largest counts, so that the rate holds for all of them together. Weights and
    spreads that come from the bank are taken for each of its runs from the others; that makes the rate approximate
    for a score or a family, exact for a single signal (`palimpsest calibrate --leave-one-out` shows it).

    Beyond the steps that the bank's runs took it says nothing.

    Args:
        pattern: shell pattern on the signal's name; `misalignment/score` by default.
        bank: folder that `palimpsest calibrate` wrote, or the bank itself.
        level: largest probability of a false alarm in a whole run.
        in_a_row: measurements in a row that must exceed; the bank's runs are read in the same way.
        margin: times the benign runs' threshold; above 1 it costs power and lowers the rate further.
        least_effect: of the misalignment score, in clear effects: below it there is no alarm, however still the benign
            runs were. It lowers the rate further. Other signals have none.
        severity: `warning` or `critical`.
        name: what to call this rule; its settings where it has none.

    Raises:
        InputError: the bank cannot vouch for the level, or holds no such signal.
        PathMissingError: there is no bank.
    """

    pattern: str = SCORE
    bank: NullBank | Path | str = "bank"
    level: float = 0.05
    in_a_row: int = 1
    margin: float = 1.0
    least_effect: float = LEAST_EFFECT
    severity: str = "warning"
    name: str = ""
    _nulls: NullMaxima = field(init=False, repr=False, compare=False)
    _members: dict[str, _Member] = field(default_factory=dict, init=False, repr=False, compare=False)
    _fired: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_severity(self.severity)
        if not (self.in_a_row >= 1 and self.margin >= 1):
            raise InputError(
                f"Expected in_a_row and margin of at least 1, got in_a_row={self.in_a_row}, margin={self.margin}. "
                f"Correct the detector for {self.pattern!r}."
            )
        bank = self.bank if isinstance(self.bank, NullBank) else NullBank.load(self.bank)
        conformal_threshold([0.0] * len(bank), self.level)
        self._nulls = null_maxima(bank, self.pattern, in_a_row=self.in_a_row)
        self.threshold = self._nulls.threshold(self.level, least_effect=self.least_effect, margin=self.margin)

    @property
    def rule(self) -> str:
        """`max_over_run(level 5 %, 40 benign runs)`, or its name."""
        return self.name or f"max_over_run(level {100 * self.level:g} %, {len(self._nulls.values)} benign runs)"

    def observe(self, signal: DriftSignal) -> Alert | None:
        """Takes one measurement of any series."""
        if signal.name not in self._nulls.centres or self._fired or signal.step > self._nulls.horizon:
            return None
        member = self._members.setdefault(signal.name, _Member(Sustained(self.in_a_row)))
        if member.clock.repeats(signal.step):
            return None
        centre, spread = self._nulls.centres[signal.name], self._nulls.spreads[signal.name]
        statistic = (member.held.take(signal.step, signal.value) - centre) / spread
        if not statistic > self.threshold:
            return None
        self._fired = True
        nulls = self._nulls.values
        return Alert(
            rule=self.rule,
            signal=signal.name,
            step=signal.step,
            value=signal.value,
            low=signal.low,
            threshold=centre + spread * self.threshold,
            unit=signal.unit,
            since=member.held.since,
            severity=self.severity,
            evidence={
                "p_value": conformal_p(statistic, nulls),
                "level": self.level,
                "benign_runs": len(nulls),
                "benign_largest": centre + spread * max(nulls),
                "watched_together": len(self._nulls.members),
                "horizon": self._nulls.horizon,
                "reference": signal.reference,
            },
        )
