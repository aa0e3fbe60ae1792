"""What would other rules have said of a run that is over?"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tracker.alarms.bank import NullBank
from tracker.alarms.fusion import SCORE, ScoreStream
from tracker.alarms.run_series import RunSeries, by_step
from tracker.alert_life import Incident, incidents
from tracker.detectors import MaxOverRun
from tracker.events import AlertChanged
from tracker.journal import Journal
from tracker.rules import RuleSet
from tracker.signals import Alert, DriftSignal


@dataclass(frozen=True)
class Replay:
    """A run judged again.

    Attributes:
        alerts: what the rules would have raised, muted ones included.
        incidents: where each would stand at the end.
        before: what was raised while the run went on.
        n_signals: measurements that were judged.
        unmatched: names of rules that no signal of the run matches: they watch nothing.
        last_step: step of the last measurement.
    """

    alerts: tuple[Alert, ...]
    incidents: tuple[Incident, ...]
    before: tuple[Alert, ...]
    n_signals: int
    unmatched: tuple[str, ...]
    last_step: int


def replay_alerts(run_dir: Path | str, rules: RuleSet) -> Replay:
    """Judges a run's recorded signals by rules; nothing is written, and nobody is told.

    A run that had no bank has no misalignment score: a rule that judges it brings the bank that makes it.

    Raises:
        JournalMissingError: the folder holds no journal.
        InputError: a rule meets a signal that it cannot judge (another unit).
        ComparabilityError: the run was not measured as the runs of a rule's bank were.
    """
    with Journal.read(run_dir) as journal:
        signals, before = journal.signals(), journal.alerts()
    signals = _scored(signals, rules, run_dir)
    alerts, changes = judge(signals, rules)
    return Replay(
        alerts=tuple(alerts),
        incidents=tuple(incidents(alerts, changes)),
        before=tuple(before),
        n_signals=len(signals),
        unmatched=_unmatched(signals, rules),
        last_step=max((signal.step for signal in signals), default=0),
    )


def judge(signals: Sequence[DriftSignal], rules: RuleSet) -> tuple[list[Alert], list[AlertChanged]]:
    """Alerts and changes of state that the signals make, in order."""
    detectors = rules.detectors()
    alerts = [alert for signal in signals for one in detectors if (alert := one.observe(signal)) is not None]
    return alerts, sorted((change for one in detectors for change in one.changes()), key=lambda change: change.step)


def _scored(signals: list[DriftSignal], rules: RuleSet, run_dir: Path | str) -> list[DriftSignal]:
    """The signals, with the score of the first rule's bank where a rule judges a score and the run has none."""
    judging = [rule for rule in rules.rules if rule.kind == "max_over_run" and fnmatch.fnmatchcase(SCORE, rule.signal)]
    if not judging or any(signal.name == SCORE for signal in signals):
        return signals
    given = judging[0].settings.get("bank", MaxOverRun.bank)
    bank = given if isinstance(given, NullBank) else NullBank.load(given)
    bank.check(RunSeries.from_run(run_dir))
    stream = ScoreStream(bank.score())
    return [one for _, measured in by_step(signals) for one in (*measured, *stream.take(measured))]


def _unmatched(signals: Sequence[DriftSignal], rules: RuleSet) -> tuple[str, ...]:
    names = {signal.name for signal in signals}
    return tuple(rule.name for rule in rules.rules if not any(fnmatch.fnmatchcase(name, rule.signal) for name in names))
