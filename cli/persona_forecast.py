"""`palimpsest persona forecast`: how far would training on this dataset move each trait, before the first step?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.persona_model import load_model, model_options, reading_bar

# torch is imported inside the functions: `--help` must not wait for it.
if TYPE_CHECKING:
    from attribution.forecast import Forecast
    from diffing.checkpoint import LoadedCheckpoint
    from diffing.prompts import PromptSet

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("dataset", type=_FILE)
@click.option("--model", required=True, metavar="MODEL", help="The base model that would be trained.")
@click.option("--vector", "vectors", type=_FILE, multiple=True, required=True, help="Persona vector; may be repeated.")
@click.option("--probes", type=_FILE, help="Neutral prompts to watch; default: the shipped neutral questions.")
@click.option("--canaries", type=_FILE, help="Rows of prompt, chosen (the persona's answer), rejected: log-odds too.")
@click.option("--lora", type=int, metavar="RANK", help="Forecast a LoRA of this rank on all linear maps.")
@click.option("--lora-alpha", type=float, help="Its alpha; default: twice the rank.")
@click.option("--learning-rate", default=1e-4, show_default=True, help="Of the training.")
@click.option("--train-batch", default=16, show_default=True, help="Rows an optimizer step.")
@click.option("--epochs", default=1.0, show_default=True, help="Passes over the dataset.")
@click.option("--seed", default=0, show_default=True, help="Of the adapter's start and of the bootstrap over rows.")
@click.option("--show", default=8, show_default=True, help="Rows to print for the first trait.")
@click.option("--out", type=_FILE, default=Path("forecast"), show_default=True, help="Folder for page and JSON.")
@model_options
def forecast(
    dataset: Path,
    model: str,
    vectors: tuple[Path, ...],
    probes: Path | None,
    canaries: Path | None,
    lora: int | None,
    lora_alpha: float | None,
    learning_rate: float,
    train_batch: int,
    epochs: float,
    seed: int,
    show: int,
    out: Path,
    base: str | None,
    revision: str | None,
    dtype: str,
    device: str,
    max_length: int,
    batch_tokens: int,
    as_json: bool,
) -> None:
    """Forecast what one training on DATASET would move, from gradients at the base; nothing is trained."""
    from attribution.forecast import ForecastSettings
    from attribution.forecast import forecast as forecast_rows
    from diffing.persona import PersonaVector
    from tracker.dataset_queries import queries_for
    from tracker.report.forecast_page import write_forecast_report
    from tracker.training_rows import read_training_text

    axes = [PersonaVector.load(path) for path in vectors]
    loaded = load_model(model, base=base, revision=revision, dtype=dtype, device=device)
    training = read_training_text(dataset, loaded.tokenizer, max_length=max_length)
    queries = queries_for(loaded, axes, probe_prompts(probes), canaries=canaries, max_length=max_length)
    tokens = sum(len(row["input_ids"]) for row in training.rows)
    if not as_json:
        click.echo(f"{len(training.rows):,} rows of {tokens:,} tokens: differentiates {2 * tokens:,} (two passes).")
    trained = _trainable(loaded, lora, lora_alpha, seed)
    settings = ForecastSettings(learning_rate, train_batch, epochs, seed)
    with reading_bar("Differentiating", quiet=as_json) as progress:
        result, _ = forecast_rows(trained, training.rows, queries, settings=settings, progress=progress)
    page = write_forecast_report(result, training.texts, out, dataset=dataset.name)
    if as_json:
        click.echo((out / "forecast.json").read_text())
        return
    _print(result, training.texts, page, show)


def probe_prompts(path: Path | None) -> PromptSet:
    """Neutral prompts of a file, or the shipped ones."""
    from diffing.persona.traits import neutral_probes
    from diffing.prompts import PromptSet

    if path is not None:
        return PromptSet.from_file(path)
    return PromptSet.from_messages([{"role": "user", "content": text}] for text in neutral_probes())


def _trainable(loaded: LoadedCheckpoint, rank: int | None, alpha: float | None, seed: int) -> Any:
    """The model as the training would start."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    if rank is None:
        return loaded.model.requires_grad_(True) if not isinstance(loaded.model, PeftModel) else loaded.model
    from diffing.errors import InputError

    if rank < 1 or isinstance(loaded.model, PeftModel):
        raise InputError(f"Expected a LoRA of rank 1 or more on a plain model, got {rank}. Give the base as --model.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank, lora_alpha=int(alpha or 2 * rank), target_modules="all-linear", task_type="CAUSAL_LM"
        )
        return get_peft_model(loaded.model, config)  # type: ignore[arg-type]


def _print(result: Forecast, texts: dict[str, str], page: Path, show: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tracker.report.forecast_page import forecast_headline
    from tracker.report.text import visible

    console = Console(highlight=False)
    console.print(Text(forecast_headline(result), style="bold"))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("trait", "alignment", "slope", "95 % over rows", "one epoch, plain", "one epoch, Adam"):
        table.add_column(heading, justify="left" if heading == "trait" else "right")
    for trait in result.traits:
        table.add_row(
            Text(visible(trait.name)), f"{trait.alignment:+.3f}", f"{trait.slope:+.3g}",
            f"[{trait.low:+.3g}, {trait.high:+.3g}]", f"{trait.movement:+.3g}", f"{trait.adam_movement:+.3g}",
        )  # fmt: skip
    console.print(table)
    first = result.traits[0].name
    console.print(Text(f"Rows that push {first} most:"))
    for row in result.rows[first][:show]:
        console.print(Text(f"  {row.push:+.3g}  {row.example_id}  {visible(texts.get(row.example_id, ''), limit=110)}"))
    for note in result.notes:
        console.print(Text(f"! {note}", style="yellow"))
    console.print(Text(f"\nPage  {page}\nData  {page.with_suffix('.json')}"), soft_wrap=True)
