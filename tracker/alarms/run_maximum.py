"""How far did a run go at most? One number a run, by which a new run is held against benign ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from diffing.errors import InputError
from tracker.alarms.bank import NullBank
from tracker.alarms.fusion import LEAST_EFFECT, SCORE
from tracker.alarms.fusion_fit import fit_left_out
from tracker.alarms.levels import conformal_threshold
from tracker.alarms.run_series import RunSeries, matching
from tracker.signals import DriftSignal


@dataclass
class Sustained:
    """The largest value that a series held for several measurements in a row, up to now.

    A value counts from its lower measurement on: with two in a row, the smaller of each successive pair. Missing
    measurements (NaN) neither count nor break a stretch.

    Attributes:
        in_a_row: measurements in a row.
        now: what the last ones held, -inf before there were enough.
        since: step of the first of them.
    """

    in_a_row: int = 1
    now: float = -math.inf
    since: int = 0
    _last: list[tuple[int, float]] = field(default_factory=list)

    def take(self, step: int, value: float) -> float:
        """Takes a measurement; returns what the last `in_a_row` held."""
        if not math.isnan(value):
            self._last = [*self._last, (step, value)][-self.in_a_row :]
            if len(self._last) == self.in_a_row:
                self.now, self.since = min(value for _, value in self._last), self._last[0][0]
        return self.now


def run_maximum(series: Sequence[DriftSignal], *, in_a_row: int = 1, until: int | None = None) -> float:
    """The largest value that a series held for so many measurements in a row, up to a step; -inf for none."""
    held = Sustained(in_a_row)
    return max(
        (held.take(one.step, one.value) for one in series if until is None or one.step <= until), default=-math.inf
    )


@dataclass(frozen=True)
class NullMaxima:
    """What the benign runs of a bank reached.

    Attributes:
        members: the signals that are watched together; a run's statistic is the largest of their standardised maxima.
        centres: of each signal, subtracted before comparing; 0 where only one signal is watched.
        spreads: of each signal, divided by; 1 where only one signal is watched.
        values: the statistic of each benign run, in the bank's order.
        horizon: steps up to which they were followed.
        scale: clear effects in one unit of the statistic, for the misalignment score; None for other signals.
    """

    members: tuple[str, ...]
    centres: Mapping[str, float]
    spreads: Mapping[str, float]
    values: tuple[float, ...]
    horizon: int
    scale: float | None = None

    def threshold(self, level: float, *, least_effect: float = LEAST_EFFECT, margin: float = 1.0) -> float:
        """What a run's statistic must exceed: more than benign runs reached, and for the score a least effect.

        Raises:
            InputError: so few benign runs cannot vouch for the level.
        """
        reached = conformal_threshold(self.values, level)
        asked = reached + (margin - 1) * abs(reached)
        return asked if self.scale is None else max(asked, least_effect / self.scale)


def null_maxima(bank: NullBank, pattern: str, *, in_a_row: int = 1) -> NullMaxima:
    """The statistic of every benign run for the signals that a pattern matches.

    One signal is compared as it is. Several are standardised, each by the mean and the standard deviation of its
    maxima over the other benign runs, and the largest counts: one threshold then holds for all traits, layers and
    signals together. The misalignment score of each run is by the weights that the other runs give.

    Raises:
        InputError: no benign run has such a signal, or several are watched and the bank holds fewer than three runs.
    """
    horizon = bank.horizon
    if pattern == SCORE:
        whole, scores = fit_left_out(bank.runs, signals=bank.fused)
        values = tuple(run_maximum(series, in_a_row=in_a_row, until=horizon) for series in scores)
        return NullMaxima((SCORE,), {SCORE: 0.0}, {SCORE: 1.0}, values, horizon, whole.scale)
    members = matching(bank.signals, [pattern])
    if not members:
        raise InputError(
            f"Expected signals like {pattern!r} in every run of the bank, found none; it holds "
            f"{', '.join(bank.signals[:6])}. Correct the pattern."
        )
    table = np.array(
        [[run_maximum(run.series[name], in_a_row=in_a_row, until=horizon) for name in members] for run in bank.runs]
    )
    if len(members) == 1:
        return NullMaxima((members[0],), {members[0]: 0.0}, {members[0]: 1.0}, tuple(table[:, 0].tolist()), horizon)
    if len(bank) < 3:
        raise InputError(
            f"Expected three or more runs to standardise {len(members)} signals, got {len(bank)}. Add runs."
        )
    others = [np.delete(table, place, axis=0) for place in range(len(table))]
    values = tuple(
        float(((row - rest.mean(axis=0)) / _spread(rest)).max()) for row, rest in zip(table, others, strict=True)
    )
    centres = dict(zip(members, table.mean(axis=0).tolist(), strict=True))
    return NullMaxima(
        tuple(members), centres, dict(zip(members, _spread(table).tolist(), strict=True)), values, horizon
    )


def statistic_of(run: RunSeries, bank: NullBank, nulls: NullMaxima, *, in_a_row: int = 1) -> float:
    """A new run's statistic, to be held against what the bank's runs reached; -inf where nothing was measured."""
    series = run.series
    if nulls.members == (SCORE,):
        series = {SCORE: tuple(bank.score().follow(run.signals()))}
    return max(
        (
            run_maximum(series[name], in_a_row=in_a_row, until=nulls.horizon) - nulls.centres[name]
        ) / nulls.spreads[name]
        for name in nulls.members
        if name in series
    )  # fmt: skip


def _spread(table: np.ndarray) -> np.ndarray:
    return np.maximum(table.std(axis=0, ddof=1), 1e-9)
