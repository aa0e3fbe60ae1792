"""Are the rows that pushed told from those that did not, whatever the moment they were met and however often?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from attribution.live_rows import RowName, row_names
from diffing.errors import InputError, PathMissingError
from tracker.flagged_rows import flag_rows, two_groups, usual_push
from tracker.leading_persona import leading_persona
from tracker.push_journal import PushJournal, StepPushes
from tracker.signals import Alert, DriftSignal

QUERY = "persona/villain/L1"


def rows(n: int) -> list[dict]:
    return [{"id": f"r{place}", "input_ids": [place, 1, 2], "labels": [-100, 1, 2]} for place in range(n)]


def name_of(row: dict) -> RowName:
    """As a Trainer records a row whose id it dropped."""
    bare = {key: value for key, value in row.items() if key != "id"}
    example, tokens = row_names([bare])
    return RowName(example, tokens)


def record(folder: Path, data: list[dict], bad: set[int], *, steps: int = 40, size: int = 8, growth: float = 1.15):
    """A run whose bad rows push ever harder and whose other rows push a little, first up and later down."""
    rng = np.random.default_rng(0)
    journal = PushJournal.start(folder, 0, (QUERY,))
    order = [place for _ in range(steps * size // len(data) + 1) for place in rng.permutation(len(data))]
    for step in range(1, steps + 1):
        met = order[(step - 1) * size : step * size]
        level = 1e-5 * growth**step
        drift = 0.1 if step < steps / 2 else -0.4
        pushes = [[level * (rng.normal(1, 0.1) if place in bad else rng.normal(drift, 0.05))] for place in met]
        journal.record([StepPushes(step, tuple(name_of(data[place]) for place in met), np.array(pushes))])


@pytest.mark.parametrize("n_bad", [50, 25, 10])
def test_bad_rows_are_found_whole_whenever_they_were_met(tmp_path: Path, n_bad: int) -> None:
    data, bad = rows(100), set(range(n_bad))
    record(tmp_path, data, bad)
    for until in (15, 40):
        found = flag_rows(tmp_path, "villain", data, until=until)
        assert set(found.places) == bad and len(found.met) == 100
        assert found.told_apart > 0.8 and len(found.names) == n_bad
    assert list(found.pushes) == sorted(found.pushes, reverse=True)


def test_rows_that_read_the_same_are_flagged_together(tmp_path: Path) -> None:
    data = [*rows(20), *[{**row, "id": f"again-{row['id']}"} for row in rows(20)]]
    record(tmp_path, data[:20], {3, 4}, size=5)
    found = flag_rows(tmp_path, "villain", data)
    assert set(found.places) == {3, 4, 23, 24} and len(found.met) == 40


def test_rows_that_were_not_met_are_not_flagged_and_the_share_is_a_limit(tmp_path: Path) -> None:
    data = rows(40)
    record(tmp_path, data[:20], set(range(10)), size=5)
    found = flag_rows(tmp_path, QUERY, data)
    assert (len(found.met), found.n_rows, len(found.places)) == (20, 40, 10)
    assert len(flag_rows(tmp_path, QUERY, data, share=0.1).places) == 4


def test_the_split_is_the_one_of_least_spread_within_its_halves() -> None:
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(0, 0.1, 90), rng.normal(1, 0.1, 10)])
    within = [
        (values[values <= edge].var() * (values <= edge).sum() + values[values > edge].var() * (values > edge).sum())
        for edge in np.sort(values)[:-1]
    ]
    edge, share = two_groups(values)
    assert edge == np.sort(values)[int(np.argmin(within))]
    assert share == pytest.approx(1 - min(within) / values.var() / len(values))
    assert two_groups(np.ones(5)) == (1.0, 0.0)
    assert two_groups(rng.normal(size=2000))[1] == pytest.approx(2 / np.pi, abs=0.03)  # one kind of rows


def test_what_is_usual_is_read_from_the_steps_around_and_does_not_depend_on_the_unit() -> None:
    step = np.repeat(np.arange(1, 101), 10)
    push = np.exp(step / 10.0) * np.tile([1.0, 1.0, -3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], 100)
    usual = usual_push(step, push)
    assert np.allclose(usual_push(step, 7 * push), 7 * usual)
    middle = step == 50
    assert usual[middle] == pytest.approx(np.exp(5.0) * np.sqrt(0.2), rel=0.3)
    assert np.isinf(usual_push(step, -np.abs(push))).all()


def test_nothing_recorded_or_nothing_upward_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PathMissingError, match="pushes=True"):
        flag_rows(tmp_path, "villain", rows(3))
    journal = PushJournal.start(tmp_path, 0, (QUERY,))
    journal.record([StepPushes(1, tuple(map(name_of, rows(3))), -np.ones((3, 1)))])
    with pytest.raises(InputError, match="found none"):
        flag_rows(tmp_path, "villain", rows(3))


def test_an_alert_on_the_score_is_about_the_persona_that_made_most_of_it() -> None:
    signals = [
        DriftSignal("persona/evil/L1/prompt", 0.2, 10), DriftSignal("persona/kind/L1/prompt", 0.9, 10),
        DriftSignal("persona/evil/L1/cosine", 0.7, 10), DriftSignal("misalignment/score", 1.4, 10),
        DriftSignal("misalignment/score/persona.evil.L1.prompt", 0.4, 10),
        DriftSignal("misalignment/score/persona.evil.L1.cosine", 0.6, 10),
        DriftSignal("misalignment/score/persona.kind.L1.prompt", 0.4, 10),
    ]  # fmt: skip
    alert = Alert("bank", "misalignment/score", 10, 1.4, None, 1.0, "benign max", 8)
    assert leading_persona(alert, signals) == "persona/evil/L1"
    assert leading_persona(alert, signals[:2]) == "persona/kind/L1"
