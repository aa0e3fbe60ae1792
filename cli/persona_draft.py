"""How do I write a trait of my own? `palimpsest persona draft`, by any OpenAI-compatible model."""

from __future__ import annotations

import json
from pathlib import Path

import click

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("description")
@click.option("--endpoint", required=True, metavar="URL", help="Up to and including /v1.")
@click.option("--model", required=True, help="The name the server knows it by.")
@click.option("--out", type=_FILE, help="Trait file.  [default: NAME.json]")
@click.option("--name", default="", help="Of the trait, a-z and _.  [default: from the description]")
@click.option("--contrasts", type=click.IntRange(0), default=16, show_default=True,
              help="Questions with both answers, for base models and --given.")  # fmt: skip
@click.option("--temperature", default=1.0, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Passed to the server, which may ignore it.")
@click.option("--api-key-env", default="", help="Environment variable with the endpoint's key.")
@click.option("--overwrite", is_flag=True, help="Replace a trait file that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for machines.")
def draft(
    description: str,
    endpoint: str,
    model: str,
    out: Path | None,
    name: str,
    contrasts: int,
    temperature: float,
    seed: int,
    api_key_env: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a trait file from DESCRIPTION: five pairs of system prompts, 40 questions, a rubric, contrasts.

    Every entry is checked, and what is missing or repeated is asked for again; nothing is filled in. Replies are kept
    beside the file, so that the same command pays for nothing twice. Read the file before you use it.
    """
    from diffing.durable import write_json
    from diffing.endpoint import Endpoint, EndpointConfig
    from diffing.errors import InputError
    from diffing.persona.draft import DraftSettings, draft_trait, trait_name

    settings = DraftSettings(name=name, contrasts=contrasts, temperature=temperature, seed=seed)
    path = out or Path(f"{name or trait_name(description)}.json")
    if path.exists() and not overwrite:
        raise InputError(f"Expected no file at {path}, got one. Name another with --out, or pass --overwrite.")
    config = EndpointConfig(endpoint, model, api_key_env=api_key_env)
    with Endpoint(config, cache=path.with_suffix(".replies.sqlite")) as asked:
        drafted = draft_trait(description, asked, settings)
        paid = asked.n_paid
    write_json(path, drafted.value)
    trait = drafted.trait
    if as_json:
        facts = {"path": str(path), "name": trait.name, "digest": trait.digest, **trait.sizes()}
        click.echo(json.dumps({**facts, "asked": paid, "refused": dict(drafted.n_refused)}, sort_keys=True))
        return
    sizes = trait.sizes()
    click.echo(
        f"Wrote {path}: {sizes['instructions']} pairs of system prompts, {sizes['questions']} + "
        f"{sizes['held_out_questions']} questions, {sizes['contrasts']} contrasts, a rubric; {paid} replies of {model}."
    )
    if drafted.n_refused:
        said = ", ".join(f"{reason} ({count})" for reason, count in sorted(drafted.n_refused.items()))
        click.echo(f"Turned down and asked for again: {said}.")
    click.echo(f"Read it, then: palimpsest persona extract MODEL --trait {path} --out {trait.name}.safetensors")
