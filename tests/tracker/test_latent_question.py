"""A latent of a diff is asked about: the right number, on the right run, with rows credited before its birth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from attribution import Attribution
from cli.attribute import attribute
from diffing.checkpoint import load_checkpoint
from diffing.errors import ComparabilityError, InputError, PathMissingError
from diffing.provenance import Provenance
from diffing.tap import Tap
from tests.diffing.example_fit import make_fit
from tests.example_diff import example_diff
from tests.tiny_models import D_MODEL, save_checkpoint, tiny_tokenizer
from tests.tracker.saved_run import SavedRun, saved_run
from tracker.latent_question import latent_question, read_latent_texts
from tracker.saved_model import load_saved

N_LATENTS, SITE = 24, "resid:2"


def save_diff(run: SavedRun, *, step: int = 8, base: Path | None = None, d_model: int = D_MODEL) -> Path:
    """A diff of the run's base and one of its checkpoints, with a made-up crosscoder that fires on these models."""
    (tuned,) = (load_saved(folder, base=run.base) for at, folder in run.checkpoints if at == step)
    before = load_checkpoint(base or run.base)
    folder = run.folder / "diff"
    fingerprints = {"base": before.fingerprint, "tuned": tuned.fingerprint}
    made = replace(example_diff(n_latents=N_LATENTS), site=SITE, provenance=Provenance(models=fingerprints))
    made.save(folder)
    fit = make_fit(n_latents=N_LATENTS, d_model=d_model)
    replace(fit, mean=torch.zeros_like(fit.mean), encoder_bias=torch.zeros(N_LATENTS)).save(folder / "crosscoder")
    return folder


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_query_is_the_crosscoders_own_mean_activation_with_the_base_held_still(tmp_path, kind):
    run = saved_run(tmp_path, kind)
    diff = save_diff(run)
    texts = read_latent_texts(run.folder, run.train, tiny_tokenizer())
    fit = make_fit(n_latents=N_LATENTS, d_model=D_MODEL)
    fit = replace(fit, mean=torch.zeros_like(fit.mean), encoder_bias=torch.zeros(N_LATENTS))
    question = latent_question(run.checkpoints, diff, 3, texts, base=run.base)
    assert question.until == 8 and "latent 3 (rotated)" in question.query.name
    before, tuned = load_checkpoint(run.base), load_saved(run.checkpoints[1][1], base=run.base)
    total, n_tokens, n_firing = 0.0, 0, 0
    for ids in texts.input_ids:
        sides = []
        for side in (before, tuned):
            with side.active() as model, torch.no_grad(), Tap(model, [SITE]) as tap:
                sides.append(tap.read(input_ids=torch.tensor([ids]))[0][0])
        found = fit.encode(tuple(sides))[1:, 3]
        if found.any():
            total, n_tokens, n_firing = total + float(found.sum()), n_tokens + len(ids), n_firing + 1
    assert 0 < n_firing == len(question.query.inputs["input_ids"])
    with tuned.active() as model:
        value = float(question.query.value(model).detach())
        assert value == pytest.approx(total / n_tokens, rel=1e-4)


def test_a_latent_that_is_silent_still_has_a_gradient_towards_its_birth(tmp_path):
    run = saved_run(tmp_path)
    diff = save_diff(run)
    texts = read_latent_texts(run.folder, run.train, tiny_tokenizer())
    query = latent_question(run.checkpoints, diff, 3, texts).query
    unborn = replace(query, bias=query.bias - 1e3)
    model = load_saved(run.checkpoints[0][1]).model
    model.requires_grad_(True)
    (gradient,) = torch.autograd.grad(unborn.value(model), [model.get_input_embeddings().weight])
    assert gradient.norm() > 0
    assert unborn.mean_activation(model) == 0
    with pytest.raises(InputError, match="silent on all"):
        replace(unborn, firing=None).value(model)


def test_the_command_ranks_rows_for_a_latent_up_to_the_diffs_own_checkpoint(tmp_path):
    run = saved_run(tmp_path)
    save_diff(run, step=4)
    arguments = [str(run.folder), "--train", str(run.train), "--latent", "3", "--prompts", str(run.train)]
    result = CliRunner().invoke(attribute, [*arguments, "--method", "dot", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["steps"] == [4] and "latent 3" in found["query"] and found["lexical"]["n_top"] == 4
    assert Attribution.load(run.folder).n_rows == 4
    assert "latent 3" in (run.folder / "attribution.html").read_text()


def asked(run: SavedRun, *more: str) -> Exception | None:
    result = CliRunner().invoke(attribute, [str(run.folder), "--train", str(run.train), *more])
    assert result.exception is None or "\n" not in str(result.exception)
    return result.exception


def test_what_cannot_be_asked_says_so_in_one_line(tmp_path):
    run = saved_run(tmp_path)
    missing = asked(run, "--latent", "3")
    assert isinstance(missing, PathMissingError) and "palimpsest diff" in str(missing)
    diff = save_diff(run)
    none = asked(run, "--latent", "99")
    assert isinstance(none, InputError) and "latent below 24" in str(none)
    lost = asked(run, "--persona", "villain", "--diff", str(diff))
    assert isinstance(lost, InputError) and "--diff together with --latent" in str(lost)
    silent = replace(make_fit(n_latents=N_LATENTS, d_model=D_MODEL), gate=torch.full((N_LATENTS,), 1e6))
    silent.save(diff / "crosscoder")
    quiet = asked(run, "--latent", "3")
    assert isinstance(quiet, InputError) and "silent on all" in str(quiet) and "--prompts" in str(quiet)


def test_a_diff_of_other_checkpoints_is_refused(tmp_path):
    run = saved_run(tmp_path)
    diff = save_diff(run, base=save_checkpoint(tmp_path / "other", "llama", seed=5))
    other = asked(run, "--latent", "3")
    assert isinstance(other, ComparabilityError) and "what this run started from" in str(other)
    made = example_diff(n_latents=N_LATENTS)
    replace(made, site=SITE, provenance=Provenance(models={"base": "a" * 64, "tuned": "b" * 64})).save(diff)
    other = asked(run, "--latent", "3")
    assert isinstance(other, ComparabilityError) and "one of this run's checkpoints (steps 4, 8)" in str(other)


def test_a_crosscoder_of_another_width_is_refused(tmp_path):
    run = saved_run(tmp_path)
    save_diff(run, d_model=16)
    wide = asked(run, "--latent", "3")
    assert isinstance(wide, ComparabilityError) and f"width {D_MODEL}" in str(wide)


def test_a_full_fine_tune_must_be_told_its_base(tmp_path):
    run = saved_run(tmp_path, "full")
    save_diff(run)
    assert "--base" in str(asked(run, "--latent", "3"))
