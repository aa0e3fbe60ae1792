"""Do the rows that were read add up to the gradient that the optimizer is given?"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from attribution.query_gradient import WatchedWeight

_GAUGED = 16  # output features of one weight whose gradient is summed a second time


@dataclass(eq=False)
class Gauge:
    """The gradient of some output features of one weight, summed over rows as the backward does."""

    module: nn.Module
    total: Tensor | None = None

    @classmethod
    def choose(cls, weights: tuple[WatchedWeight, ...]) -> Gauge | None:
        """A weight to look at; None where every one is shared between modules."""
        users = Counter(weight.name for weight in weights)
        # A weight of one module alone, of the narrowest input: an adapter's up-projection costs next to nothing.
        linear = [weight.module for weight in weights if weight.kind == "linear" and users[weight.name] == 1]
        return cls(min(linear, key=_width)) if linear else None

    def add(self, given: Tensor, gradient: Tensor) -> None:
        """Adds one backward's part."""
        exact = torch.promote_types(gradient.dtype, torch.float32)
        part = gradient.flatten(0, -2)[:, :_GAUGED].to(exact).T @ given.flatten(0, -2).to(exact)
        self.total = part if self.total is None else self.total.add_(part)

    def add_rows(self, gradients: Tensor) -> None:
        """The same, of rows' gradients `[row, d_out, d_in]` that are there already."""
        part = gradients[:, :_GAUGED].sum(dim=0)
        self.total = part if self.total is None else self.total.add_(part)

    def compare(self) -> Tensor | None:
        """`[2]`: by what factor the optimizer's gradient is larger, and the cosine between both; None: not seen."""
        given = self.module.weight.grad
        if self.total is None or not isinstance(given, Tensor):
            return None
        there = _as_linear(self.module, given.detach())[: len(self.total)].flatten().to(self.total.dtype)
        read = self.total.flatten()
        square, both = read @ read, read @ there
        cosine = both / (square.sqrt() * torch.linalg.vector_norm(there))
        # A step without any gradient there (an adapter's very first) says nothing; nothing is scaled then.
        return torch.nan_to_num(torch.stack([both / square, cosine]), nan=1.0, posinf=1.0, neginf=1.0)


def _width(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return _as_linear(module, weight).shape[1]


def _as_linear(module: nn.Module, weight: Tensor) -> Tensor:
    """`[d_out, d_in]`, which GPT-2's Conv1D keeps the other way round."""
    return weight.T if isinstance(module, Conv1D) else weight
