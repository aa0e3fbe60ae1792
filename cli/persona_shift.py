"""`palimpsest persona shift`: how far did the same prompts move from one checkpoint to the next?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.persona_model import POOLINGS, load_model, neutral_rows, origin_of, reading_bar

if TYPE_CHECKING:
    from diffing.persona import PairedShift, PersonaVector, Projection
    from diffing.prompts import PromptSet

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("base")
@click.argument("tuned", nargs=-1, required=True)
@click.option("--vector", "vectors", type=_FILE, multiple=True, required=True, help="Persona vector; may be repeated.")
@click.option("--prompts", type=_FILE, help="Rows to read; default: the shipped neutral probe questions.")
@click.option("--pooling", type=click.Choice(POOLINGS), help="Tokens to read; default: as the vector was extracted.")
@click.option("--unit", type=click.Choice(("gap", "raw")), default="gap", show_default=True)
@click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, or as stored.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, mps.")
@click.option("--max-length", default=1024, show_default=True, help="Tokens a row; longer are refused.")
@click.option("--batch-tokens", default=8192, show_default=True, help="Tokens a forward pass.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for machines.")
def shift(
    base: str,
    tuned: Sequence[str],
    vectors: Sequence[Path],
    prompts: Path | None,
    pooling: str | None,
    unit: str,
    dtype: str,
    device: str,
    max_length: int,
    batch_tokens: int,
    as_json: bool,
) -> None:
    """How far prompts moved along persona vectors from BASE to each TUNED checkpoint, paired by prompt.

    TUNED may be adapter folders on BASE or whole checkpoints. The 95 % interval is over prompts, of the differences.
    """
    from diffing.persona import PersonaVector
    from diffing.prompts import PromptSet

    axes = [PersonaVector.load(path) for path in vectors]
    rows = PromptSet.from_file(prompts) if prompts else neutral_rows()
    if prompts is None:
        pooling = pooling or "last_prompt"
    settings: dict[str, Any] = {
        "pooling": pooling, "unit": unit, "max_length": max_length, "batch_tokens": batch_tokens,
    }  # fmt: skip
    where = {"dtype": dtype, "device": device}
    before = _read(base, None, axes, rows, settings, where, quiet=as_json)
    found = [(name, _read(name, base, axes, rows, settings, where, quiet=as_json)) for name in tuned]
    shifts = [(name, _shifts(before, after)) for name, after in found]
    if as_json:
        click.echo(json.dumps({name: [_facts(one) for one in made] for name, made in shifts}, sort_keys=True))
    else:
        _show(base, shifts)


def _read(
    model: str,
    base: str | None,
    axes: Sequence[PersonaVector],
    rows: PromptSet,
    settings: dict[str, Any],
    where: dict[str, str],
    *,
    quiet: bool,
) -> list[Projection]:
    from diffing.persona import project

    loaded = load_model(model, base=base, revision=None, **where)
    origin = origin_of(loaded, base)
    with reading_bar(f"Reading {model}", quiet=quiet) as progress:
        return [project(loaded, rows, axis, derived_from=origin, progress=progress, **settings) for axis in axes]


def _shifts(before: Sequence[Projection], after: Sequence[Projection]) -> list[PairedShift]:
    from diffing.persona import paired_shift

    return [paired_shift(one, other) for one, other in zip(before, after, strict=True)]


def _facts(one: PairedShift) -> dict[str, Any]:
    named = ("trait", "site", "unit", "mean", "low", "high", "n")
    return {**{name: getattr(one, name) for name in named}, "values": one.values.tolist()}


def _show(base: str, shifts: Sequence[tuple[str, Sequence[PairedShift]]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tracker.report.text import signed, visible

    table = Table(box=None, padding=(0, 2, 0, 0), title=Text(f"From {visible(base)}"), title_justify="left")
    for name in ("to", "trait", "site", "shift", "95 %", "n"):
        table.add_column(name, justify="right" if name in ("shift", "95 %", "n") else "left")
    for name, made in shifts:
        for one in made:
            interval = "-" if one.low is None or one.high is None else f"{signed(one.low)} to {signed(one.high)}"
            facts = (f"{signed(one.mean)} {one.unit}", interval, str(one.n))
            table.add_row(Text(visible(name, limit=60)), Text(visible(one.trait)), one.site, *facts)
    Console(highlight=False).print(table)
