"""Which latents are active? The k·B strongest of the batch, or all above a gate."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from diffing.crosscoder.sparse import Support

# Products held at once: 4 Mi floats stay in 16 MiB whatever the size of batch and dictionary.
_HELD_ENTRIES = 1 << 22
# A GPU wants few large products rather than many that fit into a cache.
_HELD_ENTRIES_GPU = 1 << 26
# BatchTopK's cut-off is read from this share of the batch: the full top-k costs more than the encoder's product.
_SAMPLE_SHARE = 8
_SAMPLE_ROWS = 64


def select_top(
    inputs: Float[Tensor, "token width"],
    encoder: Float[Tensor, "latent width"],
    bias: Float[Tensor, " latent"],
    norms: Float[Tensor, " latent"],
    k: float,
    *,
    precision: torch.dtype | None = None,
) -> tuple[Support, Float[Tensor, " entry"], float]:
    """BatchTopK: the latents with the largest activation · norm, k a token on average over the batch.

    The cut-off is the exact one of the batch's first eighth (at least 64 rows; rows are shuffled), so the number
    selected is k·B up to its sampling error.

    Returns:
        The entries, their pre-activations, and the cut-off on activation · norm.
    """
    cut = find_cut(sample_of(inputs), encoder, bias, norms, k)
    support, values = select_above(inputs, encoder, bias, cut / norms, precision=precision)
    return support, values, cut


def sample_of(inputs: Float[Tensor, "token width"]) -> Float[Tensor, "row width"]:
    """The rows of a shuffled batch from which a cut-off is read."""
    return inputs[: min(len(inputs), max(_SAMPLE_ROWS, len(inputs) // _SAMPLE_SHARE))]


def select_above(
    inputs: Float[Tensor, "token width"],
    encoder: Float[Tensor, "latent width"],
    bias: Float[Tensor, " latent"],
    gate: Float[Tensor, " latent"],
    *,
    precision: torch.dtype | None = None,
) -> tuple[Support, Float[Tensor, " entry"]]:
    """All entries whose pre-activation exceeds its latent's gate, and those pre-activations.

    With a `precision` below that of the inputs, the product that decides which entries those are is computed in it;
    what they hold is computed again in the precision of the inputs.
    """
    rows, columns, values = [], [], []
    # The bias moves to the other side of the comparison: one pass less over the large product.
    gate = gate - bias
    for first, part in _products(inputs, encoder, precision):
        row, column = (part > gate).nonzero().unbind(1)
        rows.append(row + first)
        columns.append(column)
        values.append(part[row, column] + bias[column])
    support = Support(torch.cat(rows), torch.cat(columns), len(inputs), len(encoder))
    if precision is None:
        return support, torch.cat(values)
    return support, support.dots(inputs, encoder) + bias[support.columns]


def find_cut(
    inputs: Float[Tensor, "token width"],
    encoder: Float[Tensor, "latent width"],
    bias: Float[Tensor, " latent"],
    norms: Float[Tensor, " latent"],
    k: float,
) -> float:
    """The value of activation · norm that k latents a token exceed on average; 0 where fewer are positive."""
    wanted = max(1, round(k * len(inputs)))
    strongest, cut = inputs.new_empty(0), 0.0
    for _, part in _products(inputs, encoder):
        part.add_(bias).mul_(norms)
        strongest = torch.cat([strongest, part[part > cut]])
        if len(strongest) > wanted:
            strongest = torch.topk(strongest, wanted, sorted=False).values
        if len(strongest) == wanted:
            cut = float(strongest.min())
    return cut


def _products(
    inputs: Float[Tensor, "token width"], encoder: Float[Tensor, "latent width"], precision: torch.dtype | None = None
) -> Iterator[tuple[int, Float[Tensor, "row latent"]]]:
    step = max(1, (_HELD_ENTRIES if inputs.device.type == "cpu" else _HELD_ENTRIES_GPU) // len(encoder))
    if precision is not None:
        low = encoder.to(precision)
        for first in range(0, len(inputs), step):
            yield first, (inputs[first : first + step].to(precision) @ low.T).to(inputs.dtype)
        return
    for first in range(0, len(inputs), step):
        yield first, inputs[first : first + step] @ encoder.T
