"""What the README shows can be pasted: the callback example runs as it stands, and the run tells of its alert."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tracker.interventions import intervention_spans
from tracker.journal import Journal
from tracker.replay import judge
from tracker.rules import RuleSet
from tracker.signals import DriftSignal

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE = EXAMPLES / "callback.py"


def run_example(name: str, folder: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_callback_example_has_at_most_fifteen_lines():
    assert len(EXAMPLE.read_text().splitlines()) <= 15


@pytest.mark.slow
def test_the_callback_example_runs_offline_and_alerts(tmp_path):
    run_example("callback.py", tmp_path)
    with Journal.read(tmp_path / "runs" / "tracked") as journal:
        assert journal.failures() == []
        assert any(alert.signal == "persona/villain/L2/prompt" for alert in journal.alerts())
    assert (tmp_path / "runs" / "tracked" / "report.html").exists()


@pytest.mark.slow
def test_the_recovery_example_drops_what_pushed_and_ends_aligned(tmp_path):
    said = run_example("recover.py", tmp_path)
    (rate,) = re.findall(r"misaligned answers: ([0-9.]+)%", said)
    assert "back to step 20" in said and float(rate) < 5
    spans = intervention_spans(tmp_path / "runs" / "recovered")
    assert {span.name for span in spans} == {"rollback", "rows dropped"}


def test_the_example_rules_are_rules_and_judge_a_run():
    rules = RuleSet.load(EXAMPLES / "rules.yaml")
    assert [rule.name for rule in rules.rules] == ["evil", "loss-diverged", "gradient-norm", "tracker-silent"]
    series = [DriftSignal("persona/evil/L2/prompt", 0.3, step, "gap") for step in (10, 20)]
    alerts, _ = judge(series, rules)
    assert [(alert.step, alert.severity) for alert in alerts] == [(20, "critical")]
