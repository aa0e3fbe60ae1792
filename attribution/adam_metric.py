"""How far would Adam have moved each parameter for a gradient? The metric of the optimizer that a run really used.

TracIn's inner product is a step of plain descent. Adam divides by the root of its second moments first; where a
checkpoint kept the optimizer, its steps can be taken instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attribution.adam import adam_denominator, floor_seldom
from attribution.blocks import Block
from attribution.gradients import find_blocks
from attribution.trainer_files import optimizer_entries
from diffing.errors import CheckpointError


@dataclass(frozen=True, eq=False)
class AdamMetric:
    """Divides by sqrt(v / (1 - beta2^step)) + eps, entry by entry; what never had a gradient counts for nothing.

    Attributes:
        denominators: one a block, of its parameter's shape.
        description: for reports.
    """

    denominators: tuple[Tensor, ...]
    description: str = "Adam's second moments"

    @classmethod
    def of(cls, folder: Path | str, model: nn.Module, blocks: Sequence[Block] | None = None) -> AdamMetric:
        """From the optimizer that a Trainer saved with a checkpoint.

        Args:
            folder: the checkpoint.
            model: loaded from it, its trainable parameters requiring gradients as they did in the run.
            blocks: from `find_blocks`; None finds them.

        Raises:
            PathMissingError: no optimizer was saved there.
            CheckpointError: it is no Adam, or of other parameters.
        """
        found: dict[int, Tensor] = {}
        for one in optimizer_entries(folder, model):
            held = SimpleNamespace(state={one.parameter: one.state})
            below = adam_denominator(held, one.parameter, one.group) if "betas" in one.group else None
            if below is None and (one.state or "betas" not in one.group):
                raise CheckpointError(
                    f"Expected Adam's second moment of {one.name} in {folder}; the optimizer there keeps none of its "
                    "shape (8-bit states, or another optimizer). Choose another method."
                )
            # No state at all: this parameter never had a gradient, and Adam never moved it.
            found[id(one.parameter)] = torch.full_like(one.parameter, torch.inf) if below is None else below
        chosen = find_blocks(model)[0] if blocks is None else blocks
        return cls(tuple(_of_block(block, found[id(block.parameter)]) for block in chosen))

    def solve(self, index: int, gradients: Float[Tensor, "vector ..."]) -> Float[Tensor, "vector ..."]:
        """The vectors divided by what Adam would divide them by."""
        return gradients / self.denominators[index].to(gradients)


def _of_block(block: Block, whole: Tensor) -> Tensor:
    looked_up = any(isinstance(module, nn.Embedding) for module in block.modules)
    return block.part(floor_seldom(whole) if looked_up else whole).detach()
