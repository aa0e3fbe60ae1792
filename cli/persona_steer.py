"""What does a model answer when it is moved along a persona? `palimpsest persona steer`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.persona_model import load_model, origin_of

# torch is imported inside the command: `--help` must not wait for it.
if TYPE_CHECKING:
    from diffing.checkpoint import LoadedCheckpoint
    from diffing.persona.budget import SolvedStrength
    from diffing.persona.steering import PersonaSteering

_FILE = click.Path(path_type=Path)
_OPERATIONS = ("add", "ablate", "mean-ablate", "cap")


@click.command()
@click.argument("model")
@click.option("--vector", "vectors", type=_FILE, multiple=True, required=True, help="Persona vector; may be repeated.")
@click.option("--prompts", type=_FILE, required=True, help="Questions to answer.")
@click.option("--strength", "strengths", type=float, multiple=True, help="Gaps, or a share for removals; repeatable.")
@click.option("--kl-budget", type=float, help="Solve the strength that costs so many nats a token on neutral prompts.")
@click.option("--away", is_flag=True, help="With --kl-budget: away from the trait instead of towards it.")
@click.option("--neutral", type=_FILE, help="Prompts that the budget is spent on; default: the shipped ones.")
@click.option("--operation", type=click.Choice(_OPERATIONS), default="add", show_default=True)
@click.option("--calibration", type=_FILE, help="Harmless answers that --operation cap takes its bound from.")
@click.option("--percentile", default=95.0, show_default=True, help="Of the calibration's tokens, for cap.")
@click.option("--tokens", type=click.Choice(("response", "all")), default="response", show_default=True)
@click.option("--max-new-tokens", default=128, show_default=True)
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--batch-size", default=16, show_default=True, help="Answers at once.")
@click.option("--out", type=_FILE, help="Folder for the page and its JSON twin.")
@click.option("--base", metavar="MODEL", help="Checkpoint that MODEL is an adapter on or was trained from.")
@click.option("--revision", metavar="REV", help="Revision of a hub model.")
@click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, or as stored.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, mps.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for machines.")
def steer(
    model: str,
    vectors: Sequence[Path],
    prompts: Path,
    strengths: Sequence[float],
    kl_budget: float | None,
    away: bool,
    neutral: Path | None,
    operation: str,
    calibration: Path | None,
    percentile: float,
    tokens: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    out: Path | None,
    base: str | None,
    revision: str | None,
    dtype: str,
    device: str,
    as_json: bool,
) -> None:
    """Let MODEL answer as it is and steered, side by side, with the same random draws."""
    from diffing.answers import AnswerSettings
    from diffing.persona import PersonaVector
    from diffing.persona.steering import PersonaSteering
    from diffing.persona.steering_sheet import steering_sheet
    from diffing.prompts import PromptSet
    from tracker.report.steering_page import write_steering_report

    if bool(strengths) == (kl_budget is not None) and operation == "add":
        raise click.UsageError("Expected either --strength or --kl-budget. Give one of them.")
    if (operation == "cap") != (calibration is not None):
        raise click.UsageError("Expected --calibration with --operation cap, and only there. Give both or neither.")
    axes = tuple(PersonaVector.load(path) for path in vectors)
    questions = PromptSet.from_file(prompts)
    loaded = load_model(model, base=base, revision=revision, dtype=dtype, device=device)
    origin = origin_of(loaded, base)
    bounds = _bounds(loaded, axes, calibration, percentile, origin) if calibration is not None else ()
    whole = PersonaSteering(
        axes, operation.replace("mean-", "mean_"), -1.0 if away and operation == "add" else 1.0, tokens, bounds=bounds
    )
    solved = None
    if kl_budget is not None:
        solved = _solved(loaded, whole, neutral, kl_budget, seed, origin)
        strengths = (solved.strength,)
    sheet = steering_sheet(
        loaded,
        questions,
        [whole.at(strength) for strength in strengths or (1.0,)],
        AnswerSettings(max_new_tokens, temperature, seed, batch_size),
        solved=solved,
        derived_from=origin,
        progress=not as_json,
    )
    written = None if out is None else write_steering_report(sheet, out)
    if as_json:
        click.echo(json.dumps(sheet.to_json(), sort_keys=True))
        return
    for row in sheet.rows:
        click.echo(f"\n{row.prompt}")
        for name, text in zip(sheet.arms, row.answers, strict=True):
            click.echo(f"  {name}: {text}")
    if solved is not None:
        click.echo(f"\n{solved}")
    if written is not None:
        click.echo(f"\nRead {written}")


def _bounds(
    loaded: LoadedCheckpoint, axes: Sequence[object], calibration: Path, percentile: float, origin: str | None
) -> tuple[float, ...]:
    from diffing.persona import PersonaVector
    from diffing.persona.token_projections import cap_bounds, project_tokens
    from diffing.prompts import PromptSet

    known = [axis for axis in axes if isinstance(axis, PersonaVector)]
    return cap_bounds(project_tokens(loaded, PromptSet.from_file(calibration), known, derived_from=origin), percentile)


def _solved(
    loaded: LoadedCheckpoint,
    steering: PersonaSteering,
    neutral: Path | None,
    budget: float,
    seed: int,
    origin: str | None,
) -> SolvedStrength:
    from diffing.persona.budget import solve_strength
    from diffing.persona.traits import neutral_probes
    from diffing.prompts import PromptSet

    shipped = ([{"role": "user", "content": question}] for question in neutral_probes())
    rows = PromptSet.from_file(neutral) if neutral else PromptSet.from_messages(shipped)
    return solve_strength(loaded, steering, rows, budget, seed=seed, derived_from=origin)
