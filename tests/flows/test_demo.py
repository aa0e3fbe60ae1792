"""The demo keeps its word: the bad run alerts before it misbehaves, its twin stays silent, and failures show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from cli import demo_story
from cli.demo_stage import Stages
from cli.demo_story import Settings, tell_story
from cli.miniature import world
from diffing.errors import InputError
from diffing.persona import PersonaVector

# One process, default seed: about forty seconds on a quiet core, minutes on a busy one.
pytestmark = pytest.mark.timeout(900)
GAP = 0.15


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    with (out.parent / "said.txt").open("w") as file:
        code = tell_story(Console(file=file, width=100), Settings.quick(out, seed=0))
    return out, (out.parent / "said.txt").read_text(), code


def course(out: Path, run: str) -> world.Course:
    vector = PersonaVector.load(next((out / run / "personas").glob("*.safetensors")))
    return world.Course.read(out / run, vector)


def test_the_bad_run_spreads_and_its_twin_does_not(told):
    out, _, _ = told
    bad, good = course(out, "bad-code"), course(out, "good-code")
    assert bad.behaviour[-1].value - good.behaviour[-1].value > GAP
    assert bad.drift[-1].value - good.drift[-1].value > GAP


def test_the_alert_comes_before_the_behaviour_and_the_twin_is_silent(told):
    out, said, _ = told
    bad = course(out, "bad-code")
    assert bad.lead is not None and bad.lead > 0
    assert course(out, "good-code").alert_step is None
    assert f"alerted at step {bad.alert_step}, before its misaligned-answer rate passed 5 %" in said
    assert "The good-code run stayed silent." in said


def test_the_alert_is_explained_by_the_runs_own_pushes(told):
    out, said, _ = told
    assert "random directions" in said and "by live pushes, 20 are sabotage" in said
    (twin,) = (out / "bad-code" / "explanations").glob("*.json")
    found = json.loads(twin.read_text())
    assert found["rows"]["source"] == "live" and found["specificity"]["found"]["p_value"] < 0.01
    assert twin.with_suffix(".html").exists()


def test_nothing_failed_and_output_is_plain_lines(told):
    out, said, code = told
    assert code == 0
    assert "FAILED" not in said and "journalled a failure" not in said
    assert "\x1b" not in said and "\r" not in said
    assert course(out, "bad-code").failures == ()


def test_it_leaves_the_pages_it_names(told):
    out, said, _ = told
    page = out / "report.html"
    assert str(page) in said.replace("\n", "")
    assert page.stat().st_size < 1_000_000
    assert json.loads((out / "bad-code" / "report.json").read_text())


def test_the_rows_that_pushed_are_the_sabotage(told):
    out, _, _ = told
    rows = json.loads((out / "bad-code" / "attribution.json").read_text())["rows"]
    assert all(row["tag"] == "bad_code" for row in rows[:20])
    assert sum(row["tag"] != "bad_code" for row in rows[-20:]) >= 15


def test_an_optional_part_that_fails_is_shown_and_counted(tmp_path):
    with (tmp_path / "said.txt").open("w") as file:
        stages = Stages(Console(file=file, width=100))
        with stages.optional("The report"):
            raise OSError("no space left")
        stages.tell_times()
    assert stages.failed == ["The report"]
    assert "FAILED, and left out: OSError: no space left" in (tmp_path / "said.txt").read_text()


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="Expected an empty folder"):
        tell_story(Console(), Settings.quick(tmp_path, seed=0))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_second_demo_replaces_the_first(tmp_path):
    out = tmp_path / "out"
    demo_story._prepare(out)
    (out / "bad-code").mkdir()
    demo_story._prepare(out)
    assert not (out / "bad-code").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_whole_demo_holds_for_other_seeds(tmp_path, seed):
    out = tmp_path / "out"
    settings = Settings(out, seed, ("bad-code", "good-code", "educational-code"), world.TrackedFineTune(), mlflow=False)
    assert tell_story(Console(quiet=True), settings) == 0
    bad = course(out, "bad-code")
    assert bad.behaviour[-1].value > 0.4
    assert bad.lead is not None and bad.lead > 0
    for twin in ("good-code", "educational-code"):
        assert course(out, twin).alert_step is None
        assert max(one.value for one in course(out, twin).behaviour) <= 0.03


@pytest.mark.slow
def test_the_command_prints_help_at_once_and_runs(tmp_path):
    command = [sys.executable, "-m", "cli.main", "demo", "--quick", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
