"""What has one forward pass of a training step shown, and how are its two sides multiplied?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.query_gradient import WatchedWeight


@dataclass(eq=False)
class Passed:
    """One forward pass of the training step, with what its backward showed.

    Attributes:
        inputs: the model's keyword arguments that name its rows, on their device.
        shape: rows and tokens.
        by_token: rows hold several examples each, so that products are kept token by token.
        sides: what is yet to be multiplied: (module's place, group, left `[k, row * token]`, right likewise).
        narrow: rows' gradients of small weights, written out: (module's place, weight, `[row, short, long]`).
        parts: (module's place, parameter group, <g, Q a> `[row, query]`, or `[row, token, query]`).
        apart: whether parts are wanted module by module; else those that waited may be one, with place -1.
        rest: `[query]`, what modules that were not read add to a row on average, as `Choice.rest`.
        backward: whether its backward has begun.
        seen: modules that were read in it.
    """

    inputs: dict[str, Any]
    shape: tuple[int, int]
    by_token: bool
    sides: list[tuple[int, int, Tensor, Tensor]] = field(default_factory=list)
    narrow: list[tuple[int, WatchedWeight, Tensor]] = field(default_factory=list)
    parts: list[tuple[int, int, Tensor]] = field(default_factory=list)
    apart: bool = False
    rest: Tensor | None = None
    backward: bool = False
    seen: set[int] = field(default_factory=set)

    def products(self) -> dict[int, Tensor]:
        """Parameter group -> <g, Q a> summed over modules; multiplies out what waited."""
        self._multiply_sides()
        groups: dict[int, list[Tensor]] = {}
        for _, group, product in self.parts:
            groups.setdefault(group, []).append(product)
        return {group: found[0] if len(found) == 1 else _sum(found) for group, found in groups.items()}

    def _multiply_sides(self) -> None:
        waiting: dict[tuple[int, int, torch.device], list[tuple[int, Tensor, Tensor]]] = {}
        for place, group, left, right in self.sides:
            waiting.setdefault((group, left.shape[1], left.device), []).append((place, left, right))
        self.sides = []
        for (group, _, _), found in waiting.items():
            # One product for all modules: a step of a small model is mostly the cost of starting operations.
            exact = torch.promote_types(found[0][1].dtype, torch.float32)
            left = torch.cat([side.to(exact) for _, side, _ in found])
            right = torch.cat([side.to(exact) for _, _, side in found])
            tokens = left.mul_(right)
            sizes = [len(one[1]) for one in found] if self.apart else [len(tokens)]
            places = [one[0] for one in found] if self.apart else [-1]
            for place, own in zip(places, tokens.split(sizes), strict=True):
                summed = own.sum(dim=0).view(self.shape[0], -1, 1)
                self.parts.append((place, group, summed if self.by_token else summed.sum(dim=1)))


def _sum(products: list[Tensor]) -> Tensor:
    return torch.stack([one.to(products[0].device) for one in products]).sum(dim=0)


class UnreadableError(ValueError):
    """A module's tokens cannot be told apart by row."""


def contract(
    left: Float[Tensor, "k_out row token"],
    right: Float[Tensor, "k_in row token"],
    core: Float[Tensor, "query k_in k_out"] | None,
    *,
    by_token: bool,
) -> Tensor:
    """sum over tokens of left^T core right for every query; token by token where asked."""
    if core is None:
        tokens = (left * right).sum(dim=0).unsqueeze(-1)
        return tokens if by_token else tokens.sum(dim=1)
    if by_token:
        return torch.einsum("obt,qio,ibt->btq", left, core, right)
    return torch.bmm(right.permute(1, 0, 2), left.permute(1, 2, 0)).flatten(1) @ core.flatten(1).T


def looked_up(weight: WatchedWeight, ids: Tensor, gradient: Tensor) -> Float[Tensor, "row token query"]:
    """Products of an embedding's query gradients with the gradients of what was looked up."""
    assert weight.table is not None
    assert weight.entries is not None
    places = weight.entries[ids]
    live = (places >= 0).unsqueeze(-1)
    parts = [((gradient * table[places.clamp(min=0)]) * live).sum(dim=-1) for table in weight.table.to(gradient.dtype)]
    return torch.stack(parts, dim=-1)


def wide(tensor: Tensor) -> Tensor:
    """float16 cannot hold what an optimizer's state makes of a gradient; every other type can."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def by_row(tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    """`[row, token, d]`, also where a module saw tokens in one line."""
    if tensor.ndim == 3 and tensor.shape[0] == shape[0]:
        return tensor
    if tensor.ndim == 2 and tensor.shape[0] == shape[0] * shape[1]:
        return tensor.reshape(*shape, tensor.shape[1])
    raise UnreadableError(f"expected activations of {shape[0]} rows, a module saw {tuple(tensor.shape)}")


def ids_by_row(ids: Tensor, shape: tuple[int, int]) -> Tensor:
    """Token ids, where each row has its own."""
    if tuple(ids.shape) == shape:
        return ids
    raise UnreadableError(f"expected token ids of {shape[0]} rows, an embedding saw {tuple(ids.shape)}")
