"""`palimpsest attribute`: which training rows pushed a tracked run towards what is asked about?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.attribute_question import Asked

if TYPE_CHECKING:
    from attribution import Attribution
    from tracker.run_queries import Question
    from tracker.training_rows import TrainingText


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option(
    "--train",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="The training rows: JSONL, JSON, CSV, Parquet. May be given several times.",
)
@click.option("--persona", default=None, help="Ask about a trait tracked in the run, or a vector file.")
@click.option(
    "--query",
    default=None,
    type=click.Path(path_type=Path),
    help="Ask about answers: rows of prompt and completion, or of prompt, chosen and rejected.",
)
@click.option("--latent", default=None, type=int, help="Ask about a latent of a diff of this run, by its number.")
@click.option(
    "--diff",
    default=None,
    type=click.Path(path_type=Path),
    help="With --latent: what `palimpsest diff` wrote of the run's base and one of its checkpoints. [RUN_DIR/diff]",
)
@click.option(
    "--prompts",
    default=None,
    type=click.Path(path_type=Path),
    help="With --latent: texts to read it on.  [the run's probe prompts]",
)
@click.option("--alert", default=None, help="Ask about an alert of the run, by its id.")
@click.option("--canaries", is_flag=True, help="Ask about the run's canaries: misaligned over aligned answers.")
@click.option(
    "--base", default=None, help="What a full fine-tune started from; of an adapter, if its own record is stale."
)
@click.option(
    "--method",
    type=click.Choice(["auto", "ekfac", "adam", "dot", "live"]),
    default="auto",
    show_default=True,
    help="Over saved checkpoints by EK-FAC, Adam's own steps or dot products; or live pushes, auto for an alert.",
)
@click.option("--drop", default=None, type=click.Path(path_type=Path), help="Write the rows to drop here, as JSONL.")
@click.option("--drop-share", default=0.05, show_default=True, help="Share of the rows to drop, strongest first.")
@click.option("--validate", is_flag=True, help="Retrain without the strongest rows, and without random ones, to check.")
@click.option("--subsets", default=0, show_default=True, help="With --validate: retrainings on random halves besides.")
@click.option(
    "--counterfactual",
    is_flag=True,
    help="Train the run again without the --drop-share strongest rows, and without as many random ones.",
)
@click.option("--seeds", default=3, show_default=True, help="With --counterfactual: trainings of each kind.")
@click.option("--max-length", default=1024, show_default=True, help="Tokens per row, as in training.")
@click.option("--batch-size", default=16, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--show", default=10, show_default=True, help="Rows to print at either end.")
@click.option("--json", "as_json", is_flag=True, help="The whole ranking as JSON on standard output.")
def attribute(
    run_dir: Path,
    train: tuple[Path, ...],
    persona: str | None,
    query: Path | None,
    latent: int | None,
    diff: Path | None,
    prompts: Path | None,
    alert: str | None,
    canaries: bool,
    base: str | None,
    method: str,
    drop: Path | None,
    drop_share: float,
    validate: bool,
    subsets: int,
    counterfactual: bool,
    seeds: int,
    max_length: int,
    batch_size: int,
    device: str,
    seed: int,
    show: int,
    as_json: bool,
) -> None:
    """Ranks the rows that pushed what is asked about, over RUN_DIR's saved checkpoints.

    Asks one thing: a persona, answers, a latent, an alert, or the canaries. Writes attribution.html and
    attribution.json into RUN_DIR; `palimpsest report RUN_DIR` shows the ranking as well.
    """  # fmt: skip
    from tracker.explain import WithoutPlan, explain_question, read_training_text, saved_checkpoints
    from tracker.report import write_attribution_report
    from tracker.saved_model import load_saved
    from tracker.validate_ranking import CheckPlan

    asked = Asked(persona, query, latent, alert, canaries, diff, prompts)
    asked.check()
    _check_seeds(seeds)
    _check_share(drop_share)
    tokenizer = load_saved(saved_checkpoints(run_dir)[0][1], base=base).tokenizer
    training = read_training_text(train, tokenizer, max_length=max_length)
    question = asked.question(run_dir, tokenizer, base=base, max_length=max_length, device=device)
    n_drop = max(1, round(drop_share * len(training.rows)))
    result = explain_question(
        run_dir, training, question,
        base=base, method=_method(run_dir, method, alert, question), batch_size=batch_size, device=device,
        seed=seed, keep=max(50, n_drop),
        tokenizer=tokenizer, check=CheckPlan(drop_share, n_subsets=subsets) if validate else None,
        without=WithoutPlan(n_drop, seeds) if counterfactual else None,
    )  # fmt: skip
    page = write_attribution_report(result, run_dir)
    if drop is not None:
        write_rows_to_drop(result, training, drop, n_drop)
    if as_json:
        click.echo((run_dir / "attribution.json").read_text())
        return
    _print(result, show, page, drop, n_drop)


def _method(run_dir: Path, method: str, alert: str | None, question: Question) -> str:
    """What `auto` means: an alert is about some steps of the run, and live pushes know these and no others."""
    from diffing.errors import InputError
    from tracker.push_journal import PushJournal

    if method != "auto":
        return method
    if alert is None or not question.pushed:
        return "ekfac"
    try:
        watched = PushJournal.read(run_dir).queries
    except InputError:
        return "ekfac"
    return "live" if any(name.split("/")[1:2] == [question.pushed] for name in watched) else "ekfac"


def _check_share(share: float) -> None:
    from diffing.errors import InputError

    if not 0 < share < 1:
        raise InputError(f"Expected --drop-share between 0 and 1, got {share:g}. Pass 0.05 for the strongest 5 %.")


def _check_seeds(seeds: int) -> None:
    from diffing.errors import InputError

    if seeds < 1:
        raise InputError(f"Expected at least one seed for --seeds, got {seeds}. Pass 3 or more for an interval.")


def write_rows_to_drop(result: Attribution, training: TrainingText, path: Path, n_drop: int) -> None:
    """Writes the strongest rows as JSONL, each with its id, rank, score and share beside what the file held."""
    from diffing.durable import write_atomic

    lines = []
    for row in [row for row in result.rows if row.score > 0][:n_drop]:
        why = {"rank": row.rank, "score": row.score, "share_of_push": row.share, "query": result.query}
        held = training.records.get(row.example_id, {"text": row.text})
        lines.append(json.dumps({"id": row.example_id, **held, "palimpsest": why}, ensure_ascii=False))
    write_atomic(path, "".join(f"{line}\n" for line in lines))


def _print(result: Attribution, show: int, page: Path, drop: Path | None, n_drop: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tracker.report.attribution_words import attribution_headline, attribution_story
    from tracker.report.text import visible

    console = Console(highlight=False)
    console.print()
    console.print(Text(attribution_headline(result), style="bold"))
    for sentence in attribution_story(result):
        console.print(Text(sentence))
    table = Table(title=f"Rows that pushed: {visible(result.query)}", title_justify="left")
    for column, justify in (("rank", "right"), ("share of push", "right"), ("row", "left"), ("text", "left")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    ends = result.rows if len(result.rows) <= 2 * show else (*result.rows[:show], *result.rows[-show:])
    for row in ends:
        # Text, not markup: a training row may hold square brackets or escape codes.
        table.add_row(
            str(row.rank), f"{row.share:+.1%}", Text(visible(row.example_id)), Text(visible(row.text, limit=160))
        )
    console.print(table)
    for caveat in result.caveats:
        console.print(Text(f"! {visible(caveat)}", style="yellow"))
    if drop is not None:
        console.print(Text(f"The {n_drop} strongest rows, to look at before dropping them: {drop}"), soft_wrap=True)
    console.print(Text(f"\nPage  {page}\nData  {page.with_suffix('.json')}"), soft_wrap=True)
