"""How do persona vectors, projections and traits look in a terminal and in JSON?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

# Types only: importing these brings torch, which `--help` must not wait for.
if TYPE_CHECKING:
    from diffing.persona import PersonaVector, Projection, Trait
    from diffing.persona.extraction import Extraction, VectorRow
    from diffing.persona.sweep_result import LayerSweep
    from diffing.prompts import PromptSet


def vector_facts(vector: PersonaVector, path: Path) -> dict[str, Any]:
    """One extracted vector for machines."""
    return {
        "path": str(path),
        "trait": vector.trait,
        "site": vector.site,
        "pooling": vector.pooling,
        "scale": vector.scale,
        "neutral_mean": vector.neutral_mean,
        "neutral_std": vector.neutral_std,
        "separation": asdict(vector.separation),
        "null": None if vector.null is None else asdict(vector.null),
        "n_positive": vector.n_positive,
        "n_negative": vector.n_negative,
        "model_fingerprint": vector.model_fingerprint,
    }


def projection_facts(projection: Projection, rows: PromptSet) -> dict[str, Any]:
    """One projection for machines, with the value of every row by its id."""
    return {
        "trait": projection.trait,
        "site": projection.site,
        "pooling": projection.pooling,
        "unit": projection.unit,
        "reference": projection.reference,
        "mean": projection.mean,
        "low": projection.low,
        "high": projection.high,
        "n": projection.n,
        "prompts": projection.prompts,
        "model_fingerprint": projection.model_fingerprint,
        "values": {row.id: value for row, value in zip(rows, projection.values.tolist(), strict=True)},
    }


def show_vectors(vectors: Sequence[PersonaVector], paths: Sequence[Path]) -> None:
    """A table of what was extracted, a verdict for each, and doubts on stderr."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("trait", "site", "AUROC", "n", "gap", "random 95 %", "shuffled p", "scale"):
        table.add_column(heading, justify="left" if heading in ("trait", "site") else "right", no_wrap=True)
    for vector in vectors:
        held_out, null = vector.separation, vector.null
        table.add_row(
            escape(vector.trait),
            escape(vector.site),
            f"{held_out.auroc:.2f} [{held_out.low:.2f}, {held_out.high:.2f}]",
            str(held_out.n),
            f"{held_out.gap:.2f}",
            "-" if null is None else f"{null.random_auroc_95:.2f}",
            "-" if null is None else f"{null.shuffled_p:.2f}",
            f"{vector.scale:.3g}",
        )
    console, warnings = Console(), Console(stderr=True)
    console.print(table)
    console.print("AUROC [95 % interval] and gap (1 = as at the fit) are of held-out answers.", style="dim")
    for vector, path in zip(vectors, paths, strict=True):
        for line in _doubts(vector):
            warnings.print(Text(f"Warning: {line}", style="yellow"))
        console.print(Text(f"Wrote {path}: {_verdict(vector)}."), soft_wrap=True)


def _verdict(vector: PersonaVector) -> str:
    held_out = vector.separation
    if held_out.includes_chance:
        return "no evidence that it separates"
    words = "separates strongly" if held_out.low >= 0.9 else "separates well" if held_out.low >= 0.7 else "separates"
    return f"{words}; {held_out.n} held-out answers show an AUROC of at least {held_out.low:.2f}"


def _doubts(vector: PersonaVector) -> Iterator[str]:
    held_out, null = vector.separation, vector.null
    if held_out.includes_chance:
        yield (
            f"{vector.trait} at {vector.site}: the interval [{held_out.low:.2f}, {held_out.high:.2f}] of the AUROC "
            f"includes 0.5 on {held_out.n} held-out answers. Give more contrastive answers or try another site."
        )
    elif null is not None and held_out.auroc <= null.random_auroc_95:
        yield (
            f"{vector.trait} at {vector.site}: one in twenty random directions reaches {null.random_auroc_95:.2f} on "
            "the same answers, so these classes differ in more than the trait. Match their form and length."
        )


