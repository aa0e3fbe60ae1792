"""`palimpsest alerts`: what stands open in this run, and who has seen it?"""

from __future__ import annotations

import getpass
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tracker.alert_life import Incident


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--ack", metavar="ID", help="Acknowledge an incident, by its fingerprint or the id of an alert.")
@click.option("--note", default="", help="What you say of it; kept with the acknowledgement.")
@click.option("--by", default=None, help="Who acknowledges.  [default: the user's name]")
@click.option(
    "--deliver",
    type=click.Path(path_type=Path),
    metavar="RULES",
    help="Tell the receivers of this rule file what they could not be told while the run went on.",
)
@click.option("--gate", is_flag=True, help="Exit with 1 while anything fires that nobody acknowledged.")
@click.option("--stale", type=float, metavar="SECONDS", help="Exit with 1 where a run that has not ended fell silent.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for machines.")
def alerts(
    run_dir: Path,
    ack: str | None,
    note: str,
    by: str | None,
    deliver: Path | None,
    gate: bool,
    stale: float | None,
    as_json: bool,
) -> None:
    """List the incidents of the tracked run in RUN_DIR: pending, firing, acknowledged, resolved.

    An incident is all alerts of one rule on one signal. An acknowledgement holds over resumes, until the incident fires
    again at a later step.
    """
    from tracker.alert_life import FIRING, incidents
    from tracker.journal import Journal

    if ack is not None:
        _acknowledge(run_dir, ack, by or getpass.getuser(), note)
    undelivered = _deliver(run_dir, deliver) if deliver is not None else []
    with Journal.read(run_dir) as journal:
        found = incidents(journal.alerts(), journal.events())
        last, attempts = journal.last_ms(), journal.attempts()
    age = None if last is None else max(0.0, time.time() - last / 1000)
    running = bool(attempts) and attempts[-1].status is None
    silent = stale is not None and running and age is not None and age > stale
    loud = [one for one in found if one.state == FIRING and not one.muted]
    if as_json:
        facts = {"incidents": [_facts(one) for one in found], "age_seconds": age, "running": running, "silent": silent}
        click.echo(json.dumps(facts, sort_keys=True, default=str))
    else:
        _show(found)
        if silent:
            click.echo(f"Silent: nothing was recorded for {age:.0f} s, and the run has not ended.")
    for said in undelivered:
        click.echo(said, err=True)
    if (gate and loud) or silent or undelivered:
        sys.exit(1)


def _acknowledge(run_dir: Path, which: str, by: str, note: str) -> None:
    from diffing.errors import InputError
    from tracker.alert_life import incidents
    from tracker.events import AlertAcknowledged
    from tracker.journal import Journal

    with Journal.attach(run_dir) as journal:
        found = incidents(journal.alerts(), journal.events())
        for one in found:
            if one.alerts and (one.fingerprint.startswith(which) or which in {alert.id for alert in one.alerts}):
                journal.record_event(AlertAcknowledged(one.alerts[-1].step, one.fingerprint, by, note))
                return
        known = ", ".join(one.alerts[-1].id for one in found if one.alerts) or "none"
        raise InputError(f"Expected an alert of {run_dir} for --ack, got {which!r}. Known: {known}.")


def _deliver(run_dir: Path, rules: Path) -> list[str]:
    """What could still not be sent, one line a receiver."""
    from tracker.rules import RuleSet

    failed = []
    for sink in RuleSet.load(rules).sinks():
        drained = sink.drain(run_dir)
        click.echo(f"{sink.receiver.name}: {drained.sent} sent.", err=True)
        if drained.failed is not None:
            failed.append(f"{sink.receiver.name}: not reached, {drained.failed.reason}. Try again later.")
    return failed


def _facts(one: Incident) -> dict[str, Any]:
    last = one.alerts[-1] if one.alerts else None
    return {
        "fingerprint": one.fingerprint,
        "rule": one.rule,
        "signal": one.signal,
        "state": one.state,
        "since": one.since,
        "muted": one.muted,
        "by": one.by,
        "note": one.note,
        "alerts": [alert.id for alert in one.alerts],
        "value": last and last.value,
        "threshold": last and last.threshold,
        "unit": last and last.unit,
    }


def _show(found: list[Incident]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tracker.report.text import number, visible

    console = Console(highlight=False)
    if not found:
        console.print("No alert in this run.")
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("state", "rule", "signal", "since step", "value", "threshold", "fingerprint", ""):
        table.add_column(name, justify="right" if name in ("since step", "value", "threshold") else "left")
    for one in found:
        last = one.alerts[-1] if one.alerts else None
        said = one.muted or (f"{one.by}: {one.note}" if one.note else one.by)
        table.add_row(
            one.state,
            Text(visible(one.rule, limit=40)),
            Text(visible(one.signal, limit=60)),
            number(one.since),
            "" if last is None else f"{number(last.value)} {last.unit}",
            "" if last is None else number(last.threshold),
            one.fingerprint,
            Text(visible(said, limit=60)),
        )
    console.print(table)
