"""Is a run beside a bank scored while it goes on, alike after a resume, and refused where it was measured otherwise?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffing.errors import ComparabilityError
from tests.tracker.training import make_trainer, model_to_train, no_report, quick_settings, turned_canaries  # noqa: F401
from tracker.alarms.bank import NullBank
from tracker.alarms.fusion import SCORE
from tracker.alarms.fusion_fit import fit_score
from tracker.alarms.run_series import RunSeries
from tracker.callback import CheckpointTracker
from tracker.detectors import MaxOverRun
from tracker.journal import Journal
from tracker.replay import replay_alerts
from tracker.rules import Rule, RuleSet
from tracker.signals import DriftSignal

SAVING = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}


def tracked(folder: Path, *, settings: dict[str, Any] | None = None, resume: bool = False, **changes: Any) -> Path:
    callback = CheckpointTracker(folder / "run", **quick_settings(canaries=turned_canaries(), **(settings or {})))
    trainer = make_trainer(model_to_train("lora"), folder / "out", [callback], **{**SAVING, **changes})
    trainer.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-4") if resume else None)
    return folder / "run"


def smaller(run: RunSeries, factor: float) -> RunSeries:
    """The run with every drift that much smaller."""
    series = {
        name: tuple(replace(one, value=one.value * factor) for one in points) for name, points in run.series.items()
    }
    return replace(run, series=series)


def scores(run_dir: Path) -> list[DriftSignal]:
    with Journal.read(run_dir) as journal:
        return journal.signals(SCORE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tracked(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def bank(plain: Path) -> NullBank:
    """Nineteen runs that drifted far less than the fine-tune of these tests does."""
    run = RunSeries.from_run(plain)
    return NullBank.of(smaller(run, 0.02 * (1 + place / 19)) for place in range(19))


def test_a_tracked_run_becomes_a_bank_and_its_score_is_made_and_judged_live(
    tmp_path: Path, plain: Path, bank: NullBank
) -> None:
    bank.save(tmp_path / "bank")
    run_dir = tracked(
        tmp_path, settings={"bank": tmp_path / "bank", "detectors": [MaxOverRun(bank=bank, least_effect=0.0)]}
    )
    live = scores(run_dir)
    assert [one.step for one in live] == [0, 2, 4, 6]
    with Journal.read(run_dir) as journal:
        measured = [one for one in journal.signals() if not one.name.startswith(SCORE)]
        alerts = [alert for alert in journal.alerts() if alert.signal == SCORE]
    after = [one for one in fit_score(bank.runs).follow(measured) if one.name == SCORE]
    assert [one.value for one in live] == pytest.approx([one.value for one in after])
    assert len(alerts) == 1 and max(one.value for one in live) > 1
    assert RunSeries.from_run(run_dir).signature == dict(bank.signature)


def test_a_resumed_run_has_the_scores_of_an_unbroken_one(tmp_path: Path, bank: NullBank) -> None:
    unbroken = scores(tracked(tmp_path, settings={"bank": bank}))
    resumed = scores(tracked(tmp_path, settings={"bank": bank}, resume=True))
    assert [one.step for one in resumed] == [one.step for one in unbroken]
    assert [one.value for one in resumed] == pytest.approx([one.value for one in unbroken], rel=1e-4, abs=1e-5)


def test_rules_with_a_bank_judge_a_run_that_was_never_scored(tmp_path: Path, plain: Path, bank: NullBank) -> None:
    rules = RuleSet((Rule("drifted", SCORE, "max_over_run", {"bank": bank, "level": 0.05, "least_effect": 0.0}),))
    replayed = replay_alerts(plain, rules)
    live = scores(tracked(tmp_path, settings={"bank": bank}))
    first = next(one for one in live if one.value > 1)
    assert [(alert.signal, alert.step) for alert in replayed.alerts] == [(SCORE, first.step)]
    assert replayed.alerts[0].value == pytest.approx(first.value, rel=1e-4)
    assert replayed.unmatched == ()


def test_a_run_of_another_schedule_is_refused_in_its_first_second(tmp_path: Path, bank: NullBank) -> None:
    with pytest.raises(ComparabilityError, match="schedule"):
        tracked(tmp_path, settings={"bank": bank, "schedule": "every 1"})
