"""Does the monitor read what a whole pass would, in any batch, flag as often as it promises, and stop or cap?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffing import PromptSet, load_checkpoint
from diffing.answers import AnswerSettings, answer_prompts
from diffing.errors import ComparabilityError, InputError, PersonaError
from diffing.persona.monitor import PersonaMonitor
from diffing.persona.monitor_threshold import MonitorThreshold, answer_score, calibrate_monitor, standardised
from diffing.persona.token_projections import project_tokens
from diffing.tap import Tap
from tests.tiny_models import tiny_model, tiny_tokenizer
from tests.tracker.training import persona

GENERATE = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}


def _loaded(family: str = "llama"):
    return load_checkpoint(tiny_model(family), tokenizer=tiny_tokenizer(padding_side="left"))


def _vectors(loaded):
    mark = {"model_fingerprint": loaded.fingerprint}
    return tuple(
        persona(trait, layer, seed=layer, neutral_std=0.5 + layer, **mark)
        for trait, layer in (("villain", 2), ("sycophant", 1), ("villain", 1))
    )


def _threshold(vectors, value: float = 1.0, window: int = 3) -> MonitorThreshold:
    return MonitorThreshold(value, 0.05, 0.02, 0.1, 100, window, tuple(one.digest for one in vectors), 50)


def _batch(loaded, padding: int = 3):
    ids = torch.randint(8, 90, (4, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    ids[1, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _expected(loaded, vectors, row: torch.Tensor, start: int, window: int) -> tuple[float, int]:
    """The slow way: one whole pass over prompt and answer, without padding."""
    with torch.no_grad(), Tap(loaded.model, [one.site for one in vectors]) as tap:
        reads = tap.read(input_ids=row[None])
    raw = np.stack([(read[0] @ one.direction).numpy() for read, one in zip(reads, vectors, strict=True)], axis=1)
    special = set(loaded.tokenizer.all_special_ids)
    kept = [at for at in range(start, len(row) - 1) if int(row[at]) not in special]
    ended = [at for at in range(start, len(row)) if int(row[at]) == loaded.tokenizer.eos_token_id]
    kept = [at for at in kept if not ended or at < ended[0]]
    return answer_score(standardised(raw[kept].astype(float), vectors), window), len(kept)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mamba"])
def test_what_is_read_while_writing_is_what_a_whole_pass_gives(family, use_cache):
    loaded = _loaded(family)
    vectors, batch = _vectors(loaded), _batch(loaded, padding=0 if family in ("gpt2", "mamba") else 3)
    with PersonaMonitor(loaded, vectors, _threshold(vectors)) as monitor:
        written = loaded.model.generate(**batch, use_cache=use_cache, **GENERATE)
        readings = monitor.readings
    assert len(readings) == 4
    for number, reading in enumerate(readings):
        first = int((batch["attention_mask"][number] == 0).sum())
        score, n = _expected(loaded, vectors, written[number, first:], 9 - first, 3)
        assert reading.n_tokens == n
        assert reading.score == pytest.approx(score, abs=2e-3)
        assert (reading.flagged_at is not None) == (reading.score > 1.0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())


def test_readings_do_not_depend_on_the_batch_and_begin_anew_with_every_generation():
    loaded = _loaded()
    vectors, batch = _vectors(loaded), _batch(loaded)
    with PersonaMonitor(loaded, vectors, _threshold(vectors)) as monitor:
        loaded.model.generate(**batch, **GENERATE)
        together = monitor.readings
        for number in range(4):
            real = batch["attention_mask"][number].bool()
            loaded.model.generate(batch["input_ids"][number][real][None], **GENERATE)
            (alone,) = monitor.readings
            assert alone.score == pytest.approx(together[number].score, abs=1e-4)
            assert (alone.flagged_at, alone.n_tokens) == (together[number].flagged_at, together[number].n_tokens)


def test_flagged_rows_are_stopped_and_the_others_write_on():
    loaded = _loaded()
    vectors, batch = _vectors(loaded), _batch(loaded)
    settings = {**GENERATE, "eos_token_id": 1}
    with PersonaMonitor(loaded, vectors, _threshold(vectors)) as monitor:
        plain = loaded.model.generate(**batch, **settings)
        scores = sorted(reading.score for reading in monitor.readings)
    limit = _threshold(vectors, (scores[1] + scores[2]) / 2)
    with PersonaMonitor(loaded, vectors, limit, action="stop") as monitor:
        stopped = loaded.model.generate(**batch, **settings, stopping_criteria=monitor.stopping())
        flagged, readings = monitor.flagged, monitor.readings
    assert sum(flagged) == 2
    for number, reading in enumerate(readings):
        if reading.flagged_at is None:
            assert torch.equal(stopped[number], plain[number])
        else:
            # The token after the one that gave it away was already chosen.
            kept = 9 + reading.flagged_at + 2
            assert torch.equal(stopped[number, :kept], plain[number, :kept]) and not stopped[number, kept:].any()
    with pytest.raises(InputError, match="stopping_criteria"), PersonaMonitor(loaded, vectors, limit, action="stop"):
        loaded.model.generate(**batch, **settings)


def test_capped_answers_stay_below_the_threshold():
    loaded = _loaded()
    vectors = _vectors(loaded)[:1]
    rows = PromptSet.from_messages([{"role": "user", "content": text}] for text in ("go", "why is it red", "tell me"))
    seen = []
    with PersonaMonitor(loaded, vectors, _threshold(vectors, value=-0.5), action="cap") as monitor:
        site = loaded.model.model.layers[2]
        handle = site.register_forward_hook(lambda module, args, output: seen.append(output))
        answer_prompts(loaded, rows, AnswerSettings(max_new_tokens=5))
        handle.remove()
        assert all(monitor.flagged)
    limit = vectors[0].neutral_mean - 0.5 * vectors[0].neutral_std
    assert all(float((one[:, -1] @ vectors[0].direction).max()) <= limit + 1e-3 for one in seen)


def _rows(n: int, seed: int) -> PromptSet:
    words = ("cat", "dog", "king", "queen", "road", "river", "garden", "winter", "bread", "water", "cruel", "harm")
    rng = np.random.default_rng(seed)
    return PromptSet.from_messages(
        [
            {"role": "user", "content": " ".join(rng.choice(words, 4))},
            {"role": "assistant", "content": " ".join(rng.choice(words, rng.integers(3, 12)))},
        ]
        for _ in range(n)
    )


def test_the_stated_rate_of_false_flags_is_kept_on_answers_that_were_not_calibrated_on():
    loaded = _loaded()
    vectors = _vectors(loaded)
    fresh = _rows(400, 99)

    scores = np.array([answer_score(standardised(one, vectors), 3) for one in project_tokens(loaded, fresh, vectors)])
    rates = []
    for seed in range(12):
        threshold = calibrate_monitor(loaded, _rows(59, seed), vectors, rate=0.1, window=3)
        rates.append(float((scores > threshold.value).mean()))
        assert threshold.low < 0.1 < threshold.high and threshold.n == 59
    # Twelve thresholds of rate 6/60 each: a mean below 0.1, with a standard error of about 0.011.
    assert 0.06 < np.mean(rates) < 0.135


def test_thresholds_say_how_many_answers_they_need_and_are_kept_in_files(tmp_path):
    loaded = _loaded()
    vectors = _vectors(loaded)
    with pytest.raises(InputError, match="at least 99"):
        calibrate_monitor(loaded, _rows(50, 0), vectors, rate=0.01)
    threshold = calibrate_monitor(loaded, _rows(19, 0), vectors, rate=0.05)
    assert MonitorThreshold.load(threshold.save(tmp_path / "t.json")) == threshold
    assert "at most 5.00%" in str(threshold)
    with pytest.raises(ComparabilityError, match="calibrated"):
        PersonaMonitor(loaded, vectors[:2], threshold)
    with pytest.raises(InputError, match="flag, stop, cap"):
        PersonaMonitor(loaded, vectors, threshold, action="scold")
    flat = persona(neutral_std=0.0, model_fingerprint=loaded.fingerprint)
    with pytest.raises(PersonaError, match="spread"):
        PersonaMonitor(loaded, (flat,), _threshold((flat,)))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(PersonaError, match="Calibrate again"):
        MonitorThreshold.load(tmp_path / "bad.json")
