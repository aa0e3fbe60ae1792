"""Every row's gradient out of one batched backward equals the gradient of that row alone."""

import warnings

import pytest
import torch
from transformers import LlamaForCausalLM

from attribution.example import batches
from attribution.gradients import evaluating, find_blocks, record_rows, recording, row_losses
from diffing.errors import InputError
from tests.attribution.models import random_rows, row_gradient, tiny_gpt2, tiny_llama, tiny_lora
from tests.tiny_models import FAMILIES, tiny_model, with_lora

MODELS = {
    "llama": tiny_llama,
    "llama with tied embeddings": lambda: tiny_llama(tied=True),
    "gpt2 (Conv1D, biases, tied, learned positions)": tiny_gpt2,
    "lora": tiny_lora,
}


@pytest.mark.parametrize("family", MODELS)
def test_batched_row_gradients_equal_single_row_gradients(family):
    model = MODELS[family]().eval()
    rows = random_rows(5)
    blocks, _ = find_blocks(model)
    parameters = [block.parameter for block in blocks]
    for batch in batches(rows, 3):
        with evaluating(model):
            recorded = record_rows(model, blocks, batch, row_losses)
        for place, position in enumerate(batch.positions):
            expected = row_gradient(model, rows[position], parameters)
            for block, truth in zip(blocks, expected, strict=True):
                torch.testing.assert_close(recorded.gradient(block)[place], truth, rtol=1e-9, atol=1e-11)


def test_lora_blocks_are_the_adapter_only():
    blocks, coverage = find_blocks(tiny_lora())
    assert all("lora_" in block.name for block in blocks)
    assert coverage.share == 1.0


class _WithTemperature(LlamaForCausalLM):
    """Uses one parameter in a way that no hook can see."""

    def __init__(self, config):
        super().__init__(config)
        self.temperature = torch.nn.Parameter(torch.ones(3))

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = output.logits * self.temperature.sum()
        return output


def test_coverage_names_what_is_outside():
    torch.manual_seed(0)
    model = _WithTemperature(tiny_llama().config).double()
    _, coverage = find_blocks(model)
    assert coverage.missing == ("temperature",)
    assert 0.99 < coverage.share < 1.0


def test_coverage_says_how_much_of_the_change_is_covered():
    torch.manual_seed(0)
    model = _WithTemperature(tiny_llama().config).double()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.temperature += 1.0
        model.lm_head.weight[0, :9] += 1.0
    assert find_blocks(model, base=base)[1].change_share == pytest.approx(8 / 11)


def test_all_of_an_ordinary_model_is_covered():
    assert find_blocks(tiny_llama())[1].share == 1.0


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_covered_and_exact(family, adapter):
    model = (
        tiny_model(family, num_hidden_layers=1, dtype=torch.float64)
        if family != "gpt2"
        else tiny_model(family, n_layer=1, dtype=torch.float64)
    )
    model.config._experts_implementation = "eager"  # the fused kernel has no float64
    model = with_lora(model).double() if adapter else model
    rows = random_rows(3, shortest=5)
    blocks, coverage = find_blocks(model)
    assert coverage.share == 1.0
    (batch,) = batches(rows, 3)
    with evaluating(model):
        recorded = record_rows(model, blocks, batch, row_losses)
        for place, position in enumerate(batch.positions):
            expected = row_gradient(model, rows[position], [block.parameter for block in blocks])
            for block, truth in zip(blocks, expected, strict=True):
                found = recorded.gradient(block)[place]
                # Some families compute parts in single precision whatever the dtype.
                torch.testing.assert_close(found, block.part(truth), rtol=1e-5, atol=1e-6, msg=block.name)


def test_a_projection_whose_weight_its_parent_takes_directly_is_still_exact():
    blocks, _ = find_blocks(tiny_model("mamba"))
    assert {block.kind for block in blocks if "dt_proj" in block.name} == {"rerun"}


def test_segments_of_packed_rows_give_the_gradients_of_the_rows_alone():
    model = tiny_model("mixtral", dtype=torch.float64).eval()
    model.config._experts_implementation = "eager"
    blocks, _ = find_blocks(model)
    rows = random_rows(4, seed=3)
    (batch,) = batches(rows, 4)
    segments = torch.where(batch.attention_mask.bool(), torch.arange(4).unsqueeze(1), -1)[:, :-1]  # as the model sees
    with evaluating(model):
        with recording(model, blocks, 4, segments=segments) as packed:
            row_losses(model, batch).sum().backward()
        alone = record_rows(model, blocks, batch, row_losses)
        for block in blocks:
            torch.testing.assert_close(packed.gradient(block), alone.gradient(block))


def test_bfloat16_gradients_are_close_to_single_precision():
    model = tiny_model("llama", num_hidden_layers=1)
    half = tiny_model("llama", num_hidden_layers=1, dtype=torch.bfloat16)
    rows = random_rows(3)
    (batch,) = batches(rows, 3)
    flat = []
    for each in (model, half):
        blocks, coverage = find_blocks(each)
        assert coverage.share == 1.0
        with evaluating(each):
            recorded = record_rows(each, blocks, batch, row_losses)
        flat.append(torch.cat([recorded.gradient(block).flatten(1) for block in blocks], dim=1))
    assert torch.nn.functional.cosine_similarity(*flat).min() > 0.99


def test_tied_embeddings_are_one_block_with_two_uses():
    blocks, _ = find_blocks(tiny_llama(tied=True))
    assert sum(len(block.modules) == 2 for block in blocks) == 1


def test_model_is_left_as_it_was():
    model = tiny_llama().train()
    next(model.parameters()).grad = marker = torch.ones_like(next(model.parameters()))
    blocks, _ = find_blocks(model)
    (batch,) = batches(random_rows(2), 2)
    with evaluating(model):
        record_rows(model, blocks, batch, row_losses)
    assert all(module.training for module in model.modules())
    assert next(model.parameters()).grad is marker
    assert not any(module._forward_hooks for module in model.modules())


def test_frozen_model_says_what_to_do():
    model = tiny_llama().requires_grad_(False)
    with pytest.raises(InputError, match="every parameter is frozen"):
        find_blocks(model)


def test_row_with_nan_loss_is_named():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    blocks, _ = find_blocks(model)
    (batch,) = batches(random_rows(2), 2)
    with evaluating(model), pytest.raises(InputError, match="row-"):
        record_rows(model, blocks, batch, row_losses)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_in_training_changes_nothing(reentrant):
    model = tiny_llama()
    blocks, _ = find_blocks(model)
    (batch,) = batches(random_rows(3), 3)
    with evaluating(model):
        expected = record_rows(model, blocks, batch, row_losses)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in transformers 5.23; older ones know this name only
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    with recording(model, blocks, 3) as recorded:
        row_losses(model, batch).sum().backward()
    for block in blocks:
        torch.testing.assert_close(recorded.gradient(block), expected.gradient(block))
