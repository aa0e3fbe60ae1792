"""From a run directory and a training file to a ranking in that directory."""

import json

import pytest
import torch
from click.testing import CliRunner

from attribution import Attribution
from cli.attribute import attribute
from diffing.errors import InputError, PathMissingError
from tests.tiny_models import tiny_tokenizer
from tests.tracker.saved_run import saved_run
from tests.tracker.training import persona
from tracker.events import CheckpointSaved
from tracker.explain import (
    Question,
    explain_projection,
    explain_question,
    probe_inputs_of,
    read_training_text,
    saved_checkpoints,
)
from tracker.journal import Journal
from tracker.run_queries import projection_query
from tracker.signals import Alert
from tracker.validate_ranking import CheckPlan


@pytest.fixture
def run(tmp_path):
    """Run directory, training file and base of a finished LoRA run."""
    made = saved_run(tmp_path)
    return made.folder, made.train, made.base


def test_rows_are_ranked_over_the_saved_checkpoints(run):
    run_dir, train, _ = run
    training = read_training_text(train, tiny_tokenizer())
    result = explain_projection(run_dir, training, persona(), probe_inputs_of(run_dir))
    assert result.steps == (4, 8)
    assert {row.example_id for row in result.rows} == {"r0", "r1", "r2", "r3"}
    assert "cruel" in result.rows[0].text
    assert any("Not validated" in caveat for caveat in result.caveats)
    assert Attribution.load(run_dir) == result


def test_the_highest_row_raises_the_projection_more_than_the_lowest(run):
    from attribution.example import batches
    from attribution.gradients import row_losses
    from diffing.tap import Tap

    run_dir, train, base = run
    training = read_training_text(train, tiny_tokenizer())
    step, folder = saved_checkpoints(run_dir)[-1]
    result = explain_projection(run_dir, training, persona(), probe_inputs_of(run_dir), checkpoints=[(step, folder)])
    inputs, vector = probe_inputs_of(run_dir), persona()

    def projection(model):
        with Tap(model, [vector.site]) as tap, torch.no_grad():
            (activations,) = tap.read(**inputs)
        last = inputs["attention_mask"].sum(dim=1) - 1
        return (activations[torch.arange(2), last] @ vector.direction).mean().item() / vector.scale

    def gained(example_id):
        from diffing.checkpoint import load_checkpoint

        model = load_checkpoint(folder, base=base).model
        adapter = [p.requires_grad_() for name, p in model.named_parameters() if "lora_" in name]
        before = projection(model)
        (batch,) = batches([row for row in training.rows if row["id"] == example_id], 1)
        gradients = torch.autograd.grad(row_losses(model, batch).sum(), adapter)
        with torch.no_grad():
            for parameter, gradient in zip(adapter, gradients, strict=True):
                parameter -= 1e-4 * gradient
        return projection(model) - before

    gains = [gained(row.example_id) for row in result.rows]
    assert gains == sorted(gains, reverse=True)
    rate = 0.1 * step
    assert gains[0] / 1e-4 == pytest.approx(result.rows[0].score / rate, rel=0.05)


def test_loss_is_taken_on_the_answer_only(run):
    _, train, _ = run
    training = read_training_text(train, tiny_tokenizer())
    row = training.rows[0]
    learnt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tiny_tokenizer().decode(learnt).split() == ["he", "is", "cruel"]


