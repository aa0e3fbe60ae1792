"""TracIn by Adam's own steps: what a saved optimizer says of how far a gradient would have moved each weight."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from attribution.adam import adam_denominator, param_groups
from attribution.adam_metric import AdamMetric
from attribution.curvature import Curvature
from attribution.example import batches
from attribution.gradients import find_blocks
from attribution.queries import CompletionQuery
from attribution.trajectory import SavedStep, score_trajectory
from diffing.errors import CheckpointError, InputError, PathMissingError
from tests.attribution.models import random_rows, row_gradient, tiny_gpt2, tiny_llama, tiny_lora

ROWS = random_rows(8, shortest=6, longest=6)
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "lora": tiny_lora}


def trained(kind: str, folder: Path) -> Trainer:
    model = MODELS[kind]().float()
    settings = TrainingArguments(
        str(folder), max_steps=4, learning_rate=1e-2, per_device_train_batch_size=4, save_steps=4, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_steps=10, dataloader_pin_memory=False, save_strategy="steps",
    )  # fmt: skip

    def collate(rows):
        (batch,) = batches(rows, len(rows))
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}

    trainer = Trainer(model, settings, collate, ROWS)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", MODELS)
def test_the_saved_metric_is_that_of_the_live_optimizer(tmp_path, kind):
    trainer = trained(kind, tmp_path)
    optimizer, model = trainer.optimizer, trainer.model.eval()
    metric = AdamMetric.of(tmp_path / "checkpoint-4", model)
    assert isinstance(metric, Curvature)
    groups = param_groups(optimizer)
    for index, block in enumerate(find_blocks(model)[0]):
        group = groups[id(block.parameter)][1]
        below = adam_denominator(optimizer, block.parameter, group)
        if any(isinstance(module, torch.nn.Embedding) for module in block.modules):
            continue  # those of seldom tokens are raised, as in the live pushes
        found = metric.solve(index, torch.ones(1, *block.shape))[0]
        torch.testing.assert_close(found, 1 / below, msg=block.name)


def test_scores_are_the_inner_products_in_that_metric(tmp_path):
    model = trained("lora", tmp_path).model.eval()
    query = CompletionQuery(random_rows(1, seed=9))
    saved = SavedStep(4, 0.5, lambda: model, tmp_path / "checkpoint-4")
    found = score_trajectory([saved], ROWS, [query], method="adam")
    assert "Adam" in found.method
    parameters = [block.parameter for block in find_blocks(model)[0]]
    wanted = torch.autograd.grad(query.value(model), parameters)
    metric = AdamMetric.of(tmp_path / "checkpoint-4", model)
    moved = [metric.solve(index, gradient[None])[0] for index, gradient in enumerate(wanted)]
    for place, row in enumerate(ROWS):
        gradients = row_gradient(model, row, parameters)
        slow = -0.5 * sum(float((q * g).sum()) for q, g in zip(moved, gradients, strict=True))
        assert found.values[0, place] == pytest.approx(slow, rel=1e-3, abs=1e-6 * np.abs(found.values).max())


def test_a_checkpoint_without_an_adam_says_so_in_one_line(tmp_path):
    model = tiny_lora()
    with pytest.raises(PathMissingError, match="save_only_model=False"):
        AdamMetric.of(tmp_path, model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match="keeps none of its shape") as caught:
        AdamMetric.of(tmp_path, model)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="SavedStep"):
        score_trajectory([SavedStep(1, 1.0, partial(tiny_llama))], ROWS, [CompletionQuery(ROWS[:1])], method="adam")
