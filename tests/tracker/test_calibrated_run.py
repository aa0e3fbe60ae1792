"""Is a run that is tracked beside a bank of benign ones judged by one fused score, resumed like any other?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diffing.errors import ComparabilityError, InputError
from tests.tracker.training import PERSONAS, make_trainer, model_to_train, quick_settings, turned_canaries
from tracker.alarms.bank import NullBank
from tracker.alarms.fusion import SCORE
from tracker.alarms.fusion_fit import fit_score
from tracker.alarms.run_series import RunSeries
from tracker.callback import CheckpointTracker
from tracker.core import calibrated_detectors
from tracker.detectors import MaxOverRun
from tracker.journal import Journal


def watched(**changes) -> dict:
    return quick_settings(canaries=turned_canaries(), **changes)


def bank_like(run: RunSeries, n: int = 19, *, size: float = 1.0) -> NullBank:
    """Runs that were measured as one real run was, and that moved by some share of what it did."""
    made = []
    for place in range(n):
        factor = size * (0.5 + place / n)
        series = {
            name: tuple(replace(one, value=factor * one.value, low=None, high=None) for one in points)
            for name, points in run.series.items()
        }
        made.append(RunSeries(f"benign-{place}", run.signature, series, run.last_step))
    return NullBank.of(made)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> RunSeries:
    folder = tmp_path_factory.mktemp("first")
    make_trainer(
        model_to_train("lora"),
        folder / "out",
        [CheckpointTracker(folder / "run", **watched())],
    ).train()
    return RunSeries.from_run(folder / "run")


def tracked(folder: Path, bank: NullBank, **changes) -> CheckpointTracker:
    callback = CheckpointTracker(folder / "run", **watched(bank=bank, **changes))
    make_trainer(model_to_train("lora"), folder / "out", [callback], save_strategy="steps", save_steps=2).train()
    return callback


def test_the_fused_score_is_recorded_with_its_parts_and_equals_that_of_the_whole_run(measured, tmp_path: Path) -> None:
    bank = bank_like(measured)
    tracked(tmp_path, bank)
    with Journal.read(tmp_path / "run") as journal:
        live = journal.signals(SCORE)
        names = {one.name for one in journal.signals()}
    after = list(fit_score(bank.runs).follow(measured.signals()))
    assert [(one.step, one.value) for one in live] == [(one.step, pytest.approx(one.value)) for one in after]
    assert any(name.startswith(SCORE + "/persona") for name in names)


def test_a_run_that_moved_far_beyond_the_bank_alerts_and_one_like_it_does_not(measured, tmp_path: Path) -> None:
    quiet, loud = bank_like(measured, size=3.0), bank_like(measured, size=0.01)
    for folder, bank in ((tmp_path / "quiet", quiet), (tmp_path / "loud", loud)):
        tracked(folder, bank, detectors=[MaxOverRun(bank=bank, least_effect=0.0)])
    with Journal.read(tmp_path / "quiet/run") as one, Journal.read(tmp_path / "loud/run") as other:
        assert not [alert for alert in one.alerts() if alert.signal == SCORE]
        (alert,) = [alert for alert in other.alerts() if alert.signal == SCORE]
        assert "19 benign runs" in alert.rule


def test_without_detectors_or_rules_it_is_the_banks_score_that_is_judged(measured) -> None:
    judge, *_ = calibrated_detectors(bank := bank_like(measured, size=0.01))
    assert isinstance(judge, MaxOverRun) and judge.threshold == pytest.approx(MaxOverRun(bank=bank).threshold)
    assert judge.threshold > MaxOverRun(bank=bank, least_effect=0.0).threshold  # this bank hardly moved


def test_a_resumed_run_has_the_score_of_one_that_was_never_interrupted(measured, tmp_path: Path) -> None:
    bank = bank_like(measured)
    tracked(tmp_path / "whole", bank)
    tracked(tmp_path / "cut", bank)
    callback = CheckpointTracker(tmp_path / "cut/run", **watched(bank=bank))
    trainer = make_trainer(model_to_train("lora"), tmp_path / "cut/out", [callback], save_strategy="no")
    trainer.train(resume_from_checkpoint=str(tmp_path / "cut/out/checkpoint-4"))
    with Journal.read(tmp_path / "whole/run") as one, Journal.read(tmp_path / "cut/run") as other:
        assert one.signals(SCORE) == other.signals(SCORE)


def test_a_bank_of_other_probes_or_too_few_runs_is_refused(measured, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="19"):
        CheckpointTracker(tmp_path / "few", **watched(bank=bank_like(measured, n=5)))
    callback = CheckpointTracker(tmp_path / "run", **watched(bank=bank_like(measured), personas=PERSONAS[:1]))
    with pytest.raises(ComparabilityError, match="personas"):
        make_trainer(model_to_train("lora"), tmp_path / "out", [callback]).train()
