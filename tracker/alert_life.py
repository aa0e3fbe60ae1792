"""What becomes of an alert? pending → firing → acknowledged → resolved; cooldown, inhibition, one incident a cause."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from tracker.detectors import Detector
from tracker.events import AlertAcknowledged, AlertChanged, Event
from tracker.signals import Alert, DriftSignal

QUIET, PENDING, FIRING, ACKNOWLEDGED, RESOLVED = "quiet", "pending", "firing", "acknowledged", "resolved"
STATES = (PENDING, FIRING, ACKNOWLEDGED, RESOLVED)


@runtime_checkable
class Standing(Protocol):
    """A detector that can say where a series stands between two alerts; one that cannot never resolves."""

    def standing(self, signal: str) -> str:
        """`quiet`, `pending` (the case is being made) or `firing`, for a signal by name."""
        ...


@runtime_checkable
class Chronicle(Protocol):
    """A detector whose judgements have a life that is worth recording."""

    def changes(self) -> list[AlertChanged]:
        """What changed since this was last asked."""
        ...


def fingerprint(rule: str, signal: str) -> str:
    """Names an incident: the same for every alert of one rule on one signal, in every attempt at the run."""
    return hashlib.sha256(f"{rule}\0{signal}".encode("utf-8", "backslashreplace")).hexdigest()[:16]


@dataclass
class Firings:
    """Which rules fired when; shared by the rules of one set, so that one can be silenced by another.

    Attributes:
        last: rule's name to the step of its last alert.
        open: rule's name to the signals on which it stands firing.
    """

    last: dict[str, int] = field(default_factory=dict)
    open: dict[str, set[str]] = field(default_factory=dict)

    def inhibitor(self, names: Iterable[str], step: int, within: int) -> str | None:
        """The first of some rules that is firing, or did at most `within` steps ago."""
        for name in names:
            if self.open.get(name) or step - self.last.get(name, -(1 << 60)) <= within:
                return name
        return None


@dataclass
class RuleDetector:
    """A named rule: a detector with its cooldown, what inhibits it, what it asks for and who is told.

    A muted alert is recorded like any other, and neither acted on nor sent; its evidence says why. Judging the same
    signals in the same order gives the same alerts, mutes and changes: a resume replays the journal.

    Args:
        name: of the rule.
        detector: what judges.
        cooldown: optimizer steps after an alert in which further ones of the same fingerprint are muted.
        inhibited_by: names of rules that mute this one.
        inhibit_within: steps after such a rule's alert in which it still does.
        actions: what an alert asks of the training.
        notify: names of receivers.
        firings: shared by all rules of a set.
    """

    name: str
    detector: Detector
    cooldown: int = 0
    inhibited_by: tuple[str, ...] = ()
    inhibit_within: int = 0
    actions: tuple[str, ...] = ()
    notify: tuple[str, ...] = ()
    firings: Firings = field(default_factory=Firings)
    _stands: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    _alert: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    _sounded: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    _changes: deque[AlertChanged] = field(default_factory=deque, init=False, repr=False)

    @property
    def rule(self) -> str:
        """`evil: effect_floor(0.25 gap, 2 in a row)`."""
        return f"{self.name}: {self.detector.rule}"

    def observe(self, signal: DriftSignal) -> Alert | None:
        """Takes one measurement; an alert carries the rule's name, fingerprint, actions and why it is muted."""
        found = self.detector.observe(signal)
        alert = None if found is None else self._named(found)
        if alert is not None:
            self._alert[alert.signal] = alert.id
            self._follow(alert.signal, signal.step, fired=True)
        # A detector may judge something else than the signal that it was just given, such as that another is missing.
        waiting = [name for name, stands in self._stands.items() if stands != QUIET]
        for name in dict.fromkeys([signal.name, *waiting]):
            if alert is None or name != alert.signal:
                self._follow(name, signal.step)
        return alert

    def changes(self) -> list[AlertChanged]:
        """What changed since this was last asked."""
        taken = list(self._changes)
        self._changes.clear()
        return taken

    def _named(self, alert: Alert) -> Alert:
        mark = fingerprint(self.name, alert.signal)
        muted = self._muted(mark, alert.step)
        if muted is None:
            self._sounded[mark] = alert.step
        self.firings.last[self.name] = alert.step
        facts: dict[str, Any] = {"rule_name": self.name, "fingerprint": mark}
        facts |= {"actions": list(self.actions), "notify": list(self.notify)}
        facts |= {} if muted is None else {"muted": muted}
        return dataclasses.replace(alert, rule=self.rule, evidence={**alert.evidence, **facts})

    def _muted(self, mark: str, step: int) -> str | None:
        inhibitor = self.firings.inhibitor(self.inhibited_by, step, self.inhibit_within)
        if inhibitor is not None:
            return f"inhibited by {inhibitor}"
        last = self._sounded.get(mark)
        if last is not None and step - last < self.cooldown:
            return f"cooldown of {self.cooldown} steps since step {last}"
        return None

    def _follow(self, name: str, step: int, *, fired: bool = False) -> None:
        before = self._stands.get(name, QUIET)
        now = before
        if fired:
            now = FIRING
        elif isinstance(self.detector, Standing):
            now = self.detector.standing(name)
        open_ = self.firings.open.setdefault(self.name, set())
        (open_.add if now == FIRING else open_.discard)(name)
        self._stands[name] = now
        if now != before or fired:
            self._record(name, step, RESOLVED if (before, now) == (FIRING, QUIET) else now)

    def _record(self, name: str, step: int, state: str) -> None:
        alert = "" if state in (PENDING, QUIET) else self._alert.get(name, "")
        self._changes.append(AlertChanged(step, fingerprint(self.name, name), self.name, name, state, alert))