def show_projections(projections: Sequence[Projection]) -> None:
    """A table of means with intervals, and what their zero means."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    numbers = ("mean", "95 % interval", "n")
    for heading in ("trait", "site", "pooling", *numbers, "unit", "zero is"):
        table.add_column(heading, justify="right" if heading in numbers else "left", no_wrap=True)
    for one in projections:
        interval = "-" if one.low is None or one.high is None else f"[{one.low:+.3f}, {one.high:+.3f}]"
        origin = "plain" if one.reference else "arbitrary"
        table.add_row(
            escape(one.trait), escape(one.site), one.pooling, f"{one.mean:+.3f}", interval, str(one.n), one.unit, origin
        )
    console = Console()
    console.print(table)
    if any(not one.reference for one in projections):
        console.print("Where zero is arbitrary, only differences between checkpoints mean something.", style="dim")


def show_traits(traits: Sequence[Trait]) -> None:
    """A table of traits with the sizes of their parts."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("trait", "pairs", "questions", "contrasts", "what it is"):
        table.add_column(heading, justify="right" if heading in ("pairs", "questions", "contrasts") else "left")
    for trait in traits:
        sizes = trait.sizes()
        questions = f"{sizes['questions']}+{sizes['held_out_questions']}"
        table.add_row(
            trait.name,
            str(sizes["instructions"]),
            questions,
            str(sizes["contrasts"]),
            trait.description.partition(":")[0],
        )
    Console().print(table)


def show_extraction(extraction: Extraction, path: Path, page: Path) -> None:
    """What was kept, how every layer separates and steers, and which one was chosen."""
    record, console, warnings = extraction.record, Console(), Console(stderr=True)
    for what, kept in (("Extraction", record.fitted), ("Held out", record.held_out)):
        console.print(Text(f"{what}: {kept.sentence}"), soft_wrap=True)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("site", "AUROC", "gap", "random", "p", "steered by", "log-odds", "judged"):
        table.add_column(heading, justify="left" if heading == "site" else "right", no_wrap=True)
    for row in record.rows:
        if row.pooling != record.pooling:
            continue
        style = "bold" if row.site == record.site else None
        table.add_row(*_layer_cells(row), *_steering_cells(record.sweep, row.site), style=style)
    console.print(table)
    console.print(
        f"AUROC [95 % interval] and gap: {record.chosen.separation.n} held-out answers. random: 95th percentile of "
        "random directions. p: shuffled labels. steered by: gaps added. log-odds: nats a token. judged: 0 to 100.",
        style="dim",
    )
    for note in record.notes:
        warnings.print(Text(f"Note: {note}", style="yellow"), soft_wrap=True)
    for line in _doubts(extraction.chosen):
        warnings.print(Text(f"Warning: {line}", style="yellow"), soft_wrap=True)
    again = record.sweep.confirmed_trait if record.sweep else None
    drawn_again = "" if again is None else f" Answers drawn again after the choice score {again.mean:.0f}."
    console.print(Text(f"Chosen: {record.site}. {record.why}{drawn_again}"), soft_wrap=True)
    console.print(Text(f"Wrote {path}: {_verdict(extraction.chosen)}. See {page}."), soft_wrap=True)


def _layer_cells(row: VectorRow) -> tuple[str, ...]:
    held_out, null = row.separation, row.null
    return (
        escape(row.site),
        f"{held_out.auroc:.2f} [{held_out.low:.2f}, {held_out.high:.2f}]",
        f"{held_out.gap:.2f}",
        "-" if null is None else f"{null.random_auroc_95:.2f}",
        "-" if null is None else f"{null.shuffled_p:.2f}",
    )


def _steering_cells(sweep: LayerSweep | None, site: str) -> tuple[str, str, str]:
    best = None if sweep is None else sweep.best_at(site)
    if best is None:
        return "-", "-", "-"
    judged = "-" if best.trait_score is None else f"{best.trait_score.mean:.0f}"
    return f"{best.strength:g}", f"{best.log_odds.mean:+.2f}", judged
