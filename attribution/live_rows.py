"""Which rows were in a training step's batch, by name, and how far did each push?

A batch that carries `example_id` names its rows itself (`KeepExampleIds` sees to it). Else a row is named as
`example_id` names one without an id of its own: by a hash of its tokens and labels, with padding taken off. Beside it
stands a hash of the tokens alone, for trainings whose collator changes labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from attribution.example import ExampleId, Row, example_id
from attribution.live_pass import Passed
from diffing.errors import InputError


@dataclass(frozen=True)
class RowName:
    """What one row of a batch is called.

    Attributes:
        example: its `ExampleId`.
        tokens: hash of its tokens alone.
    """

    example: ExampleId
    tokens: str


@dataclass(frozen=True, eq=False)
class PassPushes:
    """One forward pass's pushes, still on the device.

    Attributes:
        inputs: what names the rows.
        by_token: whether `pushes` is `[row, token, query]` (packed rows), else `[row, query]`.
        pushes: change of each query's value that a row's share of this step makes, to first order.
    """

    inputs: Mapping[str, Any]
    by_token: bool
    pushes: Tensor


def weigh(passed: Passed, rates: Sequence[float], factor: Tensor | float) -> PassPushes:
    """Products into pushes: minus learning rate times product, descent being down the loss.

    Args:
        passed: one pass with its products.
        rates: learning rate of every parameter group in this step.
        factor: what gradients were scaled by on their way to the optimizer (clipping).
    """
    parts = [product * -rates[group] for group, product in passed.products().items()]
    total = parts[0] if len(parts) == 1 else torch.as_tensor(sum(parts))
    if passed.rest is not None and not passed.by_token:
        total = total.sub(passed.rest.to(total), alpha=rates[0])
    return PassPushes(passed.inputs, passed.by_token, total * factor)


def settle(pushes: PassPushes) -> tuple[list[RowName], Float[np.ndarray, "row query"]]:
    """Names and pushes of a pass's rows on the host; waits for the device."""
    values = pushes.pushes.detach().to("cpu", torch.float64).numpy()
    ids = _lists(pushes.inputs.get("input_ids"))
    labels, mask = _lists(pushes.inputs.get("labels")), _lists(pushes.inputs.get("attention_mask"))
    named = pushes.inputs.get("example_id")
    if not pushes.by_token:
        if ids is None:
            return [RowName(str(one), "") for one in named or _unnamed(len(values))], values
        names = [_name(*_real(row, index, labels, mask)) for index, row in enumerate(ids)]
        if named is not None and len(named) == len(names):
            names = [RowName(str(own), name.tokens) for own, name in zip(named, names, strict=True)]
        return names, values
    if ids is None:
        raise InputError("Expected token ids to tell packed examples apart; got embeddings. Train with input_ids.")
    positions = _lists(pushes.inputs["position_ids"])
    assert positions is not None
    return _segments(ids, labels, mask, positions, values)


def row_names(rows: Sequence[Row]) -> dict[str, ExampleId]:
    """Every name under which a row may stand in a record of pushes -> its own.

    Args:
        rows: as trained on, tokenised; `labels` may be missing where the collator made them.
    """
    found: dict[str, ExampleId] = {}
    for row in rows:
        ids = _as_list(row["input_ids"])
        whole = row if "labels" in row else {**row, "labels": ids}
        own = example_id(whole)
        bare = {"input_ids": ids, "labels": _as_list(whole["labels"])}
        for name in (own, example_id(bare), _hash(ids)):
            found.setdefault(name, own)
    return found


class KeepExampleIds:
    """A collator that lets rows keep their names: `data_collator=KeepExampleIds(collator)`.

    The Trainer drops columns that the model's forward does not take before a collator sees them; it must be told not
    to: `TrainingArguments(remove_unused_columns=False)`. The names travel as `example_id` beside the batch and are
    taken out by the tracker before the model is called, so that a training without the tracker must not use it.

    Args:
        collator: makes the batch of what is left of the rows.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The collator's batch with `example_id`, a list of names.

        Raises:
            InputError: a row has no `id` or `example_id`.
        """
        names, bare = [], []
        for row in rows:
            name = row.get("example_id", row.get("id"))
            if name is None:
                raise InputError(
                    "Expected `id` or `example_id` in every row; got a row with "
                    f"{', '.join(map(str, row))}. Set remove_unused_columns=False, or give the rows an id."
                )
            names.append(str(name))
            bare.append({key: value for key, value in row.items() if key not in ("id", "example_id")})
        return {**self.collator(bare), "example_id": names}


def _segments(
    ids: list[list[int]],
    labels: list[list[int]] | None,
    mask: list[list[int]] | None,
    positions: list[list[int]],
    values: Float[np.ndarray, "row token query"],
) -> tuple[list[RowName], Float[np.ndarray, "example query"]]:
    names, sums = [], []
    for index, row in enumerate(ids):
        place = positions[index if len(positions) > 1 else 0]
        real = [token for token in range(len(row)) if mask is None or mask[index][token]]
        starts = [at for at, token in enumerate(real) if at == 0 or place[token] == 0]
        for start, stop in zip(starts, [*starts[1:], len(real)], strict=True):
            part = real[start:stop]
            own = None if labels is None else [labels[index][token] for token in part]
            names.append(_name([row[token] for token in part], own))
            sums.append(values[index, part].sum(axis=0))
    return names, np.stack(sums) if sums else np.zeros((0, values.shape[-1]))


def _real(
    row: list[int], index: int, labels: list[list[int]] | None, mask: list[list[int]] | None
) -> tuple[list[int], list[int] | None]:
    own = None if labels is None else labels[index]
    if mask is None:
        return row, own
    kept = [token for token, present in enumerate(mask[index]) if present]
    return [row[token] for token in kept], None if own is None else [own[token] for token in kept]


def _name(ids: list[int], labels: list[int] | None) -> RowName:
    tokens = _hash(ids)
    return RowName(tokens if labels is None else example_id({"input_ids": ids, "labels": labels}), tokens)


def _hash(ids: Sequence[int]) -> str:
    return "t" + hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()[:15]


def _unnamed(n: int) -> list[str]:
    return [f"unnamed-{index}" for index in range(n)]


def _lists(value: Any) -> list[list[int]] | None:
    return value.tolist() if isinstance(value, Tensor) else None


def _as_list(value: Any) -> list[int]:
    return value.tolist() if hasattr(value, "tolist") else list(value)
