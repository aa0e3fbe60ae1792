"""What can a bank of benign runs vouch for, signal by signal?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from diffing.errors import InputError
from tracker.alarms.bank import NullBank
from tracker.alarms.fusion import SCORE, UNIT, ScorePart
from tracker.alarms.levels import ExactShare, best_level, nulls_needed
from tracker.alarms.run_maximum import NullMaxima, null_maxima, statistic_of
from tracker.alarms.run_series import matching

_FEWEST_FOR_SCORE = 4  # one is left out, and three are needed for a fit


@dataclass(frozen=True)
class SignalCalibration:
    """One pattern's threshold.

    Attributes:
        pattern: of the signals; several are watched together by their largest standardised value.
        unit: of threshold and maxima; `sd` where several signals are watched together.
        n_signals: how many signals the pattern matches.
        threshold: what a run must exceed for an alarm, None where the bank is too small for the level.
        largest: what a benign run reached at most.
        median: what half of the benign runs did not pass.
        maxima: what each benign run reached, in the bank's order.
        left_out: alarms when each run is judged by the bank of the others; None where that was not asked for, or
            where so few others cannot vouch for the level.
    """

    pattern: str
    unit: str
    n_signals: int
    threshold: float | None
    largest: float
    median: float
    maxima: tuple[float, ...] = ()
    left_out: ExactShare | None = None


@dataclass(frozen=True)
class Calibration:
    """What a bank says at one level.

    Attributes:
        n: benign runs.
        horizon: steps up to which they vouch.
        level: asked for.
        best_level: strictest that so many runs vouch for.
        needed: runs that the level needs.
        in_a_row: measurements in a row that must exceed.
        signals: thresholds.
        parts: weights of the misalignment score, largest first.
        notes: what a reader must know, one sentence each.
    """

    n: int
    horizon: int
    level: float
    best_level: float
    needed: int
    in_a_row: int
    signals: tuple[SignalCalibration, ...]
    parts: tuple[ScorePart, ...]
    notes: tuple[str, ...]

    @property
    def vouched(self) -> bool:
        """Whether the bank is large enough for the level."""
        return self.n >= self.needed

    @property
    def left_out(self) -> bool:
        """Whether runs were judged by the bank of the others."""
        return any(one.left_out is not None for one in self.signals)

    @property
    def verdict(self) -> str:
        """In one sentence what rate the bank can vouch for."""
        best = f"{100 * self.best_level:.3g} %"
        if self.vouched:
            return (
                f"A benign run like these raises a false alarm with probability of at most {100 * self.level:g} % "
                f"({self.needed} runs needed; {self.n} could vouch for {best})."
            )
        return (
            f"Too few for {100 * self.level:g} %: {self.needed} benign runs needed, {self.n} here. No threshold is "
            f"given; these vouch for {best} at best."
        )

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "vouched": self.vouched, "verdict": self.verdict}


def calibrate_signals(
    bank: NullBank,
    *,
    level: float = 0.05,
    in_a_row: int = 1,
    patterns: Sequence[str] = (),
    leave_one_out: bool = False,
) -> Calibration:
    """Thresholds of the score and of every signal that a pattern names.

    Args:
        bank: the benign runs.
        level: probability of a false alarm in a whole benign run.
        in_a_row: measurements in a row that must exceed.
        patterns: on signals' names. Empty: the score, and each of its signals alone.
        leave_one_out: judge every run by the bank of the others and count the alarms.

    Raises:
        InputError: the level is out of range, or no signal matches a pattern.
    """
    needed = nulls_needed(level)
    scored = len(bank) >= _FEWEST_FOR_SCORE and bool(matching(bank.signals, bank.fused))
    asked = list(patterns) or [*([SCORE] if scored else []), *matching(bank.signals, bank.fused)]
    notes = [] if scored else [f"No score: it needs {_FEWEST_FOR_SCORE} benign runs with signals to fuse."]
    signals = tuple(_calibrate(bank, pattern, level, in_a_row, leave_one_out) for pattern in asked)
    parts = sorted(bank.score().parts, key=lambda part: -part.weight) if scored else []
    return Calibration(
        len(bank), bank.horizon, level, best_level(len(bank)), needed, in_a_row, signals, tuple(parts), tuple(notes)
    )


def _calibrate(bank: NullBank, pattern: str, level: float, in_a_row: int, leave_one_out: bool) -> SignalCalibration:
    nulls = null_maxima(bank, pattern, in_a_row=in_a_row)
    try:
        threshold = nulls.threshold(level)
    except InputError:
        threshold = None
    return SignalCalibration(
        pattern=pattern,
        unit=_unit(bank, nulls),
        n_signals=len(nulls.members),
        threshold=threshold,
        largest=max(nulls.values),
        median=float(np.median(nulls.values)),
        maxima=nulls.values,
        left_out=_left_out(bank, pattern, level, in_a_row) if leave_one_out else None,
    )


def _unit(bank: NullBank, nulls: NullMaxima) -> str:
    if len(nulls.members) > 1:
        return "sd"
    return UNIT if nulls.members[0] == SCORE else bank.runs[0].series[nulls.members[0]][0].unit


def _left_out(bank: NullBank, pattern: str, level: float, in_a_row: int) -> ExactShare | None:
    """Alarms of each benign run, judged by a detector that was calibrated on the others only."""
    if math.floor(level * len(bank) + 1e-9) < 1:
        return None
    alarms = 0
    for place, run in enumerate(bank.runs):
        others = bank.without(place)
        nulls = null_maxima(others, pattern, in_a_row=in_a_row)
        alarms += statistic_of(run, others, nulls, in_a_row=in_a_row) > nulls.threshold(level)
    return ExactShare.of(alarms, len(bank))
