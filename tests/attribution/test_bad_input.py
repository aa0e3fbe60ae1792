"""Bad input explains itself in one line, before the work starts: what issue reports would otherwise be about."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
import torch
from torch import nn

from attribution import Identity, prepare_rows, write_scores
from attribution.fit import fit_curvature
from attribution.influence import influence, score_query
from attribution.queries import CompletionQuery, ProjectionQuery
from diffing.errors import InputError, StoreFullError
from diffing.site import Site
from tests.attribution.models import random_rows, tiny_llama, tiny_lora


def one_line(caught: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Scaled(nn.Module):
    """A model whose only trained parameter no module of its own uses: nothing tells its rows apart."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_llama().requires_grad_(False)
        self.config = self.inner.config
        self.temperature = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, **inputs):
        found = self.inner(**inputs)
        found.logits = found.logits * self.temperature
        return found


def test_a_model_that_trains_only_what_cannot_be_read_lists_it_with_the_share_covered():
    with pytest.raises(InputError, match="trainable here is temperature") as caught:
        influence(Scaled(), random_rows(2), random_rows(1))
    assert "0 %" in one_line(caught)


def test_a_frozen_model_says_that_everything_is_frozen():
    with pytest.raises(InputError, match="every parameter is frozen") as caught:
        influence(tiny_llama().requires_grad_(False), random_rows(2), random_rows(1))
    assert "requires_grad_" in one_line(caught)


def poison(model: nn.Module, row: dict) -> None:
    """Gradients of this row turn NaN on their way through the last block, while its loss stays finite."""
    last = torch.tensor(row["input_ids"])

    def remember(module, args, kwargs):
        ids = kwargs["input_ids"]
        model.poisoned = torch.tensor([one.tolist()[:6] == last.tolist()[:6] for one in ids])

    def spoil(module, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad and len(model.poisoned) == len(hidden):
            hidden.register_hook(lambda grad: torch.where(model.poisoned[:, None, None], float("nan"), grad))

    model.register_forward_pre_hook(remember, with_kwargs=True)
    model.model.layers[-1].register_forward_hook(spoil)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_row_with_a_nan_gradient_is_named(batch_size):
    model, rows = tiny_llama(), random_rows(5, shortest=9, longest=9)
    poison(model, rows[3])
    for work in (
        lambda: influence(model, rows, random_rows(1, seed=8), method="dot", batch_size=batch_size),
        lambda: fit_curvature(model, rows, labels="data", batch_size=batch_size),
    ):
        with pytest.raises(InputError, match="finite gradient for every row; row row-3 gives nan") as caught:
            work()
        one_line(caught)


@pytest.mark.parametrize("make", [tiny_llama, tiny_lora])
def test_a_query_without_a_finite_gradient_is_named(make):
    model = make()
    query = CompletionQuery(random_rows(1, seed=8), name="the query")
    model.register_forward_hook(
        lambda module, inputs, output: output.__setitem__("logits", output.logits * float("inf"))
    )
    with pytest.raises(InputError, match="finite") as caught:
        score_query(model, random_rows(2), [query])
    assert "the query" in one_line(caught)


def test_a_query_of_a_broken_checkpoint_is_named():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0] = float("nan")
    inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    direction = torch.ones(8, dtype=torch.float64)
    query = ProjectionQuery(inputs, Site.parse("resid:1"), direction, name="projection on evil")
    with pytest.raises(InputError, match="projection on evil") as caught:
        score_query(model, random_rows(2), [query])
    one_line(caught)


def test_a_disk_too_small_for_scores_is_said_before_anything_is_scored(tmp_path, monkeypatch):
    scorer = prepare_rows(tiny_llama(), random_rows(2, seed=1), curvature=Identity())
    monkeypatch.setattr(type(scorer), "scores", lambda *_: pytest.fail("scoring had begun"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(StoreFullError, match="nothing was started") as caught:
        write_scores(scorer, random_rows(6), tmp_path / "scores")
    one_line(caught)
    assert not (tmp_path / "scores" / "scores.json").exists()
