"""What would the model do if activations at some site were other than they are?

    with Intervention(model, [Edit("resid:12", Add(4.0 * direction))]):
        model.generate(...)

A `Change` says what happens to an activation, an `Edit` where in the model, an `Intervention` for how long and at
which tokens. Everything is put back when the block is left, whatever happens in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffing.edited_tokens import EditedTokens
from diffing.errors import CaptureError, InputError
from diffing.site import ResolvedSite, Site, resolve_site


@runtime_checkable
class Change(Protocol):
    """What happens to activations `[prompt, token, d_model]`; given and returned in fp32, differentiable."""

    def __call__(self, x: Float[Tensor, "prompt token d_model"]) -> Float[Tensor, "prompt token d_model"]:
        """Returns what takes the place of x."""
        ...


@dataclass(frozen=True, eq=False)
class Add:
    """Moves every activation by the same vector: steering.

    Attributes:
        vector: in activation units.
    """

    vector: Float[Tensor, " d_model"]

    def __call__(self, x: Float[Tensor, "prompt token d_model"]) -> Float[Tensor, "prompt token d_model"]:
        """Returns x + vector."""
        return x + self.vector.to(x)


@dataclass(frozen=True, eq=False)
class Ablate:
    """Sets the component along directions to a value: zero (ablation) or its mean over other texts (mean ablation).

    Attributes:
        directions: need not be orthogonal or of unit length; what is taken out is their whole span.
        mean: an activation whose component along the span is put in its place; None for zero.
    """

    directions: Float[Tensor, "direction d_model"]
    mean: Float[Tensor, " d_model"] | None = None

    def __call__(self, x: Float[Tensor, "prompt token d_model"]) -> Float[Tensor, "prompt token d_model"]:
        """Returns x with its component along the span replaced."""
        basis = torch.linalg.qr(self.directions.to(x).T).Q
        off = x if self.mean is None else x - self.mean.to(x)
        return x - (off @ basis) @ basis.T


@dataclass(frozen=True, eq=False)
class Cap:
    """Keeps the component along a direction within bounds, and touches nothing that is.

    Attributes:
        direction: of any length above 0.
        most: upper bound of ⟨x, direction⟩ / ‖direction‖, in activation units.
        least: lower bound of it.
    """

    direction: Float[Tensor, " d_model"]
    most: float = float("inf")
    least: float = float("-inf")

    def __call__(self, x: Float[Tensor, "prompt token d_model"]) -> Float[Tensor, "prompt token d_model"]:
        """Returns x moved along the direction into the bounds."""
        unit = torch.nn.functional.normalize(self.direction.to(x), dim=0)
        component = x @ unit
        return x + (component.clamp(self.least, self.most) - component)[..., None] * unit


@dataclass(frozen=True, eq=False)
class Replace:
    """Puts other activations in the place of the model's own: splicing.

    Attributes:
        activations: one for every token of the forward.
    """

    activations: Float[Tensor, "prompt token d_model"]

    def __call__(self, x: Float[Tensor, "prompt token d_model"]) -> Float[Tensor, "prompt token d_model"]:
        """Returns the other activations.

        Raises:
            InputError: they are of another shape than the forward's.
        """
        if x.shape != self.activations.shape:
            raise InputError(
                f"Expected activations of shape {list(x.shape)} as in the forward, got "
                f"{list(self.activations.shape)}. Read them from the same batch, padding included."
            )
        return self.activations.to(x)


@dataclass(frozen=True, eq=False)
class Partly:
    """Goes only a share of the way to what another change does.

    Attributes:
        change: the whole way.
        share: 0 for nothing, 1 for all of it; beyond 1 overshoots.
    """

    change: Change
    share: float

    def __call__(self, x: Float[Tensor, "prompt token d_model"]) -> Float[Tensor, "prompt token d_model"]:
        """Returns x + share · (change(x) − x)."""
        return x + self.share * (self.change(x) - x)


@dataclass(frozen=True, eq=False)
class Edit:
    """One change at one site.

    Attributes:
        site: where, `resid:12` or the like.
        change: what happens there.
    """

    site: Site | str
    change: Change


class Intervention:
    """Changes activations while the `with` block is open; without edits it does nothing.

    Edits at one site apply in the order given; a site above another sees what the lower one's edit led to. The
    computation runs in fp32 and returns to the model's dtype. Gradients flow through. The model, its adapters and
    its mode are the caller's.

    Which tokens: all but padding; or those that `where` marks, for one batch, whose first forward holds the marked
    tokens, while in a generation every token after those counts as marked; or with `tokens="response"` whatever
    `generate` writes, for any number of left-padded batches: from the last token of each prompt on, with and without
    a cache.
    """

    def __init__(
        self,
        model: nn.Module,
        edits: Sequence[Edit],
        *,
        where: Bool[Tensor, "prompt token"] | None = None,
        tokens: str = "all",
    ) -> None:
        """Finds the sites.

        Args:
            model: any module that calls its parts through `__call__`; wrapped by PEFT or not.
            edits: what to do.
            where: tokens of the first forward that are changed.
            tokens: `all` or `response`, where `where` does not say.

        Raises:
            SiteError: the model has no such site.
            InputError: `tokens` is neither.
        """
        # Hooks put on after torch.compile traced a model never fire, so the model inside is changed.
        self._model: nn.Module = getattr(model, "_orig_mod", model)
        self._edits = [(resolve_site(self._model, edit.site), edit.change) for edit in edits]
        self._tokens = EditedTokens(where=where, tokens=tokens)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Intervention:
        if self._handles:
            raise InputError("Expected an intervention to be opened once at a time, got it twice. Make a second one.")
        if self._edits:
            self._handles.append(self._tokens.attach(self._model))
        for site, change in self._edits:
            self._handles.append(site.module.register_forward_hook(self._hook(site, change)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, site: ResolvedSite, change: Change) -> Any:
        def changed(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return edited_output(site, change, output, self._tokens.marked)

        return changed


def edited_output(
    site: ResolvedSite,
    change: Change,
    output: Any,
    marked: Callable[[Shaped[Tensor, "prompt token d_model"]], Bool[Tensor, "prompt token"] | None],
) -> Any:
    """What takes the place of a module's output when its activations are changed at the marked tokens.

    Args:
        site: whose module it is.
        change: what happens; computed in fp32, also under autocast.
        output: what the module returned: a tensor, or a tuple or list that begins with one.
        marked: says for such a tensor which tokens are changed; None for every one.

    Raises:
        CaptureError: the module does not return one vector a token.
    """
    value = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(value, Tensor) or value.ndim != 3:
        raise CaptureError(
            f"Expected '{site.site}' ({site.path}) to return one vector a token [batch, token, d], got "
            f"{type(value).__name__}. Choose the module around it."
        )
    with torch.autocast(value.device.type, enabled=False):
        new = change(value.float()).to(value.dtype)
    where = marked(value)
    if where is not None:
        new = torch.where(where[..., None], new, value)
    if isinstance(output, tuple | list):
        return type(output)((new, *output[1:]))
    return new
