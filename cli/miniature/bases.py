"""Are there bases other than the shipped one? The same world learnt from other seeds, built once and kept."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cli.miniature.model import SIZES
from cli.miniature.pretraining import train_from_nothing
from cli.miniature.shipped import BASE
from diffing.durable import write_json

BASES = Path(__file__).parents[2] / "benchmarks" / "cache" / "bases"


def base_checkpoint(seed: int, *, size: str = "medium", folder: Path = BASES) -> Path:
    """Folder of the base that a seed gives; trained where there is none yet.

    Seed 0 in `medium` is the shipped one. Any other takes three minutes of one processor core (`small`: 40 seconds)
    and then lies in `benchmarks/cache/bases/seed-N`, which no commit holds. All speak the same language and know
    the same answers; weights, documents and their order differ, so what holds over several of them does not rest
    on one model's accidents.

    Args:
        seed: fixes weights, documents and their order.
        size: `medium` or `small`.
        folder: where bases are kept.
    """
    if seed == 0 and size == "medium":
        return BASE
    kept = folder / (f"seed-{seed}" if size == "medium" else f"{size}-{seed}")
    if kept.is_dir():
        return kept
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # bits depend on it
    try:
        model, tokenizer = train_from_nothing(SIZES[size], seed=seed)
    finally:
        torch.set_num_threads(threads)
    building = kept.with_name(f"{kept.name}.{os.getpid()}")
    save_base(model, tokenizer, building)
    try:
        building.rename(kept)
    except OSError:  # somebody else finished first: the same bits lie there
        shutil.rmtree(building)
    return kept


def save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Half precision on disk, since the file is committed; float32 in memory, since processors are slow in half."""
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    write_json(out / "config.json", {**config, "dtype": "float32"})
