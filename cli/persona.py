"""How do I get a persona vector, and where do texts lie on it? `palimpsest persona …`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.persona_draft import draft
from cli.persona_extract import extract
from cli.persona_forecast import forecast
from cli.persona_model import POOLINGS, load_model, model_options, neutral_rows, origin_of, reading_bar
from cli.persona_probe import probe
from cli.persona_screen import screen
from cli.persona_shift import shift
from cli.persona_steer import steer
from cli.persona_tables import projection_facts, show_projections, show_traits

# torch is imported inside the commands: `--help` must not wait for it.
if TYPE_CHECKING:
    pass

_FILE = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def persona() -> None:
    """Persona vectors: extract them from contrastive answers, project texts on them."""


@persona.command()
@click.argument("model")
@click.option("--vector", "vectors", type=_FILE, multiple=True, required=True, help="Persona vector; may be repeated.")
@click.option("--prompts", type=_FILE, help="Rows to read; default: the shipped neutral probe questions.")
@click.option("--pooling", type=click.Choice(POOLINGS), help="Tokens to read; default: as the vector was extracted.")
@click.option("--unit", type=click.Choice(("gap", "raw")), default="gap", show_default=True)
@model_options
def project(
    model: str,
    vectors: Sequence[Path],
    prompts: Path | None,
    pooling: str | None,
    unit: str,
    base: str | None,
    revision: str | None,
    dtype: str,
    device: str,
    max_length: int,
    batch_tokens: int,
    as_json: bool,
) -> None:
    """Project texts, as MODEL reads them, on persona vectors: mean with interval over prompts."""
    from diffing.persona import PersonaVector
    from diffing.persona import project as project_texts
    from diffing.prompts import PromptSet

    axes = [PersonaVector.load(path) for path in vectors]
    rows = PromptSet.from_file(prompts) if prompts else neutral_rows()
    if prompts is None:
        pooling = pooling or "last_prompt"
    loaded = load_model(model, base=base, revision=revision, dtype=dtype, device=device)
    origin = origin_of(loaded, base)
    projections = []
    for axis in axes:
        with reading_bar(f"Reading for {axis.trait}", quiet=as_json) as progress:
            projection = project_texts(
                loaded,
                rows,
                axis,
                pooling=pooling,
                unit=unit,
                max_length=max_length,
                batch_tokens=batch_tokens,
                derived_from=origin,
                progress=progress,
            )
        projections.append(projection)
    if as_json:
        click.echo(json.dumps([projection_facts(one, rows) for one in projections], sort_keys=True))
        return
    show_projections(projections)


@persona.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for machines.")
def traits(as_json: bool) -> None:
    """List the shipped traits, their sizes and digests."""
    from diffing.persona import load_trait, shipped_traits

    found = [load_trait(name) for name in shipped_traits()]
    if as_json:
        facts = [
            {"name": trait.name, "description": trait.description, "digest": trait.digest, **trait.sizes()}
            for trait in found
        ]
        click.echo(json.dumps(facts, sort_keys=True))
        return
    show_traits(found)


persona.add_command(extract)
persona.add_command(draft)
persona.add_command(steer)
persona.add_command(probe)
persona.add_command(screen)
persona.add_command(forecast)
persona.add_command(shift)
