"""Does a linear probe find a planted contrast, say honestly how well, and refuse what would mean nothing?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffing import PromptSet
from diffing.errors import PathMissingError, PersonaError, UnsafeFormatError
from diffing.persona.linear_probe import LinearProbe
from diffing.persona.probe_training import measure_worth, train_probe
from tests.diffing.personas import contrastive_rows, loaded_tiny, planted_model


@pytest.fixture(scope="module")
def planted():
    loaded, _ = planted_model(noise=0.05, gap=3.0)
    return loaded, *contrastive_rows(40)


def test_a_planted_contrast_is_told_apart_on_questions_never_seen(planted):
    loaded, positive, negative = planted
    probe = train_probe(loaded, positive, negative, name="cruel", site="resid:1", rate=0.1)
    assert probe.worth.auroc == 1.0 and probe.worth.low < 1.0
    assert probe.worth.recall == 1.0 and probe.worth.recall_low < 1.0
    assert probe.worth.n_positive == probe.worth.n_negative == probe.worth.n_questions == 12
    fresh = contrastive_rows(12, seed=9)
    scores = [probe.score_texts(loaded, rows) for rows in fresh]
    assert scores[0].min() > scores[1].max()


def test_scores_are_those_of_the_slow_formula_and_survive_a_file(planted, tmp_path):
    loaded, positive, negative = planted
    probe = train_probe(loaded, positive, negative, name="cruel", site="resid:1")
    again = LinearProbe.load(probe.save(tmp_path / "probe.safetensors"))
    assert repr(again) == repr(probe) and again.provenance == probe.provenance
    np.testing.assert_array_equal(again.score_texts(loaded, positive), probe.score_texts(loaded, positive))
    tokenized, expected = positive.tokenize(loaded.tokenizer), []
    for ids, roles in zip(tokenized.input_ids, tokenized.roles, strict=True):
        with torch.no_grad():
            hidden = loaded.model(torch.from_numpy(ids).long()[None], output_hidden_states=True).hidden_states[2][0]
        mean = hidden[torch.from_numpy(roles == 3)].double().mean(dim=0)
        expected.append(float(((mean - probe.mean) / probe.scale) @ probe.weights) + probe.bias)
    np.testing.assert_allclose(probe.score_texts(loaded, positive), expected, atol=1e-3)


def test_order_and_batches_do_not_matter(planted):
    loaded, positive, negative = planted
    probe = train_probe(loaded, positive, negative, name="cruel", site="resid:1")
    turned = [PromptSet(tuple(reversed(rows.prompts))) for rows in (positive, negative)]
    other = train_probe(loaded, *turned, name="cruel", site="resid:1", batch_tokens=40)
    torch.testing.assert_close(other.weights, probe.weights, rtol=1e-4, atol=1e-5)


def test_labels_that_mean_nothing_are_worth_nothing():
    loaded = loaded_tiny()
    rows = [row for part in contrastive_rows(60) for row in part]
    rng, auroc = np.random.default_rng(0), []
    for seed in range(3):
        kinds = rng.random(len(rows)) < 0.5
        sides = [PromptSet(tuple(row for row, kind in zip(rows, kinds, strict=True) if kind == one)) for one in (1, 0)]
        auroc.append(train_probe(loaded, *sides, name="nothing", site="resid:1", seed=seed).worth)
    assert all(worth.low < 0.5 < worth.high for worth in auroc)


def test_recall_needs_enough_negatives_for_its_rate_and_keeps_it():
    positive, negative = np.linspace(1, 2, 50), np.linspace(0, 1.2, 98)
    worth = measure_worth(positive, negative, rate=0.01, n_questions=50)
    assert worth.recall is None and "needs 99 held-out negative" in str(worth)
    worth = measure_worth(positive, np.linspace(0, 1.2, 99), rate=0.01, n_questions=50)
    assert worth.threshold == pytest.approx(1.2) and worth.recall == pytest.approx((positive > 1.2).mean())
    assert worth.recall_low < worth.recall < worth.recall_high
    rng, above = np.random.default_rng(1), []
    for _ in range(200):
        threshold = measure_worth(positive, rng.normal(size=99), rate=0.05, n_questions=50).threshold
        above.append(float((rng.normal(size=500) > threshold).mean()))
    assert np.mean(above) <= 0.055


def test_what_cannot_be_probed_is_refused(planted, tmp_path):
    loaded, positive, negative = planted
    with pytest.raises(PersonaError, match="at least 8 questions"):
        train_probe(
            loaded, PromptSet(positive.prompts[:6]), PromptSet(negative.prompts[:6]), name="few", site="resid:1"
        )
    probe = train_probe(loaded, positive, negative, name="cruel", site="resid:1")
    with pytest.raises(PersonaError, match="trained on"):
        probe.score_texts(loaded_tiny(seed=3), positive)
    with pytest.raises(PathMissingError):
        LinearProbe.load(tmp_path / "none.safetensors")
    (tmp_path / "probe.pkl").write_bytes(b"x")
    with pytest.raises(UnsafeFormatError, match="pickle"):
        LinearProbe.load(tmp_path / "probe.pkl")
    (tmp_path / "probe.safetensors").write_bytes(b"x")
    with pytest.raises(PersonaError, match="expected a linear probe"):
        LinearProbe.load(tmp_path / "probe.safetensors")
