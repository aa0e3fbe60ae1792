"""How do I train a linear probe on labelled texts and score others? `palimpsest persona probe train | score`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cli.persona_model import POOLINGS, load_model, model_options, origin_of

_FILE = click.Path(path_type=Path)


@click.group()
def probe() -> None:
    """Linear probes: train one on labelled texts, score texts with it."""


@probe.command()
@click.argument("model")
@click.option("--positive", type=_FILE, required=True, help="Texts of the kind that is looked for.")
@click.option("--negative", type=_FILE, required=True, help="Texts of the other kind, best to the same questions.")
@click.option("--name", required=True, help="What the probe tells apart.")
@click.option("--site", default="resid:50%", show_default=True)
@click.option("--pooling", type=click.Choice(POOLINGS), default="response_mean", show_default=True)
@click.option("--held-out", default=0.3, show_default=True, help="Share of questions that measure the probe.")
@click.option("--rate", default=0.01, show_default=True, help="False-positive rate at which recall is told.")
@click.option("--seed", default=0, show_default=True, help="Fixes the split and the folds.")
@click.option("--out", type=_FILE, required=True, help="File for the probe.")
@model_options
def train(
    model: str,
    positive: Path,
    negative: Path,
    name: str,
    site: str,
    pooling: str,
    held_out: float,
    rate: float,
    seed: int,
    out: Path,
    base: str | None,
    revision: str | None,
    dtype: str,
    device: str,
    max_length: int,
    batch_tokens: int,
    as_json: bool,
) -> None:
    """Train a logistic regression on MODEL's activations and say what it is worth on questions never seen."""
    from dataclasses import asdict

    from diffing.persona.probe_training import train_probe
    from diffing.prompts import PromptSet

    loaded = load_model(model, base=base, revision=revision, dtype=dtype, device=device)
    made = train_probe(
        loaded,
        PromptSet.from_file(positive),
        PromptSet.from_file(negative),
        name=name,
        site=site,
        pooling=pooling,
        held_out=held_out,
        rate=rate,
        seed=seed,
        max_length=max_length,
        batch_tokens=batch_tokens,
    )
    path = made.save(out)
    if as_json:
        facts = {"path": str(path), "site": made.site, "penalty": made.penalty, "worth": asdict(made.worth)}
        click.echo(json.dumps(facts, sort_keys=True))
        return
    click.echo(f"{made.name} at {made.site}: {made.worth}")
    click.echo(f"Written to {path}")


@probe.command()
@click.argument("model")
@click.option("--probe", "file", type=_FILE, required=True, help="Made by `persona probe train`.")
@click.option("--prompts", type=_FILE, required=True, help="Texts to score.")
@model_options
def score(
    model: str,
    file: Path,
    prompts: Path,
    base: str | None,
    revision: str | None,
    dtype: str,
    device: str,
    max_length: int,
    batch_tokens: int,
    as_json: bool,
) -> None:
    """Score texts: log-odds, and whether they lie above the probe's threshold."""
    from diffing.persona.linear_probe import LinearProbe
    from diffing.prompts import PromptSet

    known, rows = LinearProbe.load(file), PromptSet.from_file(prompts)
    loaded = load_model(model, base=base, revision=revision, dtype=dtype, device=device)
    scores = known.score_texts(
        loaded, rows, derived_from=origin_of(loaded, base), max_length=max_length, batch_tokens=batch_tokens
    )
    limit = known.worth.threshold
    flagged = [None if limit is None else bool(one > limit) for one in scores]
    if as_json:
        found = [
            {"id": row.id, "score": float(one), "flagged": flag}
            for row, one, flag in zip(rows, scores, flagged, strict=True)
        ]
        click.echo(json.dumps({"threshold": limit, "rate": known.worth.rate, "rows": found}, sort_keys=True))
        return
    for row, one, flag in zip(rows, scores, flagged, strict=True):
        click.echo(f"{one:+8.3f} {'*' if flag else ' '} {row.id}")
    if limit is None:
        click.echo("No threshold: the probe had too few held-out negative texts for its rate.")
    else:
        n, rate = sum(map(bool, flagged)), known.worth.rate
        click.echo(f"{n} of {len(rows)} above {limit:.3f}, which {rate:.0%} of negative texts are (*)")
