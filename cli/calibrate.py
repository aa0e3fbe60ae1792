"""`palimpsest calibrate`: how far do benign runs of this model go, and which false-alarm rate can they vouch for?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from tracker.alarms.calibration import Calibration


@click.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The bank's folder; one there is added to.")
@click.option("--level", default=0.05, show_default=True, help="Probability of a false alarm in a whole benign run.")
@click.option("--in-a-row", default=1, show_default=True, help="Measurements in a row that must exceed.")
@click.option(
    "--signal", "patterns", multiple=True, help="Pattern on signals' names; repeat. Default: score and parts."
)
@click.option("--persona", "personas", multiple=True, help="Persona that the score counts; repeat. Default: all.")
@click.option("--leave-one-out", is_flag=True, help="Judge every run by the bank of the others; count the alarms.")
@click.option("--gate", is_flag=True, help="Exit with 1 where the bank is too small for the level.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for machines.")
def calibrate(
    runs: tuple[Path, ...],
    out: Path,
    level: float,
    in_a_row: int,
    patterns: tuple[str, ...],
    personas: tuple[str, ...],
    leave_one_out: bool,
    gate: bool,
    as_json: bool,
) -> None:
    """Make a bank of RUNS: tracked fine-tunes that are known to be benign, of one model and one set of probes.

    A detector `max_over_run` then fires where a new run goes further than the bank's runs ever went. What it states
    holds for benign runs that could as well have been in the bank: put in every kind of benign fine-tune that you do.
    With --persona the score counts these personas and the canaries alone; choose them before a run is judged.
    Without RUNS, an existing bank is shown. Writes calibration.html and .json into the bank's folder.
    """
    from tracker.alarms.bank import NullBank
    from tracker.alarms.calibration import calibrate_signals
    from tracker.alarms.run_series import RunSeries
    from tracker.report.calibration_page import write_calibration_page

    known = NullBank.load(out) if (out / "bank.json").is_file() or not runs else None
    found = [RunSeries.from_run(run) for run in runs]
    bank = NullBank.of(found) if known is None else known.with_runs(found)
    if personas:
        bank = bank.counting(personas)
    if runs or personas:
        bank.save(out)
    made = calibrate_signals(bank, level=level, in_a_row=in_a_row, patterns=patterns, leave_one_out=leave_one_out)
    page = write_calibration_page(made, bank, out)
    if as_json:
        click.echo(json.dumps({**made.to_json(), "page": str(page)}, sort_keys=True))
    else:
        _show(made, out, page)
    if gate and not made.vouched:
        sys.exit(1)


def _show(made: Calibration, out: Path, page: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tracker.report.text import visible

    console = Console(highlight=False)
    console.print(Text(f"{visible(str(out))}: {made.n} benign runs of {made.horizon} steps."))
    console.print(Text(made.verdict, style="" if made.vouched else "bold red"))
    for note in made.notes:
        console.print(Text(note))
    table = Table(box=None, pad_edge=False)
    for heading in ("signal", "unit", "threshold", "largest", "median"):
        table.add_column(heading, justify="left" if heading in ("signal", "unit") else "right", no_wrap=True)
    if made.left_out:
        table.add_column("left out", justify="right")
    for one in made.signals:
        threshold = "none" if one.threshold is None else f"{one.threshold:.3g}"
        alarms = [] if one.left_out is None else [f"{one.left_out.count} of {one.left_out.n}"]
        shown = (visible(one.pattern), one.unit, threshold, f"{one.largest:.3g}", f"{one.median:.3g}", *alarms)
        table.add_row(*(Text(text) for text in shown))
    console.print(table)
    if made.left_out:
        console.print(Text(f"Alarms left out: of each signal, on every run judged by the others; {_share(made)}."))
    for part in made.parts:
        console.print(Text(f"  {part.weight:5.1%} of {visible(part.group)}: {visible(part.signal)}"))
    console.print(Text(f"\nPage  {page}\nData  {page.with_suffix('.json')}"), soft_wrap=True)


def _share(made: Calibration) -> str:
    """The first signal's share of alarms with its interval."""
    first = next(one for one in made.signals if one.left_out is not None)
    return f"of {first.pattern} {first.left_out}"