@dataclass(frozen=True)
class Incident:
    """All alerts of one rule on one signal, and where they stand.

    Attributes:
        fingerprint: its name in every attempt.
        rule: the rule's name, or the detector's where it has none.
        signal: the signal.
        state: one of `STATES`.
        alerts: its alerts, oldest first; empty while pending.
        since: step at which it came into this state.
        by: who acknowledged it, empty where nobody did.
        note: what they said.
    """

    fingerprint: str
    rule: str
    signal: str
    state: str
    alerts: tuple[Alert, ...]
    since: int
    by: str = ""
    note: str = ""

    @property
    def muted(self) -> str:
        """Why its last alert was kept quiet; empty where it was not."""
        return str(self.alerts[-1].evidence.get("muted", "")) if self.alerts else ""


def incidents(alerts: Sequence[Alert], events: Sequence[Event]) -> list[Incident]:
    """Where every incident of a run stands, from what its journal holds; firing ones first.

    An acknowledgement counts for the incident until it fires again at a later step.
    """
    grouped: dict[str, list[Alert]] = {}
    for alert in alerts:
        grouped.setdefault(mark_of(alert), []).append(alert)
    changed: dict[str, AlertChanged] = {one.fingerprint: one for one in events if isinstance(one, AlertChanged)}
    said = {one.fingerprint: one for one in events if isinstance(one, AlertAcknowledged)}
    made = [
        _incident(mark, grouped.get(mark, []), changed.get(mark), said.get(mark)) for mark in {**grouped, **changed}
    ]
    order = {state: place for place, state in enumerate((FIRING, PENDING, ACKNOWLEDGED, RESOLVED))}
    return sorted((one for one in made if one is not None), key=lambda one: (order[one.state], one.since, one.rule))


def mark_of(alert: Alert) -> str:
    """An alert's fingerprint, also of one that no named rule raised."""
    return str(alert.evidence.get("fingerprint") or fingerprint(alert.rule, alert.signal))


def rule_name(alert: Alert) -> str:
    """The name of the rule that raised an alert, or its detector's."""
    return str(alert.evidence.get("rule_name") or alert.rule)


def is_muted(alert: Alert) -> bool:
    """Whether an alert is only recorded: neither acted on nor sent."""
    return bool(alert.evidence.get("muted"))


def requested_actions(alert: Alert, otherwise: Sequence[str]) -> tuple[str, ...]:
    """What an alert asks of the training: its rule's actions, or those given for alerts without a rule."""
    if is_muted(alert):
        return ()
    asked: Mapping[str, Any] = alert.evidence
    return tuple(asked["actions"]) if "actions" in asked else tuple(otherwise)


def _incident(
    mark: str, alerts: Sequence[Alert], change: AlertChanged | None, said: AlertAcknowledged | None
) -> Incident | None:
    if not alerts and (change is None or change.state != PENDING):
        return None
    last = alerts[-1].step if alerts else -1
    state, since = (change.state, change.step) if change is not None else (FIRING, last)
    if state == QUIET:
        state = RESOLVED
    elif state == PENDING and alerts:
        state, since = RESOLVED, last  # making its case anew after an alert that is over
    rule = change.rule if change is not None else rule_name(alerts[-1])
    signal = change.signal if change is not None else alerts[-1].signal
    counts = said is not None and said.step >= last and state == FIRING
    if counts and said is not None:
        return Incident(mark, rule, signal, ACKNOWLEDGED, tuple(alerts), since, said.by, said.note)
    return Incident(mark, rule, signal, state, tuple(alerts), since)
