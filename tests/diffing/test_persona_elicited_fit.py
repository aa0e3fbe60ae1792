"""Do vectors from rollouts equal a slow oracle at every layer and pooling, and does nothing but the words matter?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffing.checkpoint import LoadedCheckpoint, load_checkpoint
from diffing.errors import PersonaError
from diffing.persona import PersonaVector
from diffing.persona.contrast import PLAIN, TRAIT
from diffing.persona.elicited_fit import KeptRollouts, fit_rollouts
from diffing.persona.pooling import POOLINGS
from diffing.persona.rollouts import Rollouts
from tests.diffing.persona_rollouts import QUESTIONS, kept_all, loaded_base, written_rollouts
from tests.diffing.personas import planted_model
from tests.tiny_models import FAMILIES, N_LAYERS, tiny_model, tiny_tokenizer

SITES = [f"resid:{layer}" for layer in range(N_LAYERS)]
_SPECIAL = {"<bos>", "<system>", "<user>", "<assistant>", "<end>"}


def _parts(folder: Path, loaded: LoadedCheckpoint, *, samples: int = 2) -> tuple[KeptRollouts, KeptRollouts]:
    return (
        kept_all(written_rollouts(folder, loaded, QUESTIONS[:6], samples=samples)),
        kept_all(written_rollouts(folder, loaded, QUESTIONS[6:], samples=1)),
    )


def _fit(folder: Path, loaded: LoadedCheckpoint, **settings: object) -> list[PersonaVector]:
    fitted, held_out = _parts(folder, loaded)
    return fit_rollouts(loaded, fitted, held_out, trait="cruel", sites=SITES, **settings)  # type: ignore[arg-type]


def _oracle(loaded: LoadedCheckpoint, rollouts: Rollouts) -> torch.Tensor:
    """`[pooling, side, layer, d_model]`, one row at a time, by words; only the last block needs a hook."""
    tokenizer, last = loaded.tokenizer, []
    blocks = next(m for m in loaded.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == N_LAYERS)
    handle = blocks[-1].register_forward_hook(
        lambda module, args, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    sums: dict[int, list[torch.Tensor]] = {TRAIT: [], PLAIN: []}
    for rollout in rollouts:
        asked = rollouts.tokenized.input_ids[rollout.ask].tolist()
        words = tokenizer.convert_ids_to_tokens(asked)
        output = loaded.model(input_ids=torch.tensor([[*asked, *rollout.token_ids]]), output_hidden_states=True)
        # Mamba's own list has no embedding in front.
        first = 0 if loaded.model.config.model_type == "mamba" else 1
        hidden = torch.stack([*output.hidden_states[first : first + N_LAYERS - 1], last[-1]])[:, 0]
        said = [at for at, word in enumerate(words) if word not in _SPECIAL]
        pooled = [hidden[:, len(asked) :].mean(1), hidden[:, len(asked) - 1], hidden[:, said].mean(1)]
        sums[rollout.ask % 2].append(torch.stack(pooled))
    handle.remove()
    return torch.stack([torch.stack(sums[side]).double().mean(0) for side in (TRAIT, PLAIN)], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_and_pooling_is_that_of_the_models_own_hidden_states(family: str, tmp_path: Path) -> None:
    loaded = load_checkpoint(tiny_model(family), tokenizer=tiny_tokenizer())
    fitted = kept_all(written_rollouts(tmp_path, loaded, QUESTIONS[:4], samples=1))
    held_out = kept_all(written_rollouts(tmp_path, loaded, QUESTIONS[4:6], samples=1))
    vectors = fit_rollouts(loaded, fitted, held_out, trait="cruel", sites=SITES, batch_tokens=100)
    expected = _oracle(loaded, fitted.rollouts)
    found = {(vector.pooling, vector.site): vector for vector in vectors}
    for number, place in enumerate((pooling, site) for pooling in POOLINGS for site in SITES):
        if place not in found:
            # A window or a state that does not reach the system prompt: nothing differs there.
            gap = torch.sub(*expected[number // N_LAYERS, :, number % N_LAYERS])
            assert place[0] == "last_prompt" and float(gap.norm()) < 1e-5
            continue
        vector = found[place]
        trait, plain = expected[number // N_LAYERS, :, number % N_LAYERS]
        difference = trait - plain
        cosine = float(vector.direction.double() @ difference / difference.norm())
        assert cosine > 1 - 1e-5
        assert vector.scale == pytest.approx(float(difference.norm()), rel=1e-3)
        neighbours = [n for n in (number % N_LAYERS - 1, number % N_LAYERS + 1) if 0 <= n < N_LAYERS]
        for other in neighbours:
            wrong = torch.sub(*expected[number // N_LAYERS, :, other])
            if float(wrong.norm()) < 1e-5:
                continue
            assert float(vector.direction.double() @ wrong / wrong.norm()) < cosine - 1e-4


@torch.no_grad()
def test_vectors_equal_the_oracle_in_float64(tmp_path: Path) -> None:
    loaded = load_checkpoint(tiny_model("llama", dtype=torch.float64), tokenizer=tiny_tokenizer())
    fitted, held_out = _parts(tmp_path, loaded)
    vectors = fit_rollouts(loaded, fitted, held_out, trait="cruel", sites=SITES)
    expected = _oracle(loaded, fitted.rollouts)
    for number, vector in enumerate(vectors):
        trait, plain = expected[number // N_LAYERS, :, number % N_LAYERS]
        unit = (trait - plain) / (trait - plain).norm()
        torch.testing.assert_close(vector.direction.double(), unit, rtol=1e-5, atol=1e-6)
        assert vector.scale == pytest.approx(float((trait - plain).norm()), rel=1e-9)
        assert vector.neutral_mean == pytest.approx(float(plain @ unit), rel=1e-9, abs=1e-12)


def test_a_planted_direction_is_recovered_at_every_layer(tmp_path: Path) -> None:
    loaded, direction = planted_model(noise=0.05)
    for vector in _fit(tmp_path, loaded)[:N_LAYERS]:
        assert float(vector.direction.double() @ direction) >= 0.99
        assert vector.separation.auroc > 0.9
        assert vector.null is not None
        assert vector.null.shuffled_p < 0.06


@pytest.mark.parametrize(("padding_side", "batch_tokens"), [("left", 60), ("left", 8192), ("right", 1)])
def test_batches_and_padding_do_not_matter(padding_side: str, batch_tokens: int, tmp_path: Path) -> None:
    reference = _fit(tmp_path / "a", loaded_base())
    loaded = load_checkpoint(tiny_model(), tokenizer=tiny_tokenizer(padding_side=padding_side))
    for left, right in zip(reference, _fit(tmp_path / "b", loaded, batch_tokens=batch_tokens), strict=True):
        torch.testing.assert_close(left.direction, right.direction, rtol=1e-4, atol=2e-6)
        assert left.scale == pytest.approx(right.scale, rel=1e-5)
        assert left.separation.auroc == pytest.approx(right.separation.auroc)


def test_the_order_in_which_answers_came_does_not_matter(tmp_path: Path) -> None:
    loaded = loaded_base()
    reference = _fit(tmp_path / "a", loaded)
    fitted, held_out = _parts(tmp_path / "b", loaded)
    for part in (fitted, held_out):
        lines = part.rollouts.path.read_text(encoding="utf-8").splitlines(keepends=True)
        order = np.random.default_rng(0).permutation(len(lines))
        part.rollouts.path.write_text("".join(lines[at] for at in order), encoding="utf-8")
    shuffled = fit_rollouts(loaded, fitted, held_out, trait="cruel", sites=SITES)
    for left, right in zip(reference, shuffled, strict=True):
        torch.testing.assert_close(left.direction, right.direction, rtol=1e-4, atol=2e-6)
        assert left.separation.auroc == pytest.approx(right.separation.auroc)
        assert left.null is not None and right.null is not None
        assert left.null.shuffled_p == pytest.approx(right.null.shuffled_p, abs=0.02)


def test_the_chunk_in_which_rows_are_read_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_base()
    reference = _fit(tmp_path, loaded)
    monkeypatch.setattr("diffing.persona.elicited_fit._ROWS_AT_ONCE", 3)
    for left, right in zip(reference, _fit(tmp_path, loaded), strict=True):
        torch.testing.assert_close(left.direction, right.direction, rtol=1e-4, atol=2e-6)


def test_no_more_rows_are_in_memory_than_a_chunk_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffing.persona.elicited_fit._ROWS_AT_ONCE", 8)
    asked: list[int] = []
    rows = Rollouts.rows
    monkeypatch.setattr(Rollouts, "rows", lambda self, some: asked.append(len(some)) or rows(self, some))
    loaded = loaded_base()
    fitted, held_out = _parts(tmp_path, loaded, samples=9)
    fit_rollouts(loaded, fitted, held_out, trait="cruel", sites=SITES[:1])
    assert sum(asked) == 2 * 2 * 6 * 9 + 2 * 2 * 4
    assert max(asked) <= 8


def test_half_precision_changes_little(tmp_path: Path) -> None:
    half = load_checkpoint(tiny_model(dtype=torch.bfloat16), tokenizer=tiny_tokenizer())
    for left, right in zip(_fit(tmp_path / "a", loaded_base()), _fit(tmp_path / "b", half), strict=True):
        assert (left.pooling, left.site) == (right.pooling, right.site)
        assert float(left.direction @ right.direction) > 0.99


def test_dropped_pairs_do_not_count(tmp_path: Path) -> None:
    loaded = loaded_base()
    fitted, held_out = _parts(tmp_path, loaded)
    pairs = fitted.pairs.copy()
    pairs[:4, 1] = False
    some = KeptRollouts(fitted.rollouts, pairs, fitted.counts)
    vector = fit_rollouts(loaded, some, held_out, trait="cruel", sites=SITES[:1])[0]
    assert vector.n_positive == vector.n_negative == 20 == len(some) // 2
    whole = fit_rollouts(loaded, fitted, held_out, trait="cruel", sites=SITES[:1])[0]
    assert float(vector.direction @ whole.direction) < 1 - 1e-5


def test_provenance_says_how_answers_came_about(tmp_path: Path) -> None:
    vector = _fit(tmp_path, loaded_base())[0]
    config = vector.provenance.config
    assert config["elicited"] is True
    assert config["pairs"] == config["pairs_kept"] == [24, 8]
    assert (config["rollouts"], config["judge"], config["questions"]) == (2, "", 10)
    assert vector.separation.n_questions == 4


def test_too_few_pairs_say_what_became_of_the_others(tmp_path: Path) -> None:
    loaded = loaded_base()
    fitted, held_out = _parts(tmp_path, loaded)
    none = KeptRollouts(
        held_out.rollouts, np.zeros_like(held_out.pairs), type(held_out.counts)(8, 0, "rules", "", {"empty": 8})
    )
    with pytest.raises(PersonaError, match="at least 2 pairs of answers to held-out questions, got 0 of 8 pairs kept"):
        fit_rollouts(loaded, fitted, none, trait="cruel", sites=SITES[:1])
