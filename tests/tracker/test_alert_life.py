"""Does an alert go through its states once, whatever is killed, resumed or measured twice?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.main import palimpsest
from tracker.alert_life import ACKNOWLEDGED, FIRING, PENDING, RESOLVED, incidents, is_muted, requested_actions
from tracker.events import AlertAcknowledged, AlertChanged
from tracker.journal import Journal
from tracker.pipeline import Pipeline
from tracker.replay import judge, replay_alerts
from tracker.rules import Rule, RuleSet
from tracker.signals import DriftSignal
from tracker.sinks import RunInfo

EVIL, LOSS = "persona/evil/L2/prompt", "train/loss"
FLOOR = {"floor": 0.25, "unit": "gap", "in_a_row": 2}


def rules(**evil: object) -> RuleSet:
    return RuleSet(
        (
            Rule("evil", "persona/evil/*", "effect_floor", FLOOR, **evil),  # type: ignore[arg-type]
            Rule("spike", LOSS, "non_finite", severity="critical"),
        )
    )


def drifts(*values: float, start: int = 10, every: int = 10) -> list[DriftSignal]:
    return [DriftSignal(EVIL, value, start + every * place, "gap") for place, value in enumerate(values)]


def states(changes: list[AlertChanged]) -> list[tuple[int, str]]:
    return [(change.step, change.state) for change in changes]


def test_an_incident_is_pending_then_fires_then_resolves() -> None:
    alerts, changes = judge(drifts(0.1, 0.3, 0.3, 0.3, 0.1, 0.1), rules())
    assert [alert.step for alert in alerts] == [30]
    assert states(changes) == [(20, PENDING), (30, FIRING), (50, RESOLVED)]
    assert changes[1].alert == alerts[0].id == "persona.evil.L2.prompt@30~evil"
    (incident,) = incidents(alerts, changes)
    assert incident.state == RESOLVED and incident.since == 50


def test_a_case_that_is_dropped_leaves_no_incident() -> None:
    alerts, changes = judge(drifts(0.3, 0.1), rules())
    assert not alerts and states(changes) == [(10, PENDING), (20, "quiet")]
    assert incidents(alerts, changes) == []
    (pending,) = incidents(*judge(drifts(0.3), rules()))
    assert pending.state == PENDING and not pending.alerts


def test_a_second_crossing_within_the_cooldown_is_recorded_and_muted() -> None:
    series = drifts(0.3, 0.3, 0.0, 0.3, 0.3, 0.0, 0.3, 0.3)
    alerts, _ = judge(series, rules(cooldown=50, actions=("stop",)))
    assert [(alert.step, is_muted(alert)) for alert in alerts] == [(20, False), (50, True), (80, False)]
    assert "cooldown" in alerts[1].evidence["muted"]
    assert requested_actions(alerts[0], ("log",)) == ("stop",)
    assert requested_actions(alerts[1], ("log",)) == ()


def test_a_loss_that_diverged_explains_the_persona_away() -> None:
    nan = DriftSignal(LOSS, float("nan"), 15)
    alerts, _ = judge([nan, *drifts(0.3, 0.3, start=20)], rules(inhibited_by=("spike",), inhibit_within=20))
    assert [(alert.signal, is_muted(alert)) for alert in alerts] == [(LOSS, False), (EVIL, True)]
    recovered = [nan, DriftSignal(LOSS, 1.0, 16), *drifts(0.3, 0.3, start=90)]
    alerts, _ = judge(recovered, rules(inhibited_by=("spike",), inhibit_within=20))
    assert [is_muted(alert) for alert in alerts] == [False, False]


def test_a_tracker_that_fell_silent_is_an_incident_until_it_speaks() -> None:
    quiet = RuleSet((Rule("quiet", "persona/*", "silence", {"steps": 30}),))
    loss = [DriftSignal(LOSS, 1.0, step) for step in range(0, 100, 10)]
    series = sorted([*drifts(0.1, start=20), *loss, *drifts(0.1, start=80)], key=lambda one: one.step)
    alerts, changes = judge(series, quiet)
    assert [(alert.step, alert.since, alert.value) for alert in alerts] == [(50, 20, 30.0)]
    assert [state for _, state in states(changes)] == [FIRING, RESOLVED]


@given(st.lists(st.sampled_from([0.0, 0.1, 0.24, 0.26, 0.4, float("nan")]), max_size=12), st.integers(0, 11))
@settings(max_examples=15, deadline=None)
def test_a_journal_that_is_replayed_gives_the_same_life(tmp_path_factory, values, killed_after) -> None:
    series = drifts(*values)
    folder = tmp_path_factory.mktemp("run")
    whole, pieces = folder / "whole", folder / "pieces"
    set_ = rules(cooldown=40)
    cut = min(killed_after, len(series))
    done = series[cut - 1].step if cut else 0
    for run_dir, parts in ((whole, [(0, series)]), (pieces, [(0, series[:cut]), (done, series[cut:])])):
        for step, part in parts:
            with Journal.create_or_open(run_dir) as journal:
                journal.start_attempt(step, {})
                pipeline = Pipeline(journal, set_.detectors())
                pipeline.start(RunInfo(run_dir))
                for signal in part:
                    pipeline.feed([signal])
    with Journal.read(whole) as one, Journal.read(pieces) as two:
        assert [alert.id for alert in one.alerts()] == [alert.id for alert in two.alerts()]
        left, right = ([event for event in j.events() if isinstance(event, AlertChanged)] for j in (one, two))
        assert left == right


def recorded(run_dir: Path, series: list[DriftSignal]) -> None:
    with Journal.create_or_open(run_dir) as journal:
        journal.start_attempt(0, {})
        pipeline = Pipeline(journal, rules().detectors())
        pipeline.start(RunInfo(run_dir))
        for signal in series:
            pipeline.feed([signal])


def test_an_acknowledgement_holds_over_a_resume_and_until_it_fires_again(tmp_path: Path) -> None:
    recorded(tmp_path, drifts(0.3, 0.3, 0.3))
    run = CliRunner().invoke(palimpsest, ["alerts", str(tmp_path), "--gate", "--json"])
    assert run.exit_code == 1
    (found,) = json.loads(run.stdout)["incidents"]
    assert found["state"] == FIRING
    arguments = ["alerts", str(tmp_path), "--ack", found["alerts"][0], "--by", "ada", "--note", "seen", "--gate"]
    assert CliRunner().invoke(palimpsest, arguments).exit_code == 0
    with Journal.create_or_open(tmp_path) as journal:
        journal.start_attempt(25, {})
        pipeline = Pipeline(journal, rules().detectors())
        pipeline.start(RunInfo(tmp_path))
        pipeline.feed(drifts(0.3, start=30))
        (one,) = incidents(journal.alerts(), journal.events())
        assert (one.state, one.by, one.note) == (ACKNOWLEDGED, "ada", "seen")
        for signal in drifts(0.0, 0.3, 0.3, start=40):
            pipeline.feed([signal])
        (one,) = incidents(journal.alerts(), journal.events())
        assert one.state == FIRING and len(one.alerts) == 2
        assert any(isinstance(event, AlertAcknowledged) for event in journal.events())


def test_an_unknown_alert_cannot_be_acknowledged(tmp_path: Path) -> None:
    recorded(tmp_path, drifts(0.3, 0.3))
    run = CliRunner().invoke(palimpsest, ["alerts", str(tmp_path), "--ack", "nobody"])
    assert "Known: persona.evil.L2.prompt@20~evil" in str(run.exception)


def test_a_run_that_fell_silent_is_noticed_from_outside(tmp_path: Path) -> None:
    recorded(tmp_path, drifts(0.1))
    assert CliRunner().invoke(palimpsest, ["alerts", str(tmp_path), "--stale", "3600"]).exit_code == 0
    assert CliRunner().invoke(palimpsest, ["alerts", str(tmp_path), "--stale", "0"]).exit_code == 1


def test_other_rules_judge_an_old_run_and_change_nothing(tmp_path: Path) -> None:
    recorded(tmp_path / "run", drifts(0.1, 0.2, 0.3, 0.3))
    before = (tmp_path / "run" / "journal.db").read_bytes()
    lower = Rule("lower", "persona/*", "effect_floor", {"floor": 0.15, "unit": "gap", "in_a_row": 2})
    found = replay_alerts(tmp_path / "run", RuleSet((lower, Rule("none", "weights/*", "non_finite"))))
    assert [alert.step for alert in found.alerts] == [30] and [alert.step for alert in found.before] == [40]
    assert found.unmatched == ("none",)
    (tmp_path / "rules.yaml").write_text(
        "rules:\n  - {name: lower, signal: persona/*, detector: {kind: effect_floor, floor: 0.15}, for: 2}\n"
    )
    arguments = ["replay-alerts", str(tmp_path / "run"), "--rules", str(tmp_path / "rules.yaml")]
    assert "lower" in CliRunner().invoke(palimpsest, arguments).output
    run = CliRunner().invoke(palimpsest, [*arguments, "--gate", "--json"])
    assert run.exit_code == 1 and json.loads(run.stdout)["alerts"][0]["step"] == 30
    assert (tmp_path / "run" / "journal.db").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("rules:\n  - name: a\n    signal: x\n    detector: nonsense\n", 4, "nonsense"),
        ("rules:\n  - name: a\n    signal: x\n    detector: {kind: effect_floor, flor: 1}\n", 2, "flor"),
        ("rules:\n  - name: a\n    signal: x\n    detector: non_finite\n    colour: red\n", 5, "colour"),
        ("rules:\n  - name: a\n    detector: non_finite\n", 2, "signal"),
        ("rules:\n  - {name: a, signal: x, detector: non_finite, notify: [nobody]}\n", 2, "nobody"),
        ("rules:\n  - {name: a, signal: x, detector: non_finite, inhibited_by: [b]}\n", 2, "'b'"),
        ("rules:\n  - {name: a, signal: x, detector: non_finite, actions: [explode]}\n", 2, "explode"),
        (
            "rules:\n  - {name: a, signal: x, detector: non_finite}\n  - {name: a, signal: y, detector: silence}\n",
            2,
            "once",
        ),
        ("rules:\n  - name: a\n   signal: x\n", 3, "expected YAML"),
        ("rules: []\n", 1, "list of rules"),
        ("rule:\n  - x\n", 1, "'rule'"),
        ("receivers:\n  ops: {mail: me}\nrules:\n  - {name: a, signal: x, detector: silence}\n", 2, "ops"),
        ("rules:\n  - {name: a, signal: x, detector: {kind: effect_floor, floor: -1}}\n", 2, "floor"),
        ("rules:\n  - {name: a, signal: x, detector: silence, for: -2}\n", 2, "for"),
        ("rules: !!python/object/apply:os.system ['x']\n", 1, "rules"),
    ],
)
def test_a_rule_file_is_refused_with_the_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(Exception, match=f"line {line}") as refused:
        RuleSet.load(path)
    assert said in str(refused.value) or said == "once"
    assert "\n" not in str(refused.value)
