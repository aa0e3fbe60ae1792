"""How far did a run's canaries stand in for a judge?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffing.errors import InputError
from diffing.misalignment.agreement import Agreement, signal_agreement
from tracker.journal import Journal
from tracker.probes.canary import SIGNAL
from tracker.probes.misalignment import RATE
from tracker.signals import DriftSignal


def canary_agreement(run: Path | str, *, rate: str = RATE, seed: int = 0) -> Agreement:
    """Correlation of canary log-odds with the judged misaligned rate along a tracked run.

    Args:
        run: the run's directory, finished or not.
        rate: name of the signal that a judge gave.
        seed: of the resampling.

    Raises:
        InputError: the run has no canaries or no judged rate; says which signals it has.
    """
    with Journal.read(run) as journal:
        log_odds, judged = journal.signals(SIGNAL), journal.signals(rate)
        names = sorted({signal.name for signal in journal.signals()}) if not (log_odds and judged) else []
    if not log_odds or not judged:
        missing = SIGNAL if not log_odds else rate
        raise InputError(
            f"Expected the signal {missing} in {run}, got {', '.join(names) or 'no signals'}. Track the run with "
            "canaries and a judged rate, or name the rate's signal."
        )
    return signal_agreement(_series(log_odds), _series(judged), seed=seed)


def _series(signals: Sequence[DriftSignal]) -> dict[int, tuple[float, float | None, float | None]]:
    return {signal.step: (signal.value, signal.low, signal.high) for signal in signals}
