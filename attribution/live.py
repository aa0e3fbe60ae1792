"""How far does each row of a training step push what is watched? Read from the step's own backward, changing nothing.

Every module that a query depends on is hooked. In the forward pass its input is led into the query's few coordinates,
in the backward pass its output gradient is; their product, summed over a row's tokens, is the inner product of that
row's gradient with the query's. No backward is added, none is made per row, and activations are not kept: what is held
from forward to backward is `k` numbers a token and module.

Only rows that do not meet in the forward pass can be told apart: all causal language models, packed rows included.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor, nn

from attribution.live_choice import Choice, Chosen
from attribution.live_gauge import Gauge
from attribution.live_hook import ModuleHook
from attribution.live_narrow import NarrowQueries
from attribution.live_pass import Passed, UnreadableError, by_row, contract, ids_by_row, looked_up, wide
from attribution.query_gradient import WatchedQueries, WatchedWeight

_P = ParamSpec("_P")
_NARROW = 64  # sides of at most so many columns wait to be multiplied out together


def _harmless(call: Callable[Concatenate[LiveReader, _P], None]) -> Callable[Concatenate[LiveReader, _P], None]:
    """A hook runs inside the training step: what goes wrong in it is told later, never raised there."""

    @functools.wraps(call)
    def guarded(self: LiveReader, *args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            call(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001  training must not notice
            self.fail(error)

    return guarded


class LiveReader:
    """Hooks on a model under training that collect, pass by pass, each row's product with the watched queries.

    A pass counts only between `open` and `take` and while a graph is recorded. Hooks return nothing and write nothing
    that training reads, so that the trained weights are the same to the last bit.

    Args:
        model: the module that is trained. Keyword arguments named `example_id` are taken out before it sees them.
        timed: whether hooks add up what they take.

    Attributes:
        seconds: what hooks took since `open`, where they are timed.
        problem: the first thing that went wrong in a hook, or ``.
        unread: names of watched weights whose module does not show its tokens row by row.
    """

    def __init__(self, model: nn.Module, *, timed: bool = False) -> None:
        self._model = model
        self.timed, self.seconds = timed, 0.0
        self._handles: list[Any] = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self._hooks: list[ModuleHook] = []
        self._watching: list[Any] = []  # handles of those that are on
        self._choice = Choice(0, 0.0)
        self._open = False
        self._current: Passed | None = None
        self._passes: list[Passed] = []
        self._casts: dict[tuple[int, torch.dtype], Tensor] = {}
        self._narrow = NarrowQueries()
        self._gauge: Gauge | None = None
        self._gauged: nn.Module | None = None
        self.problem = ""
        self.unread: set[str] = set()

    def watch(self, watched: WatchedQueries | None, tolerance: float = 0.0) -> None:
        """Hooks the modules of these queries, in place of those before; None: of no query.

        Args:
            watched: the queries.
            tolerance: how much of a push modules may add that are not read in most steps, as `Choice` takes it. 0: all
                modules are read in every step.
        """
        self._hooks = []
        self._casts.clear()
        self._narrow.clear()
        self._gauge = self._gauged = None
        if watched is not None:
            by_module: dict[int, tuple[nn.Module, list[WatchedWeight]]] = {}
            for weight in watched.weights:
                by_module.setdefault(id(weight.module), (weight.module, []))[1].append(weight)
            self._gauge = Gauge.choose(watched.weights)
            self._gauged = None if self._gauge is None else self._gauge.module
            for place, (module, weights) in enumerate(by_module.values()):
                self._hooks.append(ModuleHook(self, place, module, tuple(weights)))
        gauged = [hook.place for hook in self._hooks if hook.module is self._gauged]
        self._choice = Choice(len(self._hooks), tolerance, gauged)
        self._attach()

    def learn(self, passes: Sequence[Passed], rates: Sequence[float]) -> Chosen | None:
        """Settles which modules the next step reads; returns what was chosen where that has just been done.

        Args:
            passes: what `take` gave.
            rates: learning rate of every parameter group in this step.
        """
        if self._choice.learn(passes, rates):
            self._attach()
            return self._choice.chosen
        return None

    def _detach(self) -> None:
        while self._watching:
            self._watching.pop().remove()

    def _attach(self) -> None:
        self._detach()
        chosen = self._choice.chosen
        for hook in self._hooks:
            if chosen is None or hook.place in chosen.read:
                self._watching.append(hook.module.register_forward_hook(hook))

    def open(self) -> None:
        """Forward passes of a training step follow."""
        if self._hooks and not self._watching:
            self._attach()
        self._open, self._current, self._passes, self.seconds = True, None, [], 0.0
        if self._gauge is not None:
            self._gauge.total = None

    def pause(self) -> None:
        """The next step is not read: modules are left alone until the next `open`."""
        self.shut()
        self._detach()

    def shut(self) -> None:
        """No pass counts until the next `open`."""
        self._open, self._current, self._passes = False, None, []

    def take(self) -> tuple[list[Passed], Tensor | None]:
        """The passes of this step that had a backward; called when gradients are complete and still there.

        Returns:
            the passes, and `[2]` what became of their gradients on the way to the optimizer: the factor they were
            scaled by (clipping, a loss scale taken out), and the cosine between what was read and what the optimizer
            is given, which is 1 unless passes were missed or counted twice. None where it could not be seen.
        """
        for one in self._passes:
            self._multiply(one)
        passes = [one for one in self._passes if one.parts or one.sides]
        gauged = None if self._gauge is None else self._gauge.compare()
        self.shut()
        return passes, gauged

    @_harmless
    def _multiply(self, passed: Passed) -> None:
        self._narrow.multiply(passed)

    def counted(self, call: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        """The call, which adds what it takes to `seconds` where hooks are timed."""
        if not self.timed:
            return call

        def timed(gradient: Tensor) -> None:
            started = time.perf_counter()
            call(gradient)
            self.seconds += time.perf_counter() - started

        return timed

    def fail(self, error: Exception) -> None:
        """Notes what went wrong in a hook and reads no more of this pass."""
        self.problem = self.problem or f"{type(error).__name__}: {error}"
        self._current = None

    def close(self) -> None:
        """Removes every hook."""
        self.shut()
        self.watch(None)
        while self._handles:
            self._handles.pop().remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = kwargs.pop("example_id", None)
        self._note(args, kwargs, named)
        return (args, kwargs) if named is not None else None

    @_harmless
    def _note(self, args: tuple[Any, ...], kwargs: dict[str, Any], named: Any) -> None:
        self._current = None
        if not (self._open and self._watching and torch.is_grad_enabled()):
            return
        tokens = kwargs.get("input_ids", args[0] if args else None)
        embedded = kwargs.get("inputs_embeds")
        shown = tokens if isinstance(tokens, Tensor) else embedded
        if not isinstance(shown, Tensor) or shown.ndim < 2:
            return
        keep = ("labels", "attention_mask", "position_ids")
        inputs = {name: value for name in keep if isinstance(value := kwargs.get(name), Tensor) and value.ndim == 2}
        if isinstance(tokens, Tensor):
            inputs["input_ids"] = tokens
        if named is not None:
            inputs["example_id"] = named
        shape, choice = (shown.shape[0], shown.shape[1]), self._choice
        self._current = Passed(inputs, shape, "position_ids" in inputs, apart=choice.apart, rest=choice.rest)
        self._passes.append(self._current)

    @_harmless
    def read_module(self, hook: ModuleHook, given: Tensor, output: Tensor) -> None:
        """Takes what goes into a module, and asks for the gradient of what comes out."""
        passed = self._current
        if passed is None or not output.requires_grad:
            return
        if passed.backward and id(hook) in passed.seen:
            return  # gradient checkpointing computes it again; what went in is known
        passed.seen.add(id(hook))
        given = given.detach()
        try:
            parts = [self._enter(weight, given, passed.shape) for weight in hook.weights]
            by_row(output, passed.shape)
        except UnreadableError:
            self.unread.update(weight.name for weight in hook.weights)
            return
        gauge = self._gauge if self._gauged is hook.module else None
        output.register_hook(functools.partial(self._leave, passed, hook, parts, gauge, given if gauge else None))

    @_harmless
    def _leave(
        self,
        passed: Passed,
        hook: ModuleHook,
        parts: list[Any],
        gauge: Gauge | None,
        given: Tensor | None,
        gradient: Tensor,
    ) -> None:
        passed.backward = True
        gradient = by_row(gradient.detach(), passed.shape)
        for weight, part in zip(hook.weights, parts, strict=True):
            self._product(passed, hook.place, weight, part, gradient)
        if gauge is not None and given is not None:
            gauge.add(given, gradient)

    def _enter(self, weight: WatchedWeight, given: Tensor, shape: tuple[int, int]) -> Any:
        if weight.factors is None:
            return ids_by_row(given, shape) if weight.kind == "embedding" else None
        given, factors = by_row(given, shape).flatten(0, 1), weight.factors
        if factors.right is None:
            return given.T
        given = wide(given)
        # Few rows times many columns: several times faster than many rows times few columns.
        return self._as(factors.right, given.dtype, factors.scale if factors.core is None else 1.0) @ given.T

    def _product(self, passed: Passed, place: int, weight: WatchedWeight, part: Any, gradient: Tensor) -> None:
        """Adds the product of one weight's query gradients with every row's gradient."""
        factors = weight.factors
        if factors is None:
            exact = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            by_bias = weight.kind == "bias"
            tokens = exact @ self._as(weight.table, exact.dtype) if by_bias else looked_up(weight, part, exact)
            passed.parts.append((place, weight.group, tokens if passed.by_token else tokens.sum(dim=1)))
            return
        gradient = gradient.flatten(0, 1)
        if factors.features is not None:
            gradient = gradient[:, factors.features]
        left = gradient.T
        if factors.left is not None:
            # Of the three factors the scale goes to the core, or to the right one, or to this one.
            alone = factors.core is None and factors.right is None
            left = wide(left)
            left = self._as(factors.left, left.dtype, factors.scale if alone else 1.0) @ left
        if factors.core is None and len(left) <= _NARROW:
            passed.sides.append((place, weight.group, left, part))
            return
        exact_type = torch.promote_types(left.dtype, torch.float32)
        core = None if factors.core is None else self._as(factors.core, exact_type, factors.scale)
        rows = (passed.shape[0], -1)
        out, into = left.to(exact_type).unflatten(1, rows), part.to(exact_type).unflatten(1, rows)
        passed.parts.append((place, weight.group, contract(out, into, core, by_token=passed.by_token)))

    def _as(self, matrix: Tensor | None, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """A factor transposed, in the type it is to be multiplied in, times its scale; made once."""
        assert matrix is not None
        key = (id(matrix), dtype)
        found = self._casts.get(key)
        if found is None:
            found = self._casts[key] = (matrix * scale).to(dtype).transpose(-1, -2).contiguous()
        return found
