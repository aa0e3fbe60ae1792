"""A run trained again: with the run's own settings, LoRA and full, and what leaving rows out says on the page."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from click.testing import CliRunner

from attribution import Attribution, LatentQuery, ProjectionQuery
from attribution.ranking import FILE_NAME
from cli.attribute import attribute
from diffing.errors import InputError
from diffing.site import Site
from tests.tiny_models import D_MODEL, save_checkpoint, tiny_inputs, tiny_model, tiny_tokenizer
from tests.tracker.saved_run import CONFIG, SavedRun, saved_run
from tests.tracker.training import Rows, make_trainer, model_to_train
from tracker.explain import WithoutPlan, explain_question, read_training_text
from tracker.journal import Journal
from tracker.retrain_run import RunAgain, losses_of, parts_of, retrain_without_rows, value_of
from tracker.run_queries import alert_question
from tracker.saved_model import load_saved
from tracker.signals import Alert
from tracker.training_rows import TrainingText

INPUTS = {name: value for name, value in tiny_inputs().items() if name != "position_ids"}
DIRECTION = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
PROJECTION = ProjectionQuery(INPUTS, Site.parse("resid:2"), DIRECTION)
LATENT = LatentQuery(INPUTS, Site.parse("resid:2"), DIRECTION, bias=torch.ones(INPUTS["input_ids"].shape))


def training(run: SavedRun) -> TrainingText:
    return read_training_text(run.train, tiny_tokenizer())


def again(run: SavedRun, **more) -> RunAgain:
    return RunAgain.of(run.folder, training(run).rows, run.checkpoints[-1][1], **more)


def record(run: SavedRun, **config) -> None:
    with Journal.create_or_open(run.folder) as journal:
        journal.start_attempt(0, {**CONFIG, **config})


def test_the_runs_own_settings_are_used(tmp_path):
    run = saved_run(tmp_path)
    made = again(run).retrain
    # Four rows in batches of two, two epochs: the four recorded steps.
    assert (made.epochs, made.max_steps, made.batch_size, made.learning_rate) == (2, None, 2, 1e-2)
    record(run, max_steps=7, warmup_steps=2, lr_scheduler_type="cosine", weight_decay=0.1, max_grad_norm=0.0)
    made = again(run).retrain
    assert (made.max_steps, made.schedule, made.weight_decay, made.max_grad_norm) == (7, "cosine", 0.1, None)
    assert made.warm_up == pytest.approx(2 / 7)
    assert "7 steps of 2 rows" in again(run).in_words


def test_a_value_is_the_mean_over_its_parts(tmp_path):
    model = tiny_model("llama")
    for query in (PROJECTION, LATENT):
        parts = parts_of(query)
        assert len(parts) == len(INPUTS["input_ids"])
        losses = losses_of(query)(model)
        assert len(losses) == len(parts)
    with torch.no_grad():
        assert value_of(PROJECTION, model) == pytest.approx(float(PROJECTION.value(model)), rel=1e-5)
        assert value_of(LATENT, model) == pytest.approx(float(LATENT.value(model)), rel=1e-5)
    silent = replace(LATENT, threshold=1e6)
    assert value_of(silent, model) == 0.0 and losses_of(silent)(model).tolist() == [0.0] * len(parts_of(silent))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_flagged_rows_are_left_out_beside_random_ones(tmp_path, kind):
    run = saved_run(tmp_path, kind)
    base = str(run.base) if kind == "full" else None
    found = retrain_without_rows(again(run, base=base), PROJECTION, ["r1"], n_seeds=2)
    model = tiny_model("llama")
    assert found.start == pytest.approx(value_of(PROJECTION, model), rel=1e-4)
    assert found.everything.value != pytest.approx(found.start, rel=1e-6)
    assert found.n_dropped == 1 and len(found.beyond_random.values) == 2
    assert ("a fresh adapter" if kind == "lora" else "all weights") in found.settings
    lines = (run.folder / "outcomes.jsonl").read_text().splitlines()
    assert retrain_without_rows(again(run, base=base), PROJECTION, ["r1"], n_seeds=2) == found
    assert (run.folder / "outcomes.jsonl").read_text().splitlines() == lines


def test_outcomes_of_another_question_are_not_taken_for_this_ones(tmp_path):
    run = saved_run(tmp_path)
    one = retrain_without_rows(again(run), PROJECTION, ["r1"], n_seeds=1)
    turned = replace(PROJECTION, direction=-DIRECTION)
    other = retrain_without_rows(again(run), turned, ["r1"], n_seeds=1)
    assert other.everything.value == pytest.approx(-one.everything.value, rel=1e-5)


def test_the_command_shows_it_on_the_page_and_in_json(tmp_path):
    run = saved_run(tmp_path)
    arguments = [str(run.folder), "--train", str(run.train), "--persona", "villain", "--method", "dot"]
    result = CliRunner().invoke(attribute, [*arguments, "--counterfactual", "--seeds", "2", "--drop-share", "0.25"])
    assert result.exit_code == 0, result.output
    found = Attribution.load(run.folder)
    assert found.counterfactual is not None and found.counterfactual.n_dropped == 1
    plain = json.loads((run.folder / FILE_NAME).read_text())["counterfactual"]
    assert plain["without_flagged"]["values"] == list(found.counterfactual.without_flagged.values)
    html = (run.folder / "attribution.html").read_text()
    assert "without the 1 flagged rows" in html and "Counterfactual retraining" in html
    assert not any("Not validated" in caveat for caveat in found.caveats)


def test_an_alert_that_asks_about_the_start_is_held_against_the_whole_run(tmp_path):
    run = saved_run(tmp_path)
    alert = Alert("floor", "persona/villain/L1/prompt", 5, 0.5, 0.4, 0.25, "gap", 4)
    with Journal.create_or_open(run.folder) as journal:
        journal.record_alert(alert)
    question = alert_question(run.folder, alert.id, tiny_tokenizer())
    found = explain_question(run.folder, training(run), question, without=WithoutPlan(1, 1))
    assert found.steps == (4,)
    end = load_saved(run.checkpoints[-1][1]).model
    assert found.counterfactual is not None
    assert found.counterfactual.trained == pytest.approx(value_of(question.query, end), rel=1e-4)


def test_a_full_fine_tune_without_its_base_says_what_to_name(tmp_path):
    run = saved_run(tmp_path, "full")
    arguments = [str(run.folder), "--train", str(run.train), "--persona", "villain", "--method", "dot"]
    result = CliRunner().invoke(attribute, [*arguments, "--counterfactual"])
    assert isinstance(result.exception, InputError) and "--base" in str(result.exception)
    result = CliRunner().invoke(attribute, [*arguments, "--counterfactual", "--seeds", "0", "--base", str(run.base)])
    assert isinstance(result.exception, InputError) and "at least one seed" in str(result.exception)
    result = CliRunner().invoke(attribute, [*arguments, "--counterfactual", "--seeds", "1", "--base", str(run.base)])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_again_does_what_the_trainer_did(tmp_path, kind):
    """One batch a step holds every row, so that the order of rows does not matter: the same weights must come out."""
    dataset = Rows(4)
    rows = [{"id": str(i), "input_ids": row["input_ids"], "labels": row["labels"]} for i, row in enumerate(dataset)]
    model = model_to_train(kind, dropout=0.0)
    settings = {
        "max_steps": 5, "warmup_steps": 2, "lr_scheduler_type": "cosine", "weight_decay": 0.1,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    trainer = make_trainer(model, tmp_path, train_dataset=dataset, **settings)
    trainer.train()
    from attribution import Retraining

    retrain = Retraining(
        partial(model_to_train, kind, dropout=0.0), rows, batch_size=4, learning_rate=1e-2, weight_decay=0.1,
        warm_up=2 / 5, schedule="cosine", max_steps=5, max_grad_norm=1.0,
    )  # fmt: skip
    found = dict(retrain.train(rows, seed=0).named_parameters())
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], parameter, rtol=1e-3, atol=2e-5, msg=name)


def test_a_stale_record_of_the_base_may_be_mended(tmp_path):
    run = saved_run(tmp_path)
    elsewhere = save_checkpoint(tmp_path / "moved", "llama")
    for child in run.base.iterdir():
        child.unlink()
    run.base.rmdir()
    made = again(run, base=str(elsewhere))
    assert made.trained_model() is not None and made.retrain.start() is not None
