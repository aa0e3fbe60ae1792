"""`palimpsest diff`: what changed between two checkpoints?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from diffing.checkpoint import LoadedCheckpoint
    from diffing.crosscoder.config import CrosscoderConfig
    from diffing.diff_result import DiffResult
    from diffing.endpoint import EndpointConfig
    from diffing.prompts import PromptSet


@click.command()
@click.argument("base")
@click.argument("tuned")
@click.option("--prompts", required=True, type=click.Path(path_type=Path), help="JSONL, JSON, CSV or Parquet.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for diff.html and diff.json.")
@click.option("--site", default="resid:50%", show_default=True, help="Where to read: resid:12, mlp:3, a module path.")
@click.option("--latents", default=None, type=int, help="Size of the crosscoder's dictionary.  [default: by the data]")
@click.option("--k", default=None, type=int, help="Latents active per token.  [default: by the data]")
@click.option(
    "--sparsity",
    default=None,
    type=click.Choice(("batch_topk", "l1", "jumprelu")),
    help="How few latents are kept active.  [default: batch_topk]",
)
@click.option(
    "--exclusive-share",
    default=None,
    type=float,
    help="Part of the dictionary, for each side, that may write to that side alone.  [default: none]",
)
@click.option(
    "--delta-weight", default=None, type=float, help="Weight of the error of tuned − base itself.  [default: 0]"
)
@click.option(
    "--held-out",
    default=None,
    type=float,
    help="Part of the tokens kept from the fit, on which its threshold is set.  [default: by the data]",
)
@click.option("--steps", default=None, type=int, help="Steps of the crosscoder's fit.  [default: by the data]")
@click.option(
    "--null-fits",
    default=None,
    type=int,
    help="Fits behind q-values, with nothing exclusive in them.  [default: by need]",
)
@click.option("--seeds", default=1, show_default=True, help="Fits behind the column stability, the first included.")
@click.option("--questions", default=None, type=click.Path(path_type=Path), help="Questions for both models to answer.")
@click.option(
    "--tuning-texts",
    default=None,
    type=click.Path(path_type=Path),
    help="What was trained on, to tell which surfaced words belong to it.",
)
@click.option(
    "--stagewise",
    is_flag=True,
    help="Which latents of a base dictionary turn with the model, on --prompts and --tuning-texts; costs some fits.",
)
@click.option(
    "--store-dtype",
    default=None,
    type=click.Choice(("float32", "bfloat16", "int8", "int4")),
    help="Of the stored activations.  [default: what the models compute]",
)
@click.option(
    "--persona", multiple=True, type=click.Path(path_type=Path), help="Vector files to hold the latents against."
)
@click.option("--describe-url", default=None, help="OpenAI-compatible server that describes latents: http://…/v1.")
@click.option("--describe-model", default=None, help="Name of the model there.")
@click.option("--describe-key-env", default="", help="Environment variable that holds the server's key.")
@click.option("--quick", is_flag=True, help="Leave out what costs forwards or fits beside the crosscoder's own.")
@click.option("--max-length", default=1024, show_default=True, help="Tokens per prompt; longer ones are cut.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The key figures as JSON on standard output.")
def diff(
    base: str,
    tuned: str,
    prompts: Path,
    out: Path,
    site: str,
    latents: int | None,
    k: int | None,
    sparsity: str | None,
    exclusive_share: float | None,
    delta_weight: float | None,
    held_out: float | None,
    steps: int | None,
    null_fits: int | None,
    seeds: int,
    questions: Path | None,
    tuning_texts: Path | None,
    stagewise: bool,
    store_dtype: str | None,
    persona: tuple[Path, ...],
    describe_url: str | None,
    describe_model: str | None,
    describe_key_env: str,
    quick: bool,
    max_length: int,
    device: str,
    as_json: bool,
) -> None:
    """Measures what changed from BASE to TUNED on the same prompts, and writes one page.

    BASE and TUNED are local folders or hub names, each with an optional @revision; TUNED may be an adapter folder.
    Interrupted, the same command goes on where it stopped.
    """
    from diffing.checkpoint import load_pair
    from diffing.diff import DiffPlan, diff_checkpoints
    from diffing.persona import PersonaVector
    from diffing.prompts import PromptSet
    from diffing.site import Site
    from tracker.report import write_diff_report

    # What is cheap to refuse is refused before anything is loaded.
    _check_out(out)
    Site.parse(site)
    texts = PromptSet.from_file(prompts)
    asked: dict[str, Any] = {
        "seeds": seeds,
        "questions": questions and PromptSet.from_file(questions),
        "tuning_texts": tuning_texts and PromptSet.from_file(tuning_texts),
        "stagewise": stagewise,
        "store_dtype": store_dtype,
        "personas": tuple(PersonaVector.load(path) for path in persona),
        "describe": _endpoint(describe_url, describe_model, describe_key_env),
    }
    plan = replace(DiffPlan.quick() if quick else DiffPlan(null_fits=null_fits), **asked)
    base_side, tuned_side = load_pair(base, tuned, device=device)
    settings = {
        "n_latents": latents,
        "k": k,
        "sparsity": sparsity,
        "exclusive_share": exclusive_share,
        "delta_weight": delta_weight,
        "held_out": held_out,
        "steps": steps,
    }
    chosen: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    result = diff_checkpoints(
        base_side,
        tuned_side,
        texts,
        out=out,
        site=site,
        crosscoder=_crosscoder(base_side, texts, site, max_length, chosen) if chosen else None,
        plan=plan,
        max_length=max_length,
        progress=not as_json,
    )
    page = write_diff_report(result, out)
    if as_json:
        click.echo(json.dumps(key_figures(result, page)))
    else:
        _print(result, page)


def _endpoint(url: str | None, model: str | None, key_env: str) -> EndpointConfig | None:
    from diffing.errors import InputError

    if url is None and model is None:
        return None
    if url is None or model is None:
        raise InputError("Expected --describe-url and --describe-model together, got one of them. Name both.")
    from diffing.endpoint import EndpointConfig

    return EndpointConfig(base_url=url, model=model, api_key_env=key_env)


def _check_out(out: Path) -> None:
    from diffing.errors import InputError

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"Expected a folder to write to for --out, got {out} ({error.strerror}). "
            "Name another; it is made where missing."
        ) from error


def _crosscoder(
    loaded: LoadedCheckpoint, prompts: PromptSet, site: str, max_length: int, chosen: dict[str, Any]
) -> CrosscoderConfig:
    """The settings that the data suggest, with those the caller chose in their place."""
    from diffing.crosscoder.config import CrosscoderConfig
    from diffing.site import resolve_site

    n_tokens = sum(len(ids) for ids in prompts.tokenize(loaded.tokenizer, max_length=max_length).input_ids)
    width = resolve_site(loaded.model, site).d_model or 1
    suggested = CrosscoderConfig.for_data(n_tokens, width)
    if "n_latents" in chosen and "k" not in chosen:
        chosen = {**chosen, "k": min(suggested.k, max(1, chosen["n_latents"] // 4))}
    return replace(suggested, **chosen)


def key_figures(result: DiffResult, page: Path) -> dict[str, Any]:
    """What a machine asks first; diff.json holds everything."""
    from tracker.report.diff_words import diff_headline
    from tracker.report.page import finite

    spread = result.divergence
    return finite(
        {
            "headline": diff_headline(result),
            "page": str(page),
            "twin": str(page.with_suffix(".json")),
            "divergence": spread
            and {"mean": spread.mean, "low": spread.low, "high": spread.high, "n": spread.n_tokens},
            "variance_explained": list(result.fit.variance_explained),
            "l0": result.fit.l0,
            "labels": result.counts(),
            "caveats": list(result.caveats),
        }
    )


def _print(result: DiffResult, page: Path) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from tracker.report.diff_words import diff_headline, diff_story
    from tracker.report.text import number, percent, visible

    console = Console(highlight=False)
    console.print()
    console.print(Text(diff_headline(result), style="bold"))
    for sentence in diff_story(result):
        console.print(Text(sentence))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    spread = result.divergence
    if spread is not None:
        between = f"95 % {number(spread.low)} to {number(spread.high)}, {number(spread.n_prompts)} prompts"
        table.add_row("KL per token", Text(f"{number(spread.mean)} nats ({between})"))
    table.add_row("variance explained", Text(", ".join(percent(value) for value in result.fit.variance_explained)))
    table.add_row("active latents per token", Text(f"{number(result.fit.l0)} of {number(result.fit.n_latents)}"))
    console.print(Padding(table, (1, 0, 1, 0)))
    for caveat in result.caveats:
        console.print(Text(f"! {visible(caveat)}", style="yellow"))
    console.print(Text(f"\nPage  {page}\nData  {page.with_suffix('.json')}"), soft_wrap=True)
