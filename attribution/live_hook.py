"""What is asked of one module in a training step? What went into it, and the gradient of what came out."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from attribution.live_gauge import Gauge
from attribution.live_narrow import rows_of
from attribution.live_pass import Passed, wide
from attribution.query_factors import NARROW, QueryFactors
from attribution.query_gradient import WatchedWeight

if TYPE_CHECKING:
    from attribution.live import LiveReader


class ModuleHook:
    """A forward hook with the module and the weights that it is there for, and the module's place among all."""

    def __init__(self, reader: LiveReader, place: int, module: nn.Module, weights: tuple[WatchedWeight, ...]) -> None:
        self.reader, self.place, self.module, self.weights = reader, place, module, weights
        factors, shape = weights[0].factors, getattr(module, "weight").shape  # noqa: B009
        alone = len(weights) == 1 and factors is not None and factors.features is None
        # What an adapter is made of goes the short way, for there are many: one product, in the backward pass.
        self._narrow = alone and weights[0].kind == "linear" and min(shape) <= NARROW
        if self._narrow:
            reader._narrow.add(weights[0], *(reversed(shape) if isinstance(module, Conv1D) else shape))
        # Of one query's matrix the few coordinates wait that it leads to.
        self._short = alone and factors is not None and factors.core is None and factors.left is not None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Called by torch as the module's output leaves it; raises nothing."""
        reader = self.reader
        passed = reader._current
        if passed is None or not args:
            return
        if not reader.timed:
            self._enter(passed, args[0], output)
            return
        started = time.perf_counter()
        self._enter(passed, args[0], output)
        reader.seconds += time.perf_counter() - started

    def _enter(self, passed: Passed, given: Tensor, output: Any) -> None:
        reader = self.reader
        narrow = self._narrow and not passed.by_token
        short = self._short and reader._gauged is not self.module and given.dtype != torch.float16
        if given.ndim != 3 or not (narrow or short):
            reader.read_module(self, given, output)
            return
        try:
            if output.requires_grad and not (passed.backward and id(self) in passed.seen):
                passed.seen.add(id(self))
                if given.shape[0] != passed.shape[0]:
                    reader.unread.add(self.weights[0].name)
                elif narrow:
                    gauge = reader._gauge if reader._gauged is self.module else None
                    leave = functools.partial(self._write_out, passed, given.detach(), gauge)
                    output.register_hook(reader.counted(leave))
                else:
                    self._read(passed, given.detach(), output)
        except Exception as error:  # noqa: BLE001  training must not notice
            reader.fail(error)

    def _write_out(self, passed: Passed, given: Tensor, gauge: Gauge | None, gradient: Tensor) -> None:
        try:
            passed.backward = True
            rows = rows_of(gradient.detach(), given)
            passed.narrow.append((self.place, self.weights[0], rows))
            if gauge is not None:
                gauge.add_rows(rows if gradient.shape[-1] <= given.shape[-1] else rows.transpose(1, 2))
        except Exception as error:  # noqa: BLE001  training must not notice
            self.reader.fail(error)

    def _read(self, passed: Passed, given: Tensor, output: Tensor) -> None:
        factors = self.weights[0].factors
        assert factors is not None
        part = given.flatten(0, 1).T
        if factors.right is not None:
            part = self.reader._as(factors.right, part.dtype, factors.scale) @ part
        output.register_hook(self.reader.counted(functools.partial(self._leave, passed, factors, part)))

    def _leave(self, passed: Passed, factors: QueryFactors, part: Tensor, gradient: Tensor) -> None:
        try:
            passed.backward = True
            left = wide(gradient.flatten(0, 1).T)
            if factors.left is not None:
                scale = factors.scale if factors.right is None else 1.0
                left = self.reader._as(factors.left, left.dtype, scale) @ left
            passed.sides.append((self.place, self.weights[0].group, left, part))
        except Exception as error:  # noqa: BLE001  training must not notice
            self.reader.fail(error)
