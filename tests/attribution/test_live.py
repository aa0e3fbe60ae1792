"""Pushes read from a batch's own backward, against one backward per row in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from attribution.adam import adam_denominator, floor_seldom, param_groups
from attribution.example import batches, example_id
from attribution.live import LiveReader
from attribution.live_rows import settle, weigh
from attribution.query_gradient import WatchedQueries, watch_queries
from tests.attribution.models import random_rows, tiny_gpt2, tiny_llama, tiny_lora

FAMILIES: dict[str, Any] = {
    "llama": tiny_llama,
    "llama with tied embeddings": lambda: tiny_llama(tied=True),
    "gpt2 (Conv1D, biases, tied, learned positions)": tiny_gpt2,
    "lora": tiny_lora,
}
RATE = 1e-2


def n_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def quiet(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def query_values(model: nn.Module, n: int = 2):
    (batch,) = batches(random_rows(3, seed=7), 3)

    def values() -> torch.Tensor:
        hidden = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
        ).hidden_states[-1]
        return torch.stack([hidden[k, :3].mean() + hidden[k, 1, k] for k in range(n)])

    return values


def losses(model: nn.Module, batch: Any) -> torch.Tensor:
    """Each row's share of the batch's mean loss over labelled tokens."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    logits = model(**inputs, labels=batch.labels).logits[:, :-1]
    found = nn.functional.cross_entropy(
        logits.transpose(1, 2), batch.labels[:, 1:], ignore_index=-100, reduction="none"
    ).sum(dim=1)
    return found / (batch.labels[:, 1:] != -100).sum()


