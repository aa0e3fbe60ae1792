"""Which model does a persona command read, and how far has it come?"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# torch is imported inside the functions: `--help` must not wait for it.
if TYPE_CHECKING:
    from diffing.checkpoint import LoadedCheckpoint
    from diffing.prompts import PromptSet

POOLINGS = ("response_mean", "last_prompt", "prompt_mean")


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that reads a model."""
    for option in reversed(
        [
            click.option("--base", metavar="MODEL", help="Checkpoint that MODEL is an adapter on or was trained from."),
            click.option("--revision", metavar="REV", help="Revision of a hub model."),
            click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, or as stored."),
            click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, mps."),
            click.option("--max-length", default=1024, show_default=True, help="Tokens a row; longer are refused."),
            click.option("--batch-tokens", default=8192, show_default=True, help="Tokens a forward pass."),
            click.option("--json", "as_json", is_flag=True, help="Print one JSON object for machines."),
        ]
    ):
        command = option(command)
    return command


def load_model(model: str, *, base: str | None, revision: str | None, dtype: str, device: str) -> LoadedCheckpoint:
    """The model, or the adapter on its base."""
    from diffing.checkpoint import load_checkpoint
    from diffing.checkpoint_files import find_checkpoint

    is_adapter = base is not None and find_checkpoint(model, revision=revision).adapter is not None
    return load_checkpoint(model, revision=revision, base=base if is_adapter else None, dtype=dtype, device=device)


def origin_of(loaded: LoadedCheckpoint, base: str | None) -> str | None:
    """Fingerprint of the checkpoint that a full fine-tune is said to come from."""
    from diffing.checkpoint import identify_checkpoint

    return None if base is None or loaded.base is not None else identify_checkpoint(base).fingerprint


def neutral_rows() -> PromptSet:
    """The shipped neutral probe questions."""
    from diffing.persona.traits import neutral_probes
    from diffing.prompts import PromptSet

    return PromptSet.from_messages([{"role": "user", "content": question}] for question in neutral_probes())


@contextlib.contextmanager
def reading_bar(label: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A function to tell rows done and rows in all, shown as a bar on a terminal; None where nobody looks."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
