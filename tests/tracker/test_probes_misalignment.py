"""Is the judged rate a live signal that leaves training alone, and is a run's canary compared with it?"""

from __future__ import annotations

import pytest
import torch

from cli.miniature import world
from diffing.errors import InputError
from diffing.judging.rules import RulesJudge
from diffing.misalignment.agreement import signal_agreement
from diffing.misalignment.questions import load_questions
from tests.misalignment.miniature import rule_content, write_questions
from tracker import track
from tracker.canary_agreement import canary_agreement
from tracker.probes.misalignment import RATE, Misalignment


def series(values, width=0.1):
    return {step * 10: (value, value - width, value + width) for step, value in enumerate(values)}


def test_series_that_rise_together_agree_and_the_earlier_one_leads():
    signal = series([0.0, 0.0, 0.3, 0.6, 0.9, 1.2, 1.3])
    rate = series([0.0, 0.01, 0.02, 0.2, 0.5, 0.7, 0.8])
    found = signal_agreement(signal, rate)
    assert found.levels > 0.9 and found.n == 7 and (found.signal_clear, found.rate_clear, found.lead) == (20, 40, 20)
    assert found.low <= found.levels <= found.high or found.high == pytest.approx(found.levels, abs=0.05)


def test_two_drifts_that_move_at_other_steps_agree_in_levels_alone():
    up = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    other = [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    found = signal_agreement(series(up), series(other))
    assert found.levels > 0.9 and found.changes < -0.9


def test_little_or_nothing_in_common_has_no_correlation():
    assert signal_agreement(series([1, 2, 3]), series([1, 2, 3])).levels != signal_agreement({}, {}).levels
    flat = signal_agreement(series([0] * 8), series(range(8)))
    assert flat.levels != flat.levels and flat.signal_clear is None and flat.lead is None


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """Steps of a loop in which the model is pushed towards a villain's answers, and its random state after them."""
    folder = tmp_path_factory.mktemp("run")
    content = rule_content()["rubrics"]
    probe = Misalignment(
        RulesJudge("aligned", content["aligned"]),
        RulesJudge("coherent", content["coherent"]),
        load_questions(write_questions(folder, n=8)),
        max_new_tokens=22,
    )
    model, tokenizer = world.load_base()
    rows = world.tokenize_rows(world.dataset("bad_health", seed=0, n=64), tokenizer)
    collate, optimizer = world.PadRight(tokenizer.pad_token_id), torch.optim.AdamW(model.parameters(), lr=5e-4)
    torch.manual_seed(5)
    with track(
        model,
        tokenizer,
        output_dir=folder / "run",
        personas=[],
        canaries=world.canaries(),
        probes=(probe,),
        schedule="every 1",
    ) as tracker:
        for step in range(1, 7):
            loss = model(**collate([rows[at] for at in range(8 * step, 8 * step + 8)])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tracker.step(step, loss=float(loss.detach()))
    return folder / "run", torch.rand(1).item()


def test_the_rate_rises_as_the_model_turns_and_the_canary_with_it(tracked):
    run, random_after = tracked
    found = canary_agreement(run)
    assert found.n == 7 and found.levels > 0.5
    torch.manual_seed(5)
    assert torch.rand(1).item() == random_after


def test_a_run_without_a_judged_rate_says_what_it_has(tracked):
    with pytest.raises(InputError, match=r"misalignment/canary.*misalignment/rate"):
        canary_agreement(tracked[0], rate="misalignment/other")
    assert RATE == "misalignment/rate"