def trained(model: nn.Module, batch: Any, *, adam: bool = True) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made: Any = torch.optim.AdamW if adam else torch.optim.SGD
    optimizer = made(parameters, lr=RATE)
    for _ in range(3):
        losses(model, batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def read(model: nn.Module, watched: WatchedQueries, batch: Any, *, accumulate: int = 1):
    """Names and pushes of one training step, in as many micro-batches, gradients clipped to half their size."""
    before = n_hooks(model)
    reader = LiveReader(model)
    reader.watch(watched)
    reader.open()
    for _ in range(accumulate):
        losses(model, batch).sum().backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad *= 0.5
    passes, gauged = reader.take()
    reader.close()
    model.zero_grad()
    assert reader.problem == ""
    settled = [settle(weigh(one, [RATE], 1.0 if gauged is None else gauged[0])) for one in passes]
    assert n_hooks(model) == before
    return settled, gauged, reader.unread


def slow_pushes(model: nn.Module, values: Any, batch: Any, optimizer: Any, skip: set[str]) -> np.ndarray:
    """minus rate times <gradient of the row, P times gradient of the query>, a backward for each row."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in named]
    groups = param_groups(optimizer)
    wanted = []
    value = values()
    for k in range(len(value)):
        gradients = torch.autograd.grad(value[k], parameters, retain_graph=True, allow_unused=True)
        scaled = []
        for (name, parameter), gradient in zip(named, gradients, strict=True):
            below = adam_denominator(optimizer, parameter, groups[id(parameter)][1])
            if below is not None and any(part in name for part in ("embed", "wte", "wpe")):
                below = floor_seldom(below)
            keep = gradient is not None and name not in skip
            scaled.append(gradient / (1.0 if below is None else below) if keep else torch.zeros_like(parameter))
        wanted.append(scaled)
    found = []
    for row in losses(model, batch):
        gradients = torch.autograd.grad(row, parameters, retain_graph=True, allow_unused=True)
        found.append(
            [
                sum(float((q * g).sum()) for q, g in zip(scaled, gradients, strict=True) if g is not None)
                for scaled in wanted
            ]
        )
    return -RATE * np.array(found)


@pytest.mark.parametrize(
    ("family", "n_queries", "adam"),
    [*((family, n, True) for family in FAMILIES for n in (1, 2)), ("llama", 1, False)],
)
def test_pushes_equal_one_backward_per_row(family, n_queries, adam):
    model = quiet(FAMILIES[family]())
    rows = random_rows(5)
    (batch,) = batches(rows, 5)
    optimizer = trained(model, batch, adam=adam)
    values = query_values(model, n_queries)
    watched = watch_queries(model, [f"q{k}" for k in range(n_queries)], values, optimizer=optimizer, rank=0)
    assert watched is not None
    assert watched.metric == ("adam" if adam else "plain")
    [(names, pushes)], gauged, unread = read(model, watched, batch)
    # Clipping to half has reached every push, and nothing was missed or counted twice.
    np.testing.assert_allclose(gauged, [0.5, 1.0], rtol=1e-9)
    expected = 0.5 * slow_pushes(model, values, batch, optimizer, {*watched.missing, *unread})
    np.testing.assert_allclose(pushes, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    assert [name.example for name in names] == [
        example_id({key: rows[place][key] for key in ("input_ids", "labels")}) for place in batch.positions
    ]


def test_what_is_watched_is_said():
    model = quiet(tiny_gpt2())
    (batch,) = batches(random_rows(5), 5)
    watched = watch_queries(model, ["q"], query_values(model, 1), optimizer=trained(model, batch), rank=0)
    assert watched is not None
    assert all(".ln_" in name for name in watched.missing)
    assert 0.5 < watched.kept[0] < 1.0
    _, _, unread = read(model, watched, batch)
    assert unread == {"transformer.wpe.weight"}  # looked up once for the whole batch


def test_positive_push_means_the_step_on_the_row_raises_the_query():
    model = quiet(tiny_llama())
    (batch,) = batches(random_rows(4), 4)
    optimizer = trained(model, batch, adam=False)
    values = query_values(model, 1)
    watched = watch_queries(model, ["q"], values, optimizer=optimizer, rank=0)
    assert watched is not None
    [(_, pushes)], _, _ = read(model, watched, batch)
    skip = set(watched.missing)
    named = [(name, parameter) for name, parameter in model.named_parameters() if name not in skip]
    for row in range(4):
        gradients = torch.autograd.grad(losses(model, batch)[row], [one for _, one in named], allow_unused=True)
        before = float(values()[0].detach())
        step = 0.1
        with torch.no_grad():
            for (_, parameter), gradient in zip(named, gradients, strict=True):
                if gradient is not None:
                    parameter -= step * 0.5 * RATE * gradient
            gained = float(values()[0].detach()) - before
            for (_, parameter), gradient in zip(named, gradients, strict=True):
                if gradient is not None:
                    parameter += step * 0.5 * RATE * gradient
        assert gained / step == pytest.approx(float(pushes[row, 0]), rel=0.05, abs=1e-7)


def test_micro_batches_are_read_one_by_one_and_padding_side_does_not_matter():
    model = quiet(tiny_llama())
    (batch,) = batches(random_rows(4), 4)
    optimizer = trained(model, batch)
    watched = watch_queries(model, ["a", "b"], query_values(model), optimizer=optimizer, rank=4)
    assert watched is not None
    [first, second], gauged, _ = read(model, watched, batch, accumulate=2)
    np.testing.assert_allclose(gauged, [0.5, 1.0], rtol=1e-9)
    assert first[0] == second[0]
    np.testing.assert_allclose(first[1], second[1])
    left = batch.__class__(
        batch.ids,
        batch.positions,
        *(
            torch.stack([torch.roll(row, int(shift)) for row, shift in zip(column, shifts, strict=True)])
            for shifts in [(batch.attention_mask == 0).sum(dim=1)]
            for column in (batch.input_ids, batch.attention_mask, batch.labels)
        ),
    )
    [moved], _, _ = read(model, watched, left)
    assert moved[0] == first[0]


def test_packed_rows_push_as_they_do_apart():
    model = quiet(tiny_llama())
    rows = random_rows(3)
    (batch,) = batches(rows, 3)
    optimizer = trained(model, batch)
    watched = watch_queries(model, ["a", "b"], query_values(model), optimizer=optimizer, rank=0)
    assert watched is not None
    apart = {}
    for row in rows:
        (alone,) = batches([row], 1)
        [(names, pushes)], _, _ = read(model, watched, alone)
        apart[names[0]] = pushes[0] * (alone.labels[:, 1:] != -100).sum().item()
    ids = torch.tensor([[token for row in rows for token in row["input_ids"]]])
    labels = torch.tensor([[token for row in rows for token in [-100, *row["labels"][1:]]]])
    positions = torch.tensor([[place for row in rows for place in range(len(row["input_ids"]))]])
    segment = (positions == 0).cumsum(dim=1)[0]
    mask = (segment[:, None] == segment[None, :]) & torch.ones(len(segment), len(segment), dtype=torch.bool).tril()
    reader = LiveReader(model)
    reader.watch(watched)
    reader.open()
    logits = model(input_ids=ids, labels=labels, position_ids=positions, attention_mask=mask[None, None]).logits
    nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum").backward()
    [passed], _ = reader.take()
    names, pushes = settle(weigh(passed, [RATE], 0.5))
    reader.close()
    assert [name.tokens for name in names] == [settled.tokens for settled in apart]
    np.testing.assert_allclose(pushes, np.stack(list(apart.values())), rtol=1e-4)


def test_adam_before_its_first_step_is_not_read():
    model = quiet(tiny_llama())
    optimizer = torch.optim.AdamW(model.parameters())
    assert watch_queries(model, ["q"], query_values(model, 1), optimizer=optimizer) is None


def test_an_entry_that_never_had_a_gradient_pushes_nothing():
    parameter = nn.Parameter(torch.zeros(3, 2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.tensor([[1.0, 1.0], [0.0, 0.0], [2.0, 2.0]])
    optimizer.step()
    below = adam_denominator(optimizer, parameter, optimizer.param_groups[0])
    assert below is not None
    assert below[1].isinf().all()
    assert below[[0, 2]].isfinite().all()


@pytest.mark.parametrize("n_queries", [1, 3])
def test_truncation_keeps_what_it_says(n_queries):
    model = quiet(tiny_llama())
    (batch,) = batches(random_rows(5), 5)
    optimizer = trained(model, batch, adam=False)
    names = [f"q{k}" for k in range(n_queries)]
    whole = watch_queries(model, names, query_values(model, n_queries), optimizer=optimizer, rank=0)
    small = watch_queries(model, names, query_values(model, n_queries), optimizer=optimizer, rank=1)
    assert whole is not None
    assert small is not None
    for one, two in zip(whole.weights, small.weights, strict=True):
        if one.factors is None or two.factors is None or one.factors.features is not None:
            continue
        shape = one.module.weight.shape
        exact, near = one.factors.dense(*shape), two.factors.dense(*shape)
        kept = near.square().sum(dim=(1, 2)) / exact.square().sum(dim=(1, 2))
        torch.testing.assert_close(two.factors.kept.double(), kept, rtol=1e-4, atol=1e-6)
    assert all(a < b for a, b in zip(small.kept, whole.kept, strict=True))


@pytest.mark.parametrize("family", ["llama", "lora"])
def test_few_modules_give_nearly_the_pushes_of_all(family):
    model = quiet(FAMILIES[family]())
    (batch,) = batches(random_rows(40), 40)
    optimizer = trained(model, batch)
    watched = watch_queries(model, ["q"], query_values(model, 1), optimizer=optimizer, rank=0)
    assert watched is not None
    [(_, whole)], _, _ = read(model, watched, batch)
    bare, reader = n_hooks(model), LiveReader(model)
    reader.watch(watched, tolerance=0.2)
    found, hooked = [], []
    for _ in range(2):
        hooked.append(n_hooks(model))
        reader.open()
        losses(model, batch).sum().backward()
        passes, gauged = reader.take()
        model.zero_grad()
        found.append(settle(weigh(passes[0], [RATE], 0.5))[1])
        np.testing.assert_allclose(gauged[1], 1.0, rtol=1e-6)  # the weight that is gauged is among them
        chosen = reader.learn(passes, [RATE])
        assert (chosen is not None) == (len(found) == 1)
    reader.close()
    assert reader.problem == ""
    assert n_hooks(model) == bare
    assert hooked[1] < hooked[0]
    np.testing.assert_allclose(found[0], whole, rtol=1e-5, atol=1e-6 * np.abs(whole).max())
    missed = (found[1] - whole).std() / whole.std()
    assert 0 < missed <= 0.201
    assert found[1].mean() == pytest.approx(whole.mean(), rel=1e-3, abs=1e-6 * np.abs(whole).max())
