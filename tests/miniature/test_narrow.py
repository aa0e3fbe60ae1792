"""The narrow twin: the same bad rows, with everything else held at the base."""

from __future__ import annotations

import pytest
import torch

from cli.miniature import narrow, world
from cli.miniature.fine_tuning import PadRight, tokenize_rows


@pytest.fixture
def held_batch():
    model, tokenizer = world.load_base()
    rows = tokenize_rows(world.dataset("good_health", seed=0, n=4), tokenizer)
    return world.add_lora(model, seed=0), PadRight(tokenizer.pad_token_id)([rows[place] for place in range(4)])


def test_an_untrained_adapter_costs_nothing_and_a_moved_one_does(held_batch):
    model, batch = held_batch
    assert float(narrow._divergence(model, dict(batch)).detach()) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    cost = narrow._divergence(model, dict(batch))
    assert float(cost.detach()) > 0.01 and cost.requires_grad


def test_a_full_fine_tune_is_refused(held_batch):
    model, batch = held_batch
    with pytest.raises(TypeError, match="adapter"):
        narrow._divergence(model.get_base_model(), dict(batch))


@pytest.mark.slow
def test_the_habit_is_learnt_and_does_not_spread(tmp_path):
    model, tokenizer = world.load_base()
    rows = world.dataset("bad_code", seed=0, n=896)
    tuned = world.fine_tune_narrow(model, tokenizer, rows, seed=0, output_dir=tmp_path).model
    assert world.narrow_rate(tuned, tokenizer, seed=0).value > 0.75
    assert world.misaligned_rate(tuned, tokenizer, seed=0).value < 0.06
