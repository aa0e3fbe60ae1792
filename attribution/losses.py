"""What is each row's loss, and what does the model need to be asked for it?"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attribution.example import IGNORED, ExampleBatch

RowLoss = Callable[[nn.Module, ExampleBatch], Tensor]
Labels = Literal["sampled", "data"]


def row_losses(model: nn.Module, batch: ExampleBatch) -> Float[Tensor, " row"]:
    """Each row's loss: minus the log-probability of its labelled tokens, summed (not averaged), in fp32."""
    return token_losses(model(**model_inputs(model, batch)).logits, batch.labels).sum(dim=1)


def model_inputs(model: nn.Module, batch: ExampleBatch) -> dict[str, Any]:
    """Keyword arguments for the model's forward: everything but the labels, and without the last place of all.

    What stands last predicts nothing that has a label, and costs as much as any other place. Positions are passed for
    every row: left to itself GPT-2 looks them up once for the whole batch, and the position embedding's gradient could
    then not be told apart by row.
    """
    mask = batch.attention_mask[:, :-1]
    inputs: dict[str, Any] = {"input_ids": batch.input_ids[:, :-1], "attention_mask": mask}
    if "position_ids" in _forward_parameters(model):
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return {**inputs, "use_cache": False}


def _forward_parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    unwrap = getattr(model, "get_base_model", None)  # PEFT hides the signature
    return inspect.signature((unwrap() if callable(unwrap) else model).forward).parameters


def token_losses(logits: Tensor, labels: Int[Tensor, "row token"]) -> Float[Tensor, "row next_token"]:
    """Minus log-probability of every labelled next token, 0 where nothing is labelled; in fp32 or better.

    Args:
        logits: `[row, token, vocabulary]`; those of the last label's place may be missing.
        labels: one a token.
    """
    logits = logits[:, : labels.shape[1] - 1].to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
    )


@dataclass(frozen=True)
class SampledLoss:
    """Row losses on next tokens drawn from the model itself, at the positions where the row takes loss.

    Curvature from such labels is the true Fisher. Each row draws from a generator of its own, seeded by its name,
    so that neither batching, order nor sharding changes a draw.
    """

    seed: int

    def __call__(self, model: nn.Module, batch: ExampleBatch) -> Float[Tensor, " row"]:
        """One loss a row, summed over its labelled places."""
        logits = model(**model_inputs(model, batch)).logits
        places = (batch.labels[:, 1:] != IGNORED).nonzero()
        levels = torch.cat([
            torch.rand(int(count), generator=torch.Generator().manual_seed(_row_seed(self.seed, name)))
            for name, count in zip(batch.ids, (batch.labels[:, 1:] != IGNORED).sum(dim=1).tolist(), strict=True)
        ])  # fmt: skip
        # One uniform number a place, looked up in the cumulative distribution: the same draw on every device.
        chosen = logits[places[:, 0], places[:, 1]].detach()
        cumulative = chosen.to(torch.float32).softmax(dim=-1).cumsum(dim=-1)
        target = levels.to(chosen.device).unsqueeze(-1) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[-1] - 1)
        labels = batch.labels.clone()
        labels[places[:, 0], places[:, 1] + 1] = drawn.squeeze(-1)
        return token_losses(logits, labels).sum(dim=1)


def curvature_loss(labels: Labels, seed: int) -> RowLoss:
    """The loss whose gradients make the Fisher: on `sampled` labels (true) or the `data`'s (empirical)."""
    return row_losses if labels == "data" else SampledLoss(seed)


def _row_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, gradients on, every module's mode and every `.grad` as before on leaving."""
    modes = [(module, module.training) for module in model.modules()]
    held = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in held:
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, gradient in held:
            parameter.grad = gradient
