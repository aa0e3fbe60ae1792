"""How many rows go through the model at once?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from attribution.blocks import Block
from attribution.example import IGNORED, ExampleBatch, Row, batches, example_id

_SUMMED_BYTES = 32 << 20  # what one batch's inputs and output gradients may take where they are summed at once
_HELD_BYTES = 16 << 20  # and where batches wait beside each other


def row_batches(
    model: nn.Module, blocks: Sequence[Block], rows: Sequence[Row], batch_size: int | None, *, held: bool = False
) -> Iterator[ExampleBatch]:
    """Rows by length, `batch_size` at a time, or as many as the recorded sides' memory budget allows.

    What stands behind a row's last label cannot change its loss and is left out. `held` says that what is read from
    one batch will wait for the next.
    """
    rows = [_until_last_label(row) for row in rows]
    memory = _HELD_BYTES if held else _SUMMED_BYTES
    budget = None if batch_size is not None else max(memory // bytes_per_token(blocks), 1)
    return batches(rows, batch_size or max(len(rows), 1), device=device_of(model), max_tokens=budget)


def _until_last_label(row: Row) -> Row:
    labels = torch.as_tensor(row["labels"])
    mask = row.get("attention_mask")
    learnt = labels != IGNORED if mask is None else (labels != IGNORED) & torch.as_tensor(mask).bool()
    end = int(learnt.nonzero()[-1]) + 1 if learnt.any() else len(labels)
    if end == len(labels):
        return row
    columns = ("input_ids", "labels", "attention_mask")
    return {**{key: row[key][:end] for key in columns if row.get(key) is not None}, "id": example_id(row)}


def bytes_per_token(blocks: Sequence[Block]) -> int:
    """What recording one token takes: both sides of every block, in fp32."""
    return 4 * sum(sum(block.shape) if block.has_sides else max(block.shape) for block in blocks)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies."""
    return next(model.parameters()).device
