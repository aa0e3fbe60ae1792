"""`palimpsest replay-alerts`: what would these rules have said of that run?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from tracker.replay import Replay


@click.command(name="replay-alerts")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--rules", "rules_file", required=True, type=click.Path(path_type=Path), help="YAML file with rules.")
@click.option("--gate", is_flag=True, help="Exit with 1 where the rules would have raised an alert.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for machines.")
def replay_alerts(run_dir: Path, rules_file: Path, gate: bool, as_json: bool) -> None:
    """Judge what was recorded in RUN_DIR by other rules, without training again. Nothing is written; nobody is told.

    \b
    rules:
      - name: evil                          # short, unique
        signal: persona/evil/*/prompt       # pattern on signals' names
        detector: {kind: effect_floor, floor: 0.25, unit: gap}
        for: 2                              # measurements in a row
        severity: critical                  # or warning
        cooldown: 200                       # steps in which further alerts are muted
        inhibited_by: [loss-spike]          # rules that mute this one
        actions: [log, save, stop]
        notify: [on-call]
      - {name: loss-spike, signal: train/loss, detector: non_finite}
    receivers:
      on-call: {apprise_env: ON_CALL_URLS}  # addresses stand in the environment
      ops: {webhook: "https://…", secret_env: HOOK_SECRET}
    """
    from tracker.replay import replay_alerts as replay
    from tracker.rules import RuleSet

    found = replay(run_dir, RuleSet.load(rules_file))
    click.echo(_as_json(found)) if as_json else _show(found)
    if gate and any(not alert.evidence.get("muted") for alert in found.alerts):
        sys.exit(1)


def _as_json(found: Replay) -> str:
    facts = {
        "alerts": [{"id": alert.id, **vars(alert)} for alert in found.alerts],
        "before": [alert.id for alert in found.before],
        "states": {one.fingerprint: one.state for one in found.incidents},
        "signals": found.n_signals,
        "unmatched": list(found.unmatched),
        "last_step": found.last_step,
    }
    return json.dumps(facts, sort_keys=True, default=str)


def _show(found: Replay) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tracker.alert_life import is_muted, rule_name
    from tracker.report.text import number, visible

    console = Console(highlight=False)
    console.print(f"{number(found.n_signals)} measurements up to step {number(found.last_step)} judged again.")
    for title, alerts in (("By these rules", found.alerts), ("While the run went on", found.before)):
        console.print(Text(f"\n{title}: {len(alerts)} alert{'' if len(alerts) == 1 else 's'}", style="bold"))
        if not alerts:
            continue
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("step", "rule", "signal", "value", "threshold", ""):
            table.add_column(name, justify="right" if name in ("step", "value", "threshold") else "left")
        for alert in alerts:
            said = f"muted: {alert.evidence['muted']}" if is_muted(alert) else alert.severity
            table.add_row(
                number(alert.step),
                Text(visible(rule_name(alert), limit=50)),
                Text(visible(alert.signal, limit=60)),
                f"{number(alert.value)} {alert.unit}",
                number(alert.threshold),
                Text(visible(said, limit=60)),
            )
        console.print(table)
    for name in found.unmatched:
        console.print(Text(f"! Rule {visible(name)} matches no signal of this run.", style="yellow"))
