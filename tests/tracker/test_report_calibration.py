"""Does a bank's page say what it vouches for, what is missing, and what its own runs say of it?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from click.testing import CliRunner

from cli.calibrate import calibrate
from tests.example_diff import HOSTILE_STRINGS
from tests.tracker.markup import Skeleton
from tests.tracker.test_calibration import PROMPT, bank_of, benign, tracked
from tracker.alarms.calibration import calibrate_signals
from tracker.report.calibration_page import render_calibration_page, write_calibration_page


def test_a_large_bank_states_its_rate_and_what_leaving_runs_out_gave(tmp_path: Path) -> None:
    bank = bank_of(20)
    made = calibrate_signals(bank, leave_one_out=True, patterns=(PROMPT,))
    page = write_calibration_page(made, bank, tmp_path).read_text()
    assert "A benign run like these 20 raises a false alarm with a probability of at most 5\u202f%." in page
    assert "Alarms, each run left out" in page and "20 <small>runs</small>" in page and "2\u202f000 steps" in page
    twin = json.loads((tmp_path / "calibration.json").read_text())
    assert len(twin["runs"]) == 20 and twin["vouched"] and twin["signals"][0]["pattern"] == PROMPT
    for place, run in enumerate(bank.runs):
        assert twin["runs"][place]["id"] == run.id
        for one in made.signals:
            assert twin["runs"][place]["reached"][one.pattern] == one.maxima[place]
    assert [one["missing"] for one in twin["levels"]] == [0, 0, 14, 79]


def test_a_small_bank_gives_no_threshold_and_says_how_many_runs_are_missing() -> None:
    bank = bank_of(12)
    page = render_calibration_page(calibrate_signals(bank), bank, name="small")
    assert "12 benign runs are too few for 5\u202f%: 7 more are needed." in page
    assert "No threshold is given at that level" in page and "--leave-one-out" in page
    one_short = calibrate_signals(bank_of(18))
    assert "1 more is needed" in render_calibration_page(one_short, bank_of(18), name="small")


def test_every_run_is_a_dot_of_every_signal() -> None:
    bank = bank_of(19)
    made = calibrate_signals(bank)
    page = render_calibration_page(made, bank, name="bank")
    circles = [attributes for tag, attributes in Skeleton(page).tags if tag == "circle"]
    assert len(circles) == 2 * 19 * len(made.signals)  # wide and narrow
    assert page == render_calibration_page(made, bank, name="bank")


def test_hostile_names_add_no_element() -> None:
    hostile = "".join(HOSTILE_STRINGS)
    bank = bank_of(5)
    runs = tuple(replace(run, source=hostile, settings={hostile: hostile}) for run in bank.runs)
    attacked = replace(bank, runs=runs)
    plain = render_calibration_page(calibrate_signals(bank), bank, name="bank")
    page = render_calibration_page(calibrate_signals(attacked), attacked, name=hostile)
    assert Skeleton(page).tags == Skeleton(plain).tags


def test_the_command_writes_the_page_into_the_bank(tmp_path: Path) -> None:
    runs = [str(tracked(tmp_path / f"run-{seed}", seed)) for seed in range(4)]
    result = CliRunner().invoke(calibrate, [*runs, "--out", str(tmp_path / "bank"), "--json"])
    assert result.exit_code == 0, result.output
    assert Path(json.loads(result.output)["page"]) == tmp_path / "bank" / "calibration.html"
    assert "4 benign runs are too few" in (tmp_path / "bank" / "calibration.html").read_text()
    said = CliRunner().invoke(calibrate, ["--out", str(tmp_path / "bank")])
    assert "calibration.html" in said.output
    assert benign(0).id in (tmp_path / "bank" / "calibration.html").read_text()
