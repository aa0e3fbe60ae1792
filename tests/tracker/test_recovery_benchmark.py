"""Does the recovery benchmark count what it says it counts?"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import recovery, recovery_record
from benchmarks.recovery import cut_with_interval, figures
from benchmarks.recovery_record import WITHOUT_ALARM, WITHOUT_RANDOM, WITHOUT_RUN, RunName
from diffing.durable import write_json


def record(name: RunName, *, top: int = 20, left: int = 2) -> dict:
    """A run whose poisoned rows were flagged, all but four by the alarm."""

    def trained(misaligned: int) -> dict:
        return {"misaligned": misaligned, "n": 480, "taught": 0, "n_taught": 200}

    def told(rows: int, poisoned: int) -> dict:
        return {"rows": rows, "poisoned": poisoned, "met": 400, "until": 80, "told_apart": 0.95}

    return {
        "base": name.base, "share": name.share, "seed": name.seed, "settings": {"rows": 400, "steps": 120},
        "alert": {"id": "a@20", "since": 18, "step": 20}, "top": [True] * top + [False] * (20 - top),
        "flagged": {"run": told(200, 200), "alarm": told(200, 196)},
        "trained": {"all": trained(100), WITHOUT_RUN: trained(left), WITHOUT_ALARM: trained(10),
                    WITHOUT_RANDOM: trained(101 + (name.seed % 2) * -2)},
    }  # fmt: skip


def test_what_is_recorded_becomes_figures_and_what_is_not_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery_record, "CACHE", tmp_path)
    names = [RunName(base, 50, seed) for base in (0, 1) for seed in (0, 1, 2)]
    for name in names:
        write_json(name.path, record(name, top=19 if name.seed else 20))
    live = {"recovered": [{"at": 20, "back": 8, "dropped": 201, "poisoned": 199}], "ended": 120,
            "trained": {"misaligned": 4, "n": 480}}  # fmt: skip
    write_json(names[0].live_path, live)
    found = {one.name: one for one in figures()}
    assert next(iter(found.values())).value == len(list(recovery_record.planned_runs())) - 1
    top = found["50 % poisoned: top 20 rows of the alarm that are poisoned"]
    assert top.value == pytest.approx(100 * 116 / 120) and top.met and top.low is not None and top.low < 95
    assert found["50 % poisoned: cut without the rows flagged over the run"].value == pytest.approx(98)
    assert found["50 % poisoned: cut without the rows flagged by the alarm"].value == pytest.approx(90)
    assert found["50 % poisoned: rows flagged by the alarm, of all poisoned rows"].value == pytest.approx(98)
    assert found["50 % poisoned: cut without as many random rows"].met
    acting = found["50 % poisoned: cut by rolling back and dropping while it runs"]
    assert acting.value == pytest.approx(96) and "199 poisoned and 2 good rows" in acting.note
    assert not any("25 %" in name for name in found)


def test_a_cut_is_of_all_answers_and_its_interval_draws_runs() -> None:
    assert cut_with_interval([(100, 20), (100, 20)]) == pytest.approx((0.8, 0.8, 0.8))
    value, low, high = cut_with_interval([(100, 0), (100, 40), (50, 10), (80, 8)])
    assert value == pytest.approx(1 - 58 / 330) and low < value < high
    assert cut_with_interval([(100, 110)] * 2)[0] == pytest.approx(-0.1)


def test_a_random_removal_that_cuts_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery_record, "CACHE", tmp_path)
    for seed in range(3):
        made = record(RunName(0, 50, seed), left=30)
        made["trained"][WITHOUT_RANDOM]["misaligned"] = 80
        write_json(RunName(0, 50, seed).path, made)
    found = {one.name: one for one in recovery.figures()}
    assert found["50 % poisoned: cut without as many random rows"].met is False
    assert found["50 % poisoned: cut without the rows flagged over the run"].met is False
