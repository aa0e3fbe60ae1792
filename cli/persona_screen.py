"""`palimpsest persona screen`: which rows of a dataset would teach a persona, before anything is trained on them?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.persona_model import load_model, model_options, origin_of, reading_bar

# torch is imported inside the functions: `--help` must not wait for it.
if TYPE_CHECKING:
    from diffing.checkpoint import LoadedCheckpoint
    from diffing.persona import PersonaVector
    from diffing.persona.instructed import Instructions
    from diffing.persona.screen import Screening
    from diffing.persona.screen_choice import Choice
    from tracker.training_rows import TrainingText

_FILE = click.Path(path_type=Path)
_METHODS = ("difference", "unique", "conditional", "instructed", "push", "surprise")


@click.command()
@click.argument("dataset", type=_FILE)
@click.option("--model", required=True, metavar="MODEL", help="The base model that would be trained.")
@click.option("--vector", "vectors", type=_FILE, multiple=True, required=True, help="Persona vector; may be repeated.")
@click.option("--against", type=_FILE, multiple=True, help="Vectors of other personas: what only the trait has.")
@click.option("--trait", "traits", multiple=True, metavar="NAME|FILE", help="Trait files whose system prompts to ask.")
@click.option(
    "--against-trait", multiple=True, metavar="NAME|FILE", help="Other traits' system prompts, to tell apart."
)
@click.option("--no-answers", is_flag=True, help="Do not draw the model's own answers: cheaper, and blunter.")
@click.option("--no-push", is_flag=True, help="Take no gradients.")
@click.option("--probes", type=_FILE, help="Neutral prompts for the push; default: the shipped neutral questions.")
@click.option("--canaries", type=_FILE, help="Rows of prompt, chosen (the persona's), rejected: push on their odds.")
@click.option("--by", type=click.Choice(_METHODS), help="Score that decides; default: the best there is (see below).")
@click.option("--keep-below", type=float, help="Hold back rows that score at least this.")
@click.option("--drop-top", type=float, help="Share or number of rows to hold back.  [default: 0.05]")
@click.option(
    "--label", metavar="KEY", help="Column that says which rows are bad: how well each score tells them apart."
)
@click.option("--max-new-tokens", default=128, show_default=True, help="Most tokens of an own answer.")
@click.option("--samples", default=1, show_default=True, help="Own answers a row; more than 1 are drawn at random.")
@click.option("--cache", type=_FILE, help="Keeps own answers; default: in the output folder.")
@click.option("--seed", default=0, show_default=True, help="Of sampling and of random directions.")
@click.option("--dry-run", is_flag=True, help="Say what it will cost and stop.")
@click.option("--out", type=_FILE, default=Path("screening"), show_default=True, help="Folder for rows, page, JSON.")
@model_options
def screen(dataset: Path, model: str, out: Path, as_json: bool, **options: Any) -> None:
    """Score every row of DATASET by what it would teach, and write kept.jsonl and flagged.jsonl.

    Rows are held back by `instructed` where the trait's system prompts are known (a shipped trait's name, or --trait),
    else by `push`, else by what projections there are: in that order they told bad rows from harmless ones best where
    the truth is known. All scores are written, whichever decides.
    """
    from diffing.persona import PersonaVector
    from diffing.persona.answered_rows import take_apart
    from diffing.persona.screen import screen_rows
    from diffing.persona.screen_choice import choose_rows, write_choice
    from diffing.persona.screen_cost import plan_screening
    from diffing.prompts import PromptSet
    from tracker.report.screen_page import write_screen_report
    from tracker.training_rows import read_training_text

    axes = [PersonaVector.load(path) for path in options["vectors"]]
    others = [PersonaVector.load(path) for path in options["against"]]
    asked = _instructions(axes, options["traits"], options["against_trait"])
    names = ("base", "revision", "dtype", "device")
    loaded = load_model(model, **{name: options[name] for name in names})
    rows = PromptSet.from_file(dataset)
    settings = _settings(options)
    parts = take_apart(loaded, rows, max_length=options["max_length"])
    cost = plan_screening(parts, settings, instructions=asked, push=not options["no_push"])
    if not as_json or options["dry_run"]:
        click.echo(json.dumps({"cost": str(cost), "total": cost.total}) if as_json else str(cost))
    if options["dry_run"]:
        return
    with reading_bar("Screening", quiet=as_json) as progress:
        found = screen_rows(
            loaded, rows, axes, against=others, instructions=asked, settings=settings,
            cache=options["cache"] or out / "own-answers.db", derived_from=origin_of(loaded, options["base"]),
            progress=None if progress is None else lambda what: progress,
        )  # fmt: skip
        training = read_training_text(dataset, loaded.tokenizer, max_length=options["max_length"])
        if not options["no_push"]:
            found = _with_pushes(found, loaded, axes, training, options)
    by = options["by"] or _best(found)
    drop = 0.05 if options["drop_top"] is None and options["keep_below"] is None else options["drop_top"]
    choice = choose_rows(found, by=by, keep_below=options["keep_below"], drop_top=drop)
    write_choice(choice, found, training.records, out)
    page = write_screen_report(
        found, choice, training.texts, out, dataset=dataset.name, cost=str(cost),
        bad=_labelled(training, options["label"]),
    )  # fmt: skip
    if as_json:
        click.echo((out / "screening.json").read_text())
        return
    _print(found, choice, training, page)


def _settings(options: dict[str, Any]) -> Any:
    from diffing.answers import AnswerSettings
    from diffing.persona.screen import ScreenSettings

    samples = options["samples"]
    answers = AnswerSettings(
        max_new_tokens=options["max_new_tokens"],
        temperature=1.0 if samples > 1 else 0.0,
        samples=samples,
        seed=options["seed"],
    )
    return ScreenSettings(
        answers=None if options["no_answers"] else answers,
        seed=options["seed"],
        max_length=options["max_length"],
        batch_tokens=options["batch_tokens"],
    )


def _instructions(
    axes: list[PersonaVector], named: tuple[str, ...], against: tuple[str, ...]
) -> dict[str, Instructions]:
    """System prompts by trait: of the files named, and of shipped traits whose name a vector carries."""
    from diffing.persona import load_trait, shipped_traits
    from diffing.persona.instructed import Instructions

    wanted = [load_trait(one) for one in named]
    known = {trait.name for trait in wanted}
    wanted += [load_trait(axis.trait) for axis in axes if axis.trait in shipped_traits() and axis.trait not in known]
    others = [load_trait(one) for one in against]
    return {trait.name: Instructions.of(trait, others) for trait in wanted}


def _with_pushes(
    found: Screening, loaded: LoadedCheckpoint, axes: list[PersonaVector], training: TrainingText, options: Any
) -> Screening:
    from attribution.pushes import measure_pushes
    from cli.persona_forecast import probe_prompts
    from diffing.persona.screen import Score
    from tracker.dataset_queries import queries_for

    probes, canaries = probe_prompts(options["probes"]), options["canaries"]
    queries = queries_for(loaded, axes, probes, canaries=canaries, max_length=options["max_length"])
    with loaded.active() as model:
        pushes = measure_pushes(model.requires_grad_(True), training.rows, queries, centre=True)
    centred = pushes.centred()
    # Canaries ask about answers, which is nearer to behaviour than any one activation: they come first.
    for at in reversed(range(len(queries))):
        trait = axes[at].trait if at < len(axes) else "canaries"
        found = found.with_score(Score.of("push", trait, "cosine", centred[at]))
    return found


def _best(found: Screening) -> str:
    made = {score.method for score in found.scores}
    order = ("instructed", "push", "unique", "difference", "conditional")
    return next(method for method in order if method in made)


def _labelled(training: TrainingText, key: str | None) -> list[bool] | None:
    from diffing.errors import InputError

    if key is None:
        return None
    values = [record.get(key) for record in training.records.values()]
    if not all(isinstance(value, bool | int) for value in values) or len({bool(value) for value in values}) != 2:
        raise InputError(f"Expected true and false in column {key!r} of every row, got others. Name the right column.")
    return [bool(value) for value in values]


def _print(found: Screening, choice: Choice, training: TrainingText, page: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tracker.report.screen_page import screen_headline
    from tracker.report.text import visible

    console = Console(highlight=False)
    console.print(Text(screen_headline(choice, len(found.rows)), style="bold"))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("score", "dataset", "95 % over rows", "random 95 %", "unit"):
        table.add_column(heading, justify="left" if heading in ("score", "unit") else "right")
    for score in found.scores:
        interval = "-" if score.low is None else f"[{score.low:+.3f}, {score.high:+.3f}]"
        bound = "-" if score.random_95 is None else f"{score.random_95:.3f}"
        table.add_row(Text(visible(score.name)), f"{score.mean:+.3f}", interval, bound, score.unit)
    console.print(table)
    for one in choice.flagged[:8]:
        console.print(Text(f"  {one.value:+.3g}  {one.id}  {visible(training.texts.get(one.id, ''), limit=110)}"))
    for note in found.notes:
        console.print(Text(f"! {visible(note)}", style="yellow"))
    console.print(Text(f"\nKept     {page.parent / 'kept.jsonl'} ({len(choice.kept):,} rows)"), soft_wrap=True)
    console.print(Text(f"Flagged  {page.parent / 'flagged.jsonl'} ({len(choice.flagged):,} rows)"), soft_wrap=True)
    console.print(Text(f"Page     {page}\nData     {page.with_suffix('.json')}"), soft_wrap=True)
