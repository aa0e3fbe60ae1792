"""Pushes that may cost no more than a share of the training: what is left out, and where that is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffing.errors import InputError
from tests.tracker.training import PERSONAS, PROBES, make_trainer, model_to_train, no_report, quick_settings  # noqa: F401
from tracker import CheckpointTracker
from tracker.delivery.message import firing
from tracker.live_cause import live_attribution
from tracker.probes import pace
from tracker.probes.live_push import LivePush
from tracker.probes.pace import Pace
from tracker.probes.persona_prompts import as_prompt_set
from tracker.push_journal import ModulesRead, PushJournal, coverage
from tracker.signals import Alert


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def steps_read(clock: Clock, step: float, cost: float, n: int = 200, share: float = 0.02) -> int:
    """Of `n` steps that take so long, of which reading takes so long."""
    kept, read = Pace(share), 0
    for _ in range(n):
        affordable = kept.begin()
        clock.now += step
        if affordable:
            read += 1
            with kept.reading():
                clock.now += cost
        kept.end()
    return read


def test_long_steps_are_all_read_and_short_ones_as_often_as_can_be_paid(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    assert steps_read(clock, step=1.0, cost=0.005) == 200
    # Half of 2 % of 50 ms is 0.5 ms: a reading of 2 ms every fourth step.
    assert 48 <= steps_read(clock, step=0.050, cost=0.002) <= 52
    assert steps_read(clock, step=0.050, cost=0.002, share=0.04) > 90


def test_a_pause_is_no_reason_for_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    kept, read = Pace(0.02), []
    for number in range(40):
        read.append(kept.begin())
        clock.now += 1000.0 if number == 20 else 0.05  # an evaluation in the midst of a step
        if read[-1]:
            with kept.reading():
                clock.now += 0.002
        kept.end()
    assert sum(read[20:30]) <= 5


def test_fresh_gradients_wait_and_the_first_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    kept = Pace(0.02)
    assert kept.may_refresh()
    with kept.refreshing():
        clock.now += 0.1
    waited = 0
    while not kept.may_refresh():
        kept.begin()
        clock.now += 0.05
        kept.end()
        waited += 1
    assert 195 <= waited <= 205  # 0.1 s at 1 % of 50 ms a step


def train(folder: Path, **changes: Any) -> Path:
    vectors = tuple(PERSONAS[:1])
    pushes = LivePush(vectors, as_prompt_set(PROBES), **changes)
    callback = CheckpointTracker(folder / "run", **quick_settings(canaries=(), personas=vectors, probes=(pushes,)))
    make_trainer(model_to_train("lora"), folder / "out", [callback], max_steps=8).train()
    return folder / "run"


def test_a_ranking_says_how_many_steps_were_read(tmp_path: Path) -> None:
    run = train(tmp_path, budget=1e-6)  # so little that one step is read, on credit
    visits = PushJournal.read(run).visits("villain")
    assert len(np.unique(visits.step)) == 1
    ranking = live_attribution(run, "villain", until=8)
    assert any("in 1 of" in caveat for caveat in ranking.caveats)
    plain = live_attribution(train(tmp_path / "plain"), "villain")
    assert not any("were read in" in caveat for caveat in plain.caveats)


def test_a_budget_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="budget"):
        train(tmp_path, budget=2.0)


def test_the_tracker_takes_a_budget_for_pushes_and_refuses_one_out_of_range(tmp_path: Path) -> None:
    callback = CheckpointTracker(tmp_path / "run", **quick_settings(canaries=(), pushes=1e-6))
    make_trainer(model_to_train("lora"), tmp_path / "out", [callback], max_steps=8).train()
    assert len(np.unique(PushJournal.read(tmp_path / "run").visits("villain").step)) == 1
    with pytest.raises(InputError, match="share of training time"):
        CheckpointTracker(tmp_path / "other", **quick_settings(pushes=1.5))


def test_coverage_counts_from_the_first_step_that_was_read() -> None:
    assert coverage(np.array([3, 3, 5, 7]), 1, 10) == (3, 8)
    assert coverage(np.array([], dtype=int), 1, 10) == (0, 10)


def test_which_modules_were_read_is_on_record_and_hidden_by_a_resume(tmp_path: Path) -> None:
    journal = PushJournal.start(tmp_path, 0, ["persona/evil/L1"])
    chosen = [ModulesRead(step, 5, 42, {"persona/evil/L1": 0.15}) for step in (3, 20)]
    for one in chosen:
        journal.chose(one)
    assert PushJournal.read(tmp_path).choices() == chosen
    journal.close()
    PushJournal.start(tmp_path, 10, ["persona/evil/L1"]).close()
    assert PushJournal.read(tmp_path).choices() == chosen[:1]


def test_a_message_names_the_rows_and_says_how_many_steps_were_read() -> None:
    evidence = {"pushed_by": [{"example": "row-7", "push": 0.3}], "pushed_steps_read": [20, 200]}
    alert = Alert("r", "persona/evil/L1/prompt", 300, 0.5, 0.4, 0.25, "gap", since=290, evidence=evidence)
    assert "Rows that pushed most (20 of 200 steps were read): row-7." in firing(alert, "run").text
    plain = replace(alert, evidence={"pushed_by": evidence["pushed_by"]})
    assert "Rows that pushed most: row-7." in firing(plain, "run").text
