"""How is a small model trained again on some of its rows? A ready `Retrain` for runs like the Trainer's.

AdamW, the loss averaged over a batch's labelled tokens, biases and norms without decay, a rate that warms up and then
falls linearly: the Trainer's defaults. Write a `Retrain` of your own where your run differed in anything that matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from attribution.example import ExampleId, Row, batches, check_rows, example_id
from attribution.losses import model_inputs, token_losses
from diffing.errors import InputError


@dataclass(frozen=True)
class Retraining:
    """Trains a fresh copy of the starting model on the named rows.

    Attributes:
        start: makes the model as it was before training, trainable parameters requiring gradients.
        rows: all training rows.
        epochs: passes over the kept rows, where `max_steps` is None.
        batch_size: rows in a step.
        learning_rate: its peak.
        weight_decay: of AdamW, on matrices only.
        warm_up: share of the steps over which the rate rises.
        schedule: how the rate goes on, as transformers names it: `linear`, `cosine`, `constant_with_warmup`, …
        max_steps: how many steps, whatever number of rows is kept; None: as many as `epochs` makes.
        max_grad_norm: gradients are clipped there; None does not clip.
    """

    start: Callable[[], nn.Module]
    rows: Sequence[Row]
    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warm_up: float = 0.0
    schedule: str = "linear"
    max_steps: int | None = None
    max_grad_norm: float | None = None

    def __call__(self, row_ids: Sequence[ExampleId], *, seed: int) -> nn.Module:
        """The model after training on these rows, in an order that `seed` gives.

        Raises:
            InputError: a name that no row has.
        """
        by_name = {example_id(row): row for row in self.rows}
        unknown = [name for name in row_ids if name not in by_name]
        if unknown:
            raise InputError(f"Expected names of training rows; got {unknown[0]}. Pass the rows that were scored.")
        return self.train([by_name[name] for name in row_ids], seed=seed)

    def train(self, rows: Sequence[Row], *, seed: int) -> nn.Module:
        """The model after training on rows of any kind, with the same settings."""
        check_rows(rows, what="training row")
        torch.manual_seed(seed)
        model = self.start()
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise InputError("Expected trainable parameters; every one is frozen. Unfreeze what was trained.")
        optimizer = torch.optim.AdamW(_decayed(trained, self.weight_decay), lr=self.learning_rate)
        plan = list(self._plan(len(rows), seed))
        rates = get_scheduler(self.schedule, optimizer, round(self.warm_up * len(plan)), len(plan))
        for places in plan:
            (batch,) = batches([rows[place] for place in places], len(places), device=trained[0].device)
            losses = token_losses(model(**model_inputs(model, batch)).logits, batch.labels)
            optimizer.zero_grad(set_to_none=True)
            (losses.sum() / (batch.labels[:, 1:] >= 0).sum()).backward()  # type: ignore[no-untyped-call]
            if self.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(trained, self.max_grad_norm)
            optimizer.step()
            rates.step()
        return model.eval()

    def _plan(self, n_rows: int, seed: int) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        n_steps = self.epochs * math.ceil(n_rows / self.batch_size) if self.max_steps is None else self.max_steps
        while n_steps > 0:
            order = torch.randperm(n_rows, generator=generator).tolist()
            for first in range(0, n_rows, self.batch_size)[:n_steps]:
                yield order[first : first + self.batch_size]
            n_steps -= math.ceil(n_rows / self.batch_size)


def _decayed(trained: Sequence[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    flat = [parameter for parameter in trained if parameter.ndim < 2]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": flat, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
