"""Which modules must be read so that what the others add to a row's push hardly matters?

A row's push is a sum over modules, and a few of them carry most of what tells rows apart. Now and then all are read for
some steps; then those few are chosen one by one, each time the one that takes most of what is still missing, until
what is left out is small beside the spread between rows. Its mean is added to every row.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from attribution.live_pass import Passed

_ENOUGH_ROWS = 32  # what a choice is made on
_FIRST, _LAST = 8, 32  # steps between choices, in steps that a choice takes; doubled from one to the next


@dataclass(frozen=True)
class Chosen:
    """What is read from now on.

    Attributes:
        read: places of the modules.
        of: how many modules there are.
        left_out: `[query]`, root mean square of what the others add to a row's push beyond their mean, in standard
            deviations of the push between rows.
    """

    read: frozenset[int]
    of: int
    left_out: tuple[float, ...]


class Choice:
    """Decides from step to step which modules are read; a function of what was read since it was made.

    Args:
        n_modules: how many there are.
        tolerance: most that may be left out, in standard deviations between rows. 0: every step reads all.
        always: places that are read whatever they carry.

    Attributes:
        chosen: what is read; None while all are.
        rest: `[query]`, what the modules that are not read add to a row's product on average, in units of the first
            parameter group's learning rate; None while all are read.
    """

    def __init__(self, n_modules: int, tolerance: float, always: Collection[int] = ()) -> None:
        self._n_modules, self._tolerance, self._always = n_modules, tolerance, sorted(always)
        self._tables: list[Tensor] = []
        self._steps = 0
        self._left = 0
        self._times = _FIRST
        self.chosen: Chosen | None = None
        self.rest: Tensor | None = None

    @property
    def apart(self) -> bool:
        """Whether products are wanted module by module."""
        return self._tolerance > 0 and self.chosen is None

    def learn(self, passes: Sequence[Passed], rates: Sequence[float]) -> bool:
        """Takes one step's passes; returns whether what is to be read has changed."""
        if self._tolerance <= 0 or not passes:
            return False
        if self.chosen is not None:
            self._left -= 1
            if self._left > 0:
                return False
            self.chosen = self.rest = None
            return True
        # Packed rows are told apart later, by their names; learning rates of zero (a warm-up's first step) say nothing.
        if any(one.by_token for one in passes) or not rates[0]:
            return False
        self._steps += 1
        self._tables += [self._table(one, [rate / rates[0] for rate in rates]) for one in passes]
        if sum(table.shape[1] for table in self._tables) < _ENOUGH_ROWS:
            return False
        self._choose()
        return self.chosen is not None

    def _table(self, passed: Passed, rates: Sequence[float]) -> Float[Tensor, "module row query"]:
        found: dict[int, Tensor] = {}
        for place, group, product in passed.parts:
            weighed = product if rates[group] == 1.0 else product * rates[group]
            found[place] = found[place] + weighed if place in found else weighed
        table = next(iter(found.values())).new_zeros(self._n_modules, *next(iter(found.values())).shape)
        table[list(found)] = torch.stack(list(found.values()))
        return table

    def _choose(self) -> None:
        table = torch.cat([one.to(self._tables[0].device) for one in self._tables], dim=1)
        steps, self._tables, self._steps = self._steps, [], 0
        read, left_out = fewest(table, self._tolerance, self._always)
        if len(read) == self._n_modules:
            return
        others = [place for place in range(self._n_modules) if place not in read]
        self.rest = table[others].mean(dim=1).sum(dim=0)
        self.chosen = Chosen(frozenset(read), self._n_modules, tuple(left_out.tolist()))
        self._left, self._times = self._times * steps, min(2 * self._times, _LAST)


def fewest(
    table: Float[Tensor, "module row query"], tolerance: float, always: Collection[int] = ()
) -> tuple[list[int], Float[np.ndarray, " query"]]:
    """The modules whose sum differs from the sum of all by a constant and at most `tolerance`, found greedily.

    Waits for the device.

    Args:
        table: every module's part in every row's push.
        tolerance: root mean square of the difference, in standard deviations of the sum between rows.
        always: modules that are among them.

    Returns:
        the modules, ascending, and for each query how far the difference goes. All of them where the table holds a
        NaN or an infinity.
    """
    centred = table.to(torch.promote_types(table.dtype, torch.float32))
    centred = centred - centred.mean(dim=1, keepdim=True)
    spread = centred.sum(dim=0).square().mean(dim=0).sqrt().clamp(min=torch.finfo(centred.dtype).tiny)
    scaled = (centred / spread).permute(2, 0, 1)
    gram = (scaled @ scaled.mT / table.shape[1]).cpu().numpy().astype(np.float64)
    everything, n = list(range(len(table))), len(table)
    if not np.isfinite(gram).all():
        return everything, np.zeros(len(gram))
    own, left = np.diagonal(gram, axis1=1, axis2=2), np.ones(n)
    left[list(always)] = 0
    while True:
        shared = gram @ left
        missed = np.maximum(shared @ left, 0.0)
        open_ = missed > tolerance**2
        if not open_.any() or not left.any():
            return [place for place in everything if not left[place]], np.sqrt(missed)
        # Reading one more module takes this much from what is missed; a query that is served already has no say.
        gain = np.where(left > 0, (2 * shared - own)[open_].sum(axis=0), -np.inf)
        left[int(gain.argmax())] = 0
