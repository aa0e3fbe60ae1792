"""Which tokens of a training row carried its push?

A row's gradient is a sum over its tokens, so its score is too: a token's share is what was learned while the model
computed at that place. Shares add up to the row's score; what cannot be split by place is given apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from attribution.blocks import Block
from attribution.curvature import Curvature
from attribution.example import ExampleId, Row, batches
from attribution.gradients import record_rows
from attribution.losses import evaluating, row_losses
from attribution.passes import device_of
from attribution.rotation import Rotator, RowGradients
from attribution.scoring import RotatedQueries, bases_of, divide


@dataclass(frozen=True, eq=False)
class TokenScores:
    """One row's scores, token by token.

    Attributes:
        example: the row's name.
        values: `[query, token]`; positive: what was learned at this place pushed the query up.
        rest: `[query]`, from norms, biases and modules that mix places; with `values` it adds up to the score.
    """

    example: ExampleId
    values: Float[np.ndarray, "query token"]
    rest: Float[np.ndarray, " query"]


def score_tokens(
    model: nn.Module,
    blocks: Sequence[Block],
    queries: RotatedQueries,
    rows: Sequence[Row],
    curvature: Curvature,
) -> list[TokenScores]:
    """Splits the scores of a few rows over their tokens, one row at a time."""
    bases = bases_of(curvature, blocks)
    found = []
    with evaluating(model):
        for row in rows:
            (batch,) = batches([row], 1, device=device_of(model))
            rotator = Rotator(record_rows(model, blocks, batch, row_losses), by_token=True)
            values = torch.zeros(len(queries.names), batch.input_ids.shape[1], dtype=torch.float64)
            rest = torch.zeros(len(queries.names), dtype=torch.float64)
            for index, (block, basis) in enumerate(zip(blocks, bases, strict=True)):
                first = 0
                for group in queries.parts[index]:
                    here = slice(first, first + group.n_rows)
                    everything = slice(0, group.shape[0])
                    tile = group.tile(slice(0, group.n_rows), everything)
                    wanted = divide(curvature, index, everything, tile)
                    _add(values[here], rest[here], wanted, rotator.gradients(block, basis), block)
                    first += group.n_rows
            found.append(TokenScores(batch.ids[0], values.numpy(), rest.numpy()))
    return found


def _add(values: Tensor, rest: Tensor, wanted: Tensor, gradients: RowGradients, block: Block) -> None:
    if gradients.whole is not None:
        rest += (wanted.flatten(1) @ gradients.whole.flatten(1).T).squeeze(1).to(rest)
        return
    for product in gradients.products:
        right = product.right[0]
        if product.one_hot:
            shares = (wanted[:, product.left[0]] * right).sum(dim=-1)
        else:
            shares = ((wanted @ right.T) * product.left[0].T).sum(dim=1)
        if shares.shape[1] == values.shape[1] - 1:  # the model is not shown a row's last place
            values[:, :-1] += shares.to(values)
        else:
            rest += shares.sum(dim=1).to(rest)  # an expert's slots are not the row's places
