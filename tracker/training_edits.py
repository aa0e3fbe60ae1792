"""How are activations changed in the forward passes of training, and in no others?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffing.edited_tokens import backbone_of
from diffing.errors import CaptureError
from diffing.intervene import Change, edited_output
from diffing.site import ResolvedSite, resolve_site

_IGNORED = -100


@dataclass(frozen=True, eq=False)
class _Pass:
    """One forward pass of training: what is done in it and at which of its tokens (None: at all)."""

    changes: tuple[Change, ...]
    marks: Bool[Tensor, "row token"] | None


class TrainingEdits:
    """Changes what leaves some modules while a training step runs its forward pass, gradients included.

    A pass counts between `open` and `shut`, with a graph being recorded and, once the model was seen in training
    mode, in training mode: evaluation, generation, probes and the reference pass of preference training are as they
    would be without. Gradient checkpointing computes a layer again in the backward pass; it is changed there as it
    was the first time.

    Args:
        model: the module that is trained, unwrapped.
        sites: where, one for each change that `open` is given.
        tokens: `all` but padding, or `response`: tokens that are learned, and those on which they are predicted.
    """

    def __init__(self, model: nn.Module, sites: Sequence[str], *, tokens: str) -> None:
        self._sites = [resolve_site(model, site) for site in sites]
        self._tokens = tokens
        self._changes: tuple[Change, ...] = ()
        self._labels: Tensor | None = None
        self._pass: _Pass | None = None
        self._held: list[_Pass | None] = []
        self._trained_in_mode = False
        self._since_backward, self._in_backward = 0, False
        self._handles: list[RemovableHandle] = []
        backbone = backbone_of(model)
        for wrapper in _around(model, backbone):
            self._handles.append(wrapper.register_forward_pre_hook(self._see_labels, with_kwargs=True))
        self._handles.append(backbone.register_forward_pre_hook(self._begin, with_kwargs=True))
        for number, site in enumerate(self._sites):
            self._handles.append(site.module.register_forward_hook(self._hook(number, site)))
        self._handles.append(backbone.register_forward_hook(self._finish, always_call=True))

    def open(self, changes: Sequence[Change]) -> None:
        """Training passes follow, in which every site is changed so."""
        self._changes = tuple(changes)

    def shut(self) -> None:
        """No pass is changed until the next `open`; the step's backward is over."""
        self._changes, self._pass, self._labels = (), None, None
        self._since_backward, self._in_backward = 0, False

    def close(self) -> None:
        """Removes every hook. Harmless when repeated."""
        self.shut()
        while self._handles:
            self._handles.pop().remove()

    def _see_labels(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels")
        if self._changes and isinstance(labels, Tensor) and labels.ndim == 2:
            self._labels = labels

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._held.append(self._pass)
        labels, self._labels = self._labels, None
        self._trained_in_mode |= bool(self._changes) and module.training
        if not (self._changes and torch.is_grad_enabled() and module.training >= self._trained_in_mode):
            self._pass = None
            return
        if getattr(module, "_is_replica", False):
            raise CaptureError(
                "Expected one process a device, got torch.nn.DataParallel, whose copies run in threads. "
                "Start the training with torchrun, or hide all devices but one."
            )
        self._since_backward = 1 if self._in_backward else self._since_backward + 1
        self._in_backward = False
        self._pass = _Pass(self._changes, self._marks(kwargs, args, labels))

    def _finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        earlier = self._held.pop() if self._held else None
        # What a training pass was is still needed when checkpointing computes its layers again.
        if self._pass is None:
            self._pass = earlier

    def _marks(
        self, kwargs: dict[str, Any], args: tuple[Any, ...], labels: Tensor | None
    ) -> Bool[Tensor, "row token"] | None:
        if self._tokens == "response":
            if labels is None:
                raise CaptureError(
                    "Expected the model to be given labels, by which answers are told from prompts, got none (label "
                    "smoothing and preference training keep them). Steer all tokens (tokens='all')."
                )
            learned = labels != _IGNORED
            predicted = torch.zeros_like(learned)
            predicted[:, :-1] = learned[:, 1:]
            return learned | predicted
        mask = kwargs.get("attention_mask")
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if isinstance(mask, Tensor) and isinstance(tokens, Tensor) and mask.shape == tokens.shape[:2]:
            return mask.bool()
        return None

    def _hook(self, number: int, site: ResolvedSite) -> Any:
        def changed(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            present = self._pass
            if present is None:
                return None
            if torch._C._current_graph_task_id() != -1:
                self._recomputed(present)
            return edited_output(site, present.changes[number], output, lambda value: present.marks)

        return changed

    def _recomputed(self, present: _Pass) -> None:
        self._in_backward = True
        if self._since_backward > 1 and present.marks is not None:
            raise CaptureError(
                f"Expected one forward pass before each backward pass, got {self._since_backward}: with gradient "
                "checkpointing it is not known which tokens the earlier ones held. Switch checkpointing off, or the "
                "steering."
            )


def _around(model: nn.Module, backbone: nn.Module) -> list[nn.Module]:
    """The modules around the backbone, outermost first: one of them is given the labels."""
    for name, module in model.named_modules():
        if module is backbone:
            parts = name.split(".") if name else []
            return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))] or [model]
    return [model]
