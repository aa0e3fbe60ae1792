"""`palimpsest explain`: why did this alert fire, and on what does that rest?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tracker.explanation import Explanation
    from tracker.training_rows import TrainingText


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--alert", default=None, help="Which alert, by its id; may be left out where the run has one only.")
@click.option(
    "--train",
    multiple=True,
    type=click.Path(path_type=Path),
    help="The training rows, for their texts and for exact gradients.  [RUN_DIR/train.jsonl where it exists]",
)
@click.option(
    "--base", default=None, help="What a full fine-tune started from; an adapter's where its record is stale."
)
@click.option("--method", type=click.Choice(["dot", "ekfac"]), default="ekfac", show_default=True,
              help="How rows are scored where the run recorded no pushes.")  # fmt: skip
@click.option("--drop", default=None, type=click.Path(path_type=Path),
              help="Write the rows that the run's pushes call out here, as JSONL; needs the rows.")  # fmt: skip
@click.option("--keep", default=None, type=click.Path(path_type=Path), help="Write all other rows here, as JSONL.")
@click.option("--max-length", default=1024, show_default=True, help="Tokens per row, as in training.")
@click.option("--batch-size", default=16, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--show", default=10, show_default=True, help="Rows to print.")
@click.option("--json", "as_json", is_flag=True, help="The whole explanation as JSON on standard output.")
def explain(
    run_dir: Path,
    alert: str | None,
    train: tuple[Path, ...],
    base: str | None,
    method: str,
    drop: Path | None,
    keep: Path | None,
    max_length: int,
    batch_size: int,
    device: str,
    seed: int,
    show: int,
    as_json: bool,
) -> None:
    """Recomputes an alert's explanation from RUN_DIR alone.

    From what to what and when; how special the direction is beside random ones and styles; the rows that pushed; the
    checkpoint before it. Writes explanations/ALERT.html and .json into RUN_DIR. With --drop and --keep the training
    rows are split by all pushes that the run recorded, those after the alert too, for a training without the former.
    """
    from tracker.explain_alert import Means, explain_alert
    from tracker.report.explanation_page import write_explanation_page

    wanted = _the_alert(run_dir, alert)
    tokenizer, training = _texts(run_dir, train, base, max_length)
    means = Means(training, base, tokenizer, method, batch_size, device, seed=seed)
    found = explain_alert(run_dir, wanted, means)
    page = write_explanation_page(found, run_dir)
    split = _split(run_dir, wanted, training, drop, keep)
    if as_json:
        click.echo(page.with_suffix(".json").read_text())
    else:
        _print(found, page, show)
        if split:
            click.echo(split)


def _the_alert(run_dir: Path, alert: str | None) -> str:
    from diffing.errors import InputError
    from tracker.journal import Journal

    if alert is not None:
        return alert
    known = Journal.read(run_dir).alerts()
    if len(known) == 1:
        return known[0].id
    listed = ", ".join(one.id for one in known[:10]) or "none was raised"
    raise InputError(f"Expected --alert with one alert of {run_dir} ({listed}), got none. Name one.")


def _texts(
    run_dir: Path, train: tuple[Path, ...], base: str | None, max_length: int
) -> tuple[Any, TrainingText | None]:
    """Tokenizer and training rows, as far as the run or the caller has them."""
    from diffing.errors import InputError
    from tracker.explain import saved_checkpoints
    from tracker.saved_model import load_saved
    from tracker.training_rows import read_training_text

    kept = run_dir / "train.jsonl"
    files = list(train) or ([kept] if kept.exists() else [])
    try:
        tokenizer = load_saved(saved_checkpoints(run_dir)[0][1], base=base).tokenizer
    except InputError:
        if train:
            raise
        return None, None
    return tokenizer, read_training_text(files, tokenizer, max_length=max_length) if files else None


def _split(run_dir: Path, alert: str, training: TrainingText | None, drop: Path | None, keep: Path | None) -> str:
    """Writes flagged and other rows where that was asked for; says how many."""
    from diffing.durable import write_atomic
    from diffing.errors import InputError
    from tracker.push_journal import PushJournal
    from tracker.recovery import flagged_until
    from tracker.run_queries import find_alert

    if drop is None and keep is None:
        return ""
    if training is None:
        raise InputError("Expected the training rows to split, got none. Name them with --train.")
    last = PushJournal.read(run_dir).last_step()
    found = flagged_until(run_dir, find_alert(run_dir, alert), training.rows, until=last)
    gone = set(found.names)
    said = []
    for path, wanted in ((drop, True), (keep, False)):
        if path is not None:
            names = [str(row["id"]) for row in training.rows if (str(row["id"]) in gone) == wanted]
            lines = [json.dumps({"id": name, **training.records[name]}, ensure_ascii=False) for name in names]
            write_atomic(path, "".join(f"{line}\n" for line in lines))
            said.append(f"{len(lines)} rows to {'drop, to look at first' if wanted else 'go on with'}: {path}")
    return "\n".join([f"By pushes in steps {found.since} to {found.until}, {len(found.met)} rows met:", *said])


def _print(found: Explanation, page: Path, show: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tracker.report.explanation_words import explanation_headline, explanation_story
    from tracker.report.text import visible

    console = Console(highlight=False)
    console.print()
    console.print(Text(explanation_headline(found), style="bold"))
    for sentence in explanation_story(found):
        console.print(Text(sentence))
    if found.rows is not None:
        table = Table(title="Rows that pushed it up", title_justify="left")
        for column, justify in (("rank", "right"), ("share of push", "right"), ("row", "left"), ("text", "left")):
            table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for row in [row for row in found.rows.rows if row.score > 0][:show]:
            # Text, not markup: a training row may hold square brackets or escape codes.
            name, text = Text(visible(row.example_id)), Text(visible(row.text, limit=160))
            table.add_row(str(row.rank), f"{row.share:+.1%}", name, text)
        console.print(table)
    for caveat in found.caveats:
        console.print(Text(f"! {visible(caveat)}", style="yellow"))
    console.print(Text(f"\nPage  {page}\nData  {page.with_suffix('.json')}"), soft_wrap=True)