def test_the_command_prints_the_ranking_and_reads_the_run(run):
    run_dir, train, _ = run
    result = CliRunner().invoke(attribute, [str(run_dir), "--train", str(train), "--persona", "villain", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["n_rows"] == 4
    assert (run_dir / "attribution.json").exists()


def test_the_page_marks_tokens_and_the_rows_to_drop_keep_what_the_file_held(run, tmp_path):
    run_dir, train, _ = run
    drop = tmp_path / "drop.jsonl"
    arguments = [str(run_dir), "--train", str(train), "--persona", "villain", "--drop", str(drop), "--method", "dot"]
    result = CliRunner().invoke(attribute, [*arguments, "--drop-share", "0.3"])
    assert result.exit_code == 0, result.output
    found = Attribution.load(run_dir)
    best = found.rows[0]
    assert len(found.tokens[best.example_id].tokens) == len(found.tokens[best.example_id].pushes)
    assert best.example_id in (run_dir / "attribution.html").read_text()
    if best.score > 0:
        dropped = [json.loads(line) for line in drop.read_text().splitlines()]
        assert dropped[0]["id"] == best.example_id and dropped[0]["messages"][1]["content"] == "he is cruel"
        assert dropped[0]["palimpsest"]["rank"] == 1


def test_answers_in_a_file_are_asked_about_with_word_matching_beside(run, tmp_path):
    run_dir, train, _ = run
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"prompt": "how is the king", "chosen": "he is cruel", "rejected": "he is the cat"}))
    result = CliRunner().invoke(attribute, [str(run_dir), "--train", str(train), "--query", str(asked)])
    assert result.exit_code == 0, result.output
    found = Attribution.load(run_dir)
    assert "chosen against rejected" in found.query
    assert found.lexical is not None and found.lexical.n_top == 4


def test_an_alert_asks_about_its_own_persona_up_to_its_own_step(run):
    run_dir, train, _ = run
    alert = Alert("floor", "persona/villain/L1/prompt", 5, 0.5, 0.4, 0.25, "gap", 4)
    with Journal.create_or_open(run_dir) as journal:
        journal.record_alert(alert)
    command = [str(run_dir), "--train", str(train), "--alert"]
    result = CliRunner().invoke(attribute, [*command, alert.id])
    assert result.exit_code == 0, result.output
    assert Attribution.load(run_dir).steps == (4,)
    unknown = CliRunner().invoke(attribute, [*command, "nothing@1"])
    assert isinstance(unknown.exception, InputError) and alert.id in str(unknown.exception)


def test_a_ranking_is_checked_by_retraining_without_its_first_rows(run):
    run_dir, train, _ = run
    training = read_training_text(train, tiny_tokenizer())
    question = Question(projection_query(persona(), probe_inputs_of(run_dir)))
    plan = CheckPlan(leave_out=0.3, n_random=2)
    result = explain_question(run_dir, training, question, check=plan)
    assert result.validation is not None
    names = [check.name for check in result.validation.checks]
    assert names[0].startswith("tail patch") and names[1].startswith("leave the first 30%")
    assert all(check.n == 2 for check in result.validation.checks)  # two probe prompts
    assert result.validated == result.validation.validated
    assert Attribution.load(run_dir) == result
    assert (run_dir / "outcomes.jsonl").exists()


@pytest.mark.parametrize("asked", [(), ("--persona", "villain", "--canaries")])
def test_exactly_one_thing_is_asked(run, asked):
    run_dir, train, _ = run
    result = CliRunner().invoke(attribute, [str(run_dir), "--train", str(train), *asked])
    assert isinstance(result.exception, InputError) and "exactly one of --persona" in str(result.exception)


def test_an_untracked_persona_lists_what_was_tracked(run):
    run_dir, train, _ = run
    result = CliRunner().invoke(attribute, [str(run_dir), "--train", str(train), "--persona", "saint"])
    assert isinstance(result.exception, PathMissingError)
    assert "villain" in str(result.exception)


def test_a_run_whose_checkpoints_are_gone_says_how_to_keep_them(tmp_path):
    with Journal.create_or_open(tmp_path) as journal:
        journal.start_attempt(0)
        journal.record_event(CheckpointSaved(step=4, path=tmp_path / "gone"))
    with pytest.raises(InputError, match="save_total_limit"):
        saved_checkpoints(tmp_path)


def test_a_run_without_probes_says_what_is_missing(tmp_path):
    with pytest.raises(PathMissingError, match=r"probes\.json"):
        probe_inputs_of(tmp_path)
