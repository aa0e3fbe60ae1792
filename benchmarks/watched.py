"""What is watched in a cost benchmark, and how is the model run without being watched?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from diffing.persona import PersonaVector, Separation
from diffing.provenance import Provenance


def random_personas(model: Any, traits: Sequence[str], layers: Sequence[int]) -> tuple[PersonaVector, ...]:
    """Random directions, trait by trait: what they point at does not change what they cost."""
    config = (model.get_base_model() if hasattr(model, "get_base_model") else model).config
    generator, found = torch.Generator().manual_seed(0), []
    for trait in traits:
        for layer in layers:
            direction = torch.randn(config.hidden_size, generator=generator)
            found.append(
                PersonaVector(
                    trait=trait,
                    site=f"resid:{layer}",
                    direction=direction / direction.norm(),
                    scale=1.0,
                    neutral_mean=0.0,
                    neutral_std=1.0,
                    separation=Separation(0.9, 0.8, 1.0, 10, 5, 1.0),
                    pooling="response_mean",
                    n_positive=10,
                    n_negative=10,
                    n_layers=config.num_hidden_layers,
                    model_fingerprint="0" * 64,
                    provenance=Provenance(),
                )
            )
    return tuple(found)


class HooksOff:
    """Every hook that is on a model, taken off for a while."""

    KINDS = ("_forward_hooks", "_forward_pre_hooks")

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._held: list[tuple[dict[int, Any], dict[int, Any]]] = []

    def __enter__(self) -> None:
        # Looked up every time: which modules are hooked may change from step to step.
        hooked = [getattr(module, kind) for module in self._modules for kind in self.KINDS]
        self._held = [(hooks, dict(hooks)) for hooks in hooked if hooks]
        for hooks, _ in self._held:
            hooks.clear()

    def __exit__(self, *_: object) -> None:
        for hooks, held in self._held:
            hooks.update(held)
