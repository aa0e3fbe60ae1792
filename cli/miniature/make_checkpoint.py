"""How is the shipped model made? `python -m cli.miniature.make_checkpoint` trains it again from nothing.

Three to five minutes of one processor core. The seed and the single thread fix every bit on one machine: trained a
second time there, it gave the shipped weights again. Another torch or processor may differ in the last digits.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import torch
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cli.miniature.bases import save_base
from cli.miniature.model import SIZES
from cli.miniature.pretraining import train_from_nothing
from cli.miniature.shipped import BASE


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="medium", show_default=True, help="Which model.")
@click.option("--seed", default=0, show_default=True, help="Fixes weights, documents and their order.")
@click.option("--out", type=click.Path(path_type=Path), default=BASE, help="Folder to write.")
def make_checkpoint(size: str, seed: int, out: Path) -> None:
    """Trains the miniature model and writes it as half-precision safetensors with its tokenizer."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    with Progress(*columns) as bar:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int, loss: float) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, loss="")
            bar.update(tasks[stage], completed=done, loss=f"loss {loss:.3f}")

        model, tokenizer = train_from_nothing(SIZES[size], seed=seed, progress=show)
    save_base(model, tokenizer, out)
    click.echo(f"{out} written in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    make_checkpoint()
