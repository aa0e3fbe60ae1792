"""Is training steered as asked, nothing else, whatever the settings of training, and over a resume?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

from diffing.errors import CaptureError, InputError, PersonaError
from diffing.intervene import Add, Intervention
from diffing.persona.steering import PersonaSteering
from tests.tracker.training import (
    Rows,
    collate,
    differences,
    everything,
    make_trainer,
    model_to_train,
    n_hooks,
    no_report,  # noqa: F401
    persona,
    quick_settings,
    series,
)
from tracker import CheckpointTracker, track
from tracker.events import InterventionChanged
from tracker.interventions import intervention_spans
from tracker.journal import Journal
from tracker.preventive import PreventiveSteering
from tracker.training_edits import TrainingEdits

VECTORS = (persona("villain", 1, seed=1), persona("villain", 2, seed=2))
STEERING = PreventiveSteering(VECTORS, strength=3.0)
QUIET = quick_settings(canaries=(), personas=(), probe_prompts=None)


def _differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    # The type checker of the tests draws from Python's generator to choose what it looks at.
    return [name for name in differences(left, right) if name != "python random"]


def _train(folder: Path, kind: str = "full", *, callbacks: list[Any] | None = None, **options: Any) -> dict[str, Any]:
    trainer = make_trainer(model_to_train(kind, dropout=0.0), folder, callbacks or [], **options)
    trainer.train()
    return everything(trainer)


def _tracked(folder: Path, kind: str = "full", *, steering: Any = STEERING, more: Any = None, **options: Any) -> Any:
    callback = CheckpointTracker(folder / "run", **{**QUIET, **(more or {}), "intervention": steering})
    return _train(folder / "out", kind, callbacks=[callback], **options)


class _Always(TrainerCallback):
    """An oracle: the same change by the inference hooks, open for the whole of each step."""

    def __init__(self) -> None:
        self._open: Intervention | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        edits = PersonaSteering(VECTORS, strength=3.0, tokens="all").edits()
        self._open = Intervention(kwargs["model"], edits)
        self._open.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._open is not None
        self._open.__exit__(None, None, None)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_steered_training_is_training_with_the_change_in_its_passes(kind: str, tmp_path: Path) -> None:
    expected = _train(tmp_path / "oracle", kind, callbacks=[_Always()])
    got = _tracked(tmp_path, kind)
    assert _differences(expected, got) == []
    assert _differences(_train(tmp_path / "plain", kind), got) != []


OPTIONS: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointing": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": Rows(4)},
}


@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning")
@pytest.mark.parametrize("tokens", ["all", "response"])
@pytest.mark.parametrize("case", ["checkpointing", "reentrant", "evaluation"])
def test_checkpointing_and_evaluation_do_not_change_what_is_learnt(case: str, tokens: str, tmp_path: Path) -> None:
    steering = PreventiveSteering(VECTORS, strength=3.0, tokens=tokens)
    plain = _tracked(tmp_path / "plain", steering=steering)
    got = _tracked(tmp_path / case, steering=steering, **OPTIONS[case])
    for name, value in plain.items():
        if name.startswith("weight"):
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


def test_steering_the_answer_differs_from_steering_all_and_half_precision_runs(tmp_path: Path) -> None:
    runs = [
        _tracked(tmp_path / tokens, steering=PreventiveSteering(VECTORS, strength=3.0, tokens=tokens), max_steps=2)
        for tokens in ("all", "response")
    ]
    assert _differences(*runs) != []
    half = _tracked(tmp_path / "bf16", bf16=True, max_steps=2, **OPTIONS["accumulation"])
    assert all(torch.isfinite(value).all() for name, value in half.items() if name.startswith("weight"))


@pytest.mark.parametrize(
    "steering", [PreventiveSteering(VECTORS, from_step=None), PreventiveSteering(VECTORS, strength=0.0)]
)
def test_what_is_not_engaged_leaves_training_to_the_last_bit(steering: PreventiveSteering, tmp_path: Path) -> None:
    expected = _train(tmp_path / "plain")
    assert _differences(expected, _tracked(tmp_path, steering=steering)) == []


def test_probes_see_the_model_as_it_is(tmp_path: Path) -> None:
    """Nothing is learnt at a learning rate of 0, so that every point must be the first one, which is not steered."""
    more = quick_settings(schedule="every 1")
    _tracked(tmp_path, more=more, steering=PreventiveSteering(VECTORS, strength=9.0), learning_rate=0.0, max_steps=2)
    found = series(Journal.read(tmp_path / "run").signals())
    for name in ("persona/villain/L2/prompt", "misalignment/canary"):
        assert len(found[name]) == 3 and len({value for _, value, *_ in found[name]}) == 1


def test_generation_and_evaluation_inside_a_step_are_not_steered(tmp_path: Path) -> None:
    model = model_to_train(dropout=0.0)
    ids = torch.tensor([[8, 9, 10, 11]])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    running = STEERING.start(model)
    running.engage(0)
    running.begin_step(0)
    model.train()
    steered = model(input_ids=ids).logits
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain)
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, plain)
    running.end_step()
    model.train()
    assert torch.equal(model(input_ids=ids).logits, plain) and not torch.allclose(steered, plain, atol=1e-2)
    running.close()
    assert n_hooks(model) == 0


@pytest.mark.parametrize("kill_at", [2, 4])
def test_a_resumed_run_goes_on_with_it_and_ends_as_if_never_stopped(kill_at: int, tmp_path: Path) -> None:
    steering = PreventiveSteering(VECTORS, strength=((0, 3.0), (4, 1.0)), from_step=1, until_step=5)
    whole = _tracked(tmp_path / "whole", steering=steering, save_strategy="steps", save_steps=2)
    folder = tmp_path / "parts"

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == kill_at + 1:
                raise KeyboardInterrupt

    def trainer(extra: list[Any]) -> Any:
        callback = CheckpointTracker(folder / "run", **QUIET, intervention=steering)
        model = model_to_train(dropout=0.0)
        return make_trainer(model, folder / "out", [callback, *extra], save_strategy="steps", save_steps=2)

    with pytest.raises(KeyboardInterrupt):
        trainer([Kill()]).train()
    resumed = trainer([])
    resumed.train(resume_from_checkpoint=True)
    assert _differences(whole, everything(resumed)) == []
    for run in (tmp_path / "whole" / "run", folder / "run"):
        (span,) = intervention_spans(run)
        assert (span.start, span.stop, span.reason, span.ended_by) == (1, 5, "planned", "planned")
        assert span.settings["strength"] == [[0, 3.0], [4, 1.0]] and "villain resid:1" in str(span)


class _Switch(TrainerCallback):
    """Asks for the intervention in the middle of a run, as an alert will."""

    def __init__(self, tracker: CheckpointTracker, on: int, off: int | None = None) -> None:
        self.callback, self.on, self.off = tracker, on, off

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.on:
            self.callback.tracker.engage("alert 7")
        if state.global_step == self.off:
            self.callback.tracker.release()


def test_it_is_switched_on_and_off_in_the_middle_of_a_run(tmp_path: Path) -> None:
    """Switched on by hand at a step and off at another: the run that had it planned so."""
    planned = _tracked(tmp_path / "planned", steering=PreventiveSteering(VECTORS, from_step=2, until_step=4))
    callback = CheckpointTracker(tmp_path / "run", **QUIET, intervention=PreventiveSteering(VECTORS, from_step=None))
    switch = _Switch(callback, 2, 4)
    switched = _train(tmp_path / "out", callbacks=[callback, switch])
    assert _differences(planned, switched) == []
    events = [event for event in Journal.read(tmp_path / "run").events() if isinstance(event, InterventionChanged)]
    assert [(event.step, event.engaged, event.reason) for event in events] == [
        (2, True, "alert 7"),
        (4, False, "asked"),
    ]
    with pytest.raises(InputError, match="given an intervention"):
        callback.tracker.engage()


def test_a_loop_of_ones_own_is_steered_from_the_step_it_asks_at(tmp_path: Path) -> None:
    model, rows = model_to_train(dropout=0.0), [Rows()[index] for index in range(4)]
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.0), []
    settings = {**QUIET, "intervention": PreventiveSteering(VECTORS, strength=3.0, from_step=None)}
    with track(model, output_dir=tmp_path / "run", **settings) as tracker:
        for step in range(1, 5):
            loss = model(**collate(rows)).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            tracker.step(step)
            if step == 2:
                tracker.tracker.engage()
    assert losses[0] == losses[1] != losses[2] == losses[3]
    assert [span.start for span in intervention_spans(tmp_path / "run")] == [2]


def test_ablation_to_the_mean_leaves_no_gradient_along_the_persona(tmp_path: Path) -> None:
    model = model_to_train(dropout=0.0)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    running = PreventiveSteering(VECTORS[:1], operation="mean_ablate", strength=1.0).start(model)
    running.engage(0)
    running.begin_step(0)
    model.train()
    model(**collate([Rows()[0], Rows()[1]])).loss.backward()
    running.close()
    direction = VECTORS[0].direction
    gradient = model.model.layers[1].mlp.down_proj.weight.grad
    assert float((direction @ gradient).norm()) < 1e-5 * float(gradient.norm())


class Checkpointed(nn.Module):
    """Blocks whose whole call, hooks included, is computed again in the backward pass."""

    def __init__(self, *, again: bool) -> None:
        super().__init__()
        self.table, self.again = nn.Embedding(96, 8), again
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
        return x.square().sum()


def test_layers_computed_again_are_changed_again_and_never_as_in_another_pass() -> None:
    batches = [torch.tensor([[8, 9, 10]]), torch.tensor([[11, 12, 13]])]
    labels = [torch.tensor([[-100, -100, 10]]), torch.tensor([[-100, 12, 13]])]
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        model = Checkpointed(again=again)
        edits = TrainingEdits(model, ["blocks.0"], tokens="response")
        edits.open([Add(3.0 * torch.ones(8))])
        for ids, known in zip(batches, labels, strict=True):
            model(ids, labels=known).backward()
        gradients.append(model.blocks[0][0].weight.grad)
        edits.shut()
    assert torch.equal(*gradients)
    edits.open([Add(3.0 * torch.ones(8))])
    both = torch.stack([model(ids, labels=known) for ids, known in zip(batches, labels, strict=True)]).sum()
    with pytest.raises(CaptureError, match="checkpointing"):
        both.backward()


def test_what_cannot_be_done_is_refused_in_the_first_second(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="operation"):
        PreventiveSteering(VECTORS, operation="cap")
    with pytest.raises(InputError, match="until_step"):
        PreventiveSteering(VECTORS, from_step=5, until_step=5)
    with pytest.raises(InputError, match="ascending"):
        PreventiveSteering(VECTORS, strength=((4, 1.0), (2, 2.0)))
    with pytest.raises(InputError, match="0 to 1"):
        PreventiveSteering(VECTORS, operation="mean_ablate", strength=2.0)
    wide = PreventiveSteering((persona(d_model=16),))
    with pytest.raises(PersonaError, match="width"):
        _tracked(tmp_path, steering=wide)
    with pytest.raises(InputError, match=r"torch\.compile"):
        tracker = CheckpointTracker(tmp_path / "compiled", **QUIET, intervention=STEERING).tracker
        tracker.start(model_to_train(), compiled=True)
    path = VECTORS[0].save(tmp_path / "one.safetensors")
    assert PreventiveSteering((path,)).loaded().vectors[0].digest == VECTORS[0].digest
    model: nn.Module = model_to_train(dropout=0.0)
    running = PreventiveSteering(VECTORS, tokens="response").start(model)
    running.engage(0)
    running.begin_step(0)
    with pytest.raises(CaptureError, match="labels"):
        model(input_ids=torch.tensor([[8, 9]]))
