"""What is a receiver told of an alert?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tracker.alert_life import mark_of, rule_name
from tracker.events import AlertChanged
from tracker.signals import Alert

_EVIDENCE_CHARACTERS = 20_000


@dataclass(frozen=True)
class Message:
    """One thing to tell.

    Attributes:
        id: the same whenever it is sent again; receivers may use it to drop repeats.
        status: `firing` or `resolved`.
        run: the run's name.
        severity: `warning` or `critical`.
        title: one line.
        text: some lines.
        facts: the same for machines, JSON values.
    """

    id: str
    status: str
    run: str
    severity: str
    title: str
    text: str
    facts: dict[str, Any]

    def to_json(self) -> str:
        """One line of JSON: `version`, `id`, `status`, `run`, `severity`, `title`, `alert`."""
        body = {"version": 1, "id": self.id, "status": self.status, "run": self.run, "severity": self.severity}
        return json.dumps({**body, "title": self.title, "alert": self.facts}, sort_keys=True, default=str)


def firing(alert: Alert, run: str) -> Message:
    """That an alert fired."""
    interval = "" if alert.low is None else f" (at least {alert.low:.3g})"
    lines = [
        f"{alert.signal} is {alert.value:.3g} {alert.unit}{interval}, above {alert.threshold:g} since step "
        f"{alert.since}.",
        f"Rule: {alert.rule}. Run: {run}, step {alert.step}.",
        *_pushed(alert),
        f"More: palimpsest explain RUN_DIR --alert {alert.id}",
    ]
    title = f"{alert.severity.upper()}: {rule_name(alert)} in {run} at step {alert.step}"
    return Message(
        id=alert.id,
        status="firing",
        run=run,
        severity=alert.severity,
        title=title,
        text="\n".join(lines),
        facts={**_facts(alert), "evidence": _bounded(alert)},
    )


def resolved(change: AlertChanged, alert: Alert, run: str) -> Message:
    """That what an alert was about is over."""
    said = f"{alert.signal} is back below the threshold of {rule_name(alert)} at step {change.step}."
    return Message(
        id=f"{alert.id}:resolved@{change.step}",
        status="resolved",
        run=run,
        severity=alert.severity,
        title=f"Resolved: {rule_name(alert)} in {run} at step {change.step}",
        text=said,
        facts={**_facts(alert), "resolved_step": change.step},
    )


def _facts(alert: Alert) -> dict[str, Any]:
    named = ("signal", "step", "value", "low", "threshold", "unit", "since", "severity", "rule")
    facts = {name: getattr(alert, name) for name in named}
    return {"id": alert.id, "fingerprint": mark_of(alert), "rule_name": rule_name(alert), **facts}


def _bounded(alert: Alert) -> dict[str, Any]:
    """The evidence, as far as it is short enough to be sent; training text can be long."""
    kept: dict[str, Any] = {}
    left = _EVIDENCE_CHARACTERS
    for name, value in alert.evidence.items():
        size = len(json.dumps(value, default=str))
        if size <= left:
            kept[name], left = value, left - size
    return kept


def _pushed(alert: Alert) -> list[str]:
    found = alert.evidence.get("pushed_by")
    rows = found if isinstance(found, list) else []
    names = [str(row.get("example", row)) if isinstance(row, dict) else str(row) for row in rows[:3]]
    read = alert.evidence.get("pushed_steps_read")
    seen = f" ({read[0]} of {read[1]} steps were read)" if isinstance(read, list) and len(read) == 2 else ""
    return [f"Rows that pushed most{seen}: {', '.join(names)}."] if names else []
