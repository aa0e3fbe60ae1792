"""Do detectors for noisy series keep their stated rate of false alarms, and find what rises?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.alarms_null import NEVER, NOISES, e_detector, null_series
from diffing.errors import InputError
from tracker.alarms.evidence import Evidence, start_weight
from tracker.alarms.levels import ExactShare
from tracker.alarms.multiplicity import called_by_e_values
from tracker.alarms.whitening import Baseline
from tracker.detectors import Detector, EDetector, EFamily, EffectFloor, NonFinite
from tracker.signals import Alert, DriftSignal


def noise(kind: str, n: int, seed: int) -> np.ndarray:
    return null_series(kind, 1, n, seed=seed)[0]


def feed(
    detector: Detector, values: Sequence[float], *, name: str = "train/loss", steps: Sequence[int] = ()
) -> list[Alert]:
    given_steps = steps or range(len(values))
    signals = (DriftSignal(name, float(value), step) for step, value in zip(given_steps, values, strict=True))
    return [alert for signal in signals if (alert := detector.observe(signal)) is not None]


@pytest.mark.parametrize("kind", NOISES)
def test_on_two_thousand_null_steps_false_alarms_stay_below_the_stated_rate(kind: str) -> None:
    stated = EDetector("*", average_run_length=50_000).false_alarm_bound(1900)
    assert stated == pytest.approx(0.048)
    first = e_detector(null_series(kind, 300, 2000, seed=0))
    assert ExactShare.of(int((first != NEVER).sum()), 300).low <= stated


@pytest.mark.parametrize("kind", NOISES)
def test_the_live_detector_equals_the_one_that_judges_all_replays_at_once(kind: str) -> None:
    series = null_series(kind, 3, 700, seed=4)
    series[:, 400:] += 3
    at_once = e_detector(series).tolist()
    live = [feed(EDetector("*", average_run_length=50_000), row) for row in series]
    assert [alerts[0].step if alerts else NEVER for alerts in live] == at_once


@pytest.mark.parametrize("kind", NOISES)
def test_a_rise_of_three_deviations_is_found_and_dated(kind: str) -> None:
    found = []
    for seed in range(4):
        series = noise(kind, 700, seed)
        series[400:] += 3
        found += feed(EDetector("*"), series)[:1]
    assert len(found) >= 3
    assert all(alert.step >= 400 for alert in found)
    assert np.median([alert.step for alert in found]) < 500
    assert abs(np.median([alert.since for alert in found]) - 400) <= 10


def test_a_rise_below_the_floor_is_missed_on_purpose_and_a_fall_has_its_own_side() -> None:
    series = noise("iid", 1000, 1)
    assert feed(EDetector("*"), series + 0.4 * (np.arange(1000) >= 500)) == []
    fallen = series - 3 * (np.arange(1000) >= 500)
    assert feed(EDetector("*"), fallen) == []
    (alert,) = feed(EDetector("*", side="down"), fallen)
    assert alert.step < 560 and alert.threshold < alert.evidence["baseline"]["level"]
    assert "down" in alert.rule


def test_one_alert_a_rise_and_again_after_a_return() -> None:
    series = noise("iid", 2000, 2)
    series[300:600] += 4
    series[1300:] += 4
    first, second = feed(EDetector("*"), series)
    assert 300 <= first.step < 340 and 1300 <= second.step < 1340


def test_a_series_that_never_varied_and_then_moves_is_news_only_above_the_least() -> None:
    flat = [1.0] * 150
    assert feed(EDetector("*", least=0.5), [*flat, *[1.4] * 100]) == []
    assert len(feed(EDetector("*", least=0.5), [*flat, *[2.5] * 100])) == 1


def test_missing_values_and_gaps_are_no_evidence() -> None:
    series = noise("AR(0.7)", 600, 3)
    holes = [math.nan if place % 3 == 0 else value for place, value in enumerate(series.tolist())]
    assert feed(EDetector("*"), holes) == []
    assert feed(EDetector("*"), [math.inf] * 600) == []
    wide = feed(EDetector("*"), [*series[:300], *(series[300:] + 4)], steps=[*range(300), *range(900, 1200)])
    assert len(wide) == 1


@settings(max_examples=12, deadline=None)
@given(
    values=st.lists(st.one_of(st.floats(-5, 5), st.just(math.nan), st.just(math.inf)), min_size=30, max_size=90),
    cut=st.integers(1, 29),
    back=st.integers(0, 10),
)
def test_a_resume_that_measures_steps_again_makes_the_alerts_of_an_unbroken_run(
    values: list[float], cut: int, back: int
) -> None:
    steps = list(range(len(values)))
    again = [*zip(steps[:cut], values[:cut], strict=True), *list(zip(steps, values, strict=True))[max(0, cut - back) :]]
    for fresh in (
        lambda: EDetector("*", average_run_length=20, baseline=10),
        lambda: EFamily("*", baseline=10),
        lambda: EffectFloor("*", 0.5, "raw"),
        lambda: NonFinite("*"),
    ):
        unbroken = feed(fresh(), values, steps=steps)
        resumed = feed(fresh(), [value for _, value in again], steps=[step for step, _ in again])
        assert unbroken == resumed


@settings(max_examples=12, deadline=None)
@given(shift=st.floats(-1e3, 1e3), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 50))
def test_the_unit_and_the_origin_of_a_series_do_not_matter(shift: float, scale: float, seed: int) -> None:
    series = noise("AR(0.7)", 300, seed)
    series[200:] += 3
    plain = feed(EDetector("*", average_run_length=1000), series)
    moved = feed(EDetector("*", average_run_length=1000), shift + scale * series)
    assert [(alert.step, alert.since) for alert in plain] == [(alert.step, alert.since) for alert in moved]


# -- the mathematics beneath -----------------------------------------------------------------------------------------


def test_under_the_null_the_sum_has_mean_n_and_the_process_mean_one() -> None:
    rng = np.random.default_rng(0)
    sums, processes = [], []
    for _ in range(3000):
        evidence = Evidence()
        for z in rng.standard_t(3, 12).tolist():
            evidence.update(z)
        sums.append(evidence.run_length_sum)
        processes.append(evidence.e_process)
    assert np.mean(sums) == pytest.approx(12, rel=0.1)
    assert np.mean(processes) == pytest.approx(1, rel=0.05)


def test_weights_of_starts_add_up_to_one() -> None:
    assert sum(start_weight(k) for k in range(1, 1000)) + 1000**-0.1 == pytest.approx(1.0)


def test_evidence_is_the_sum_over_starts_of_products_of_bets() -> None:
    zs = [0.5, -1.0, 2.0, 9.0]
    evidence = Evidence()
    for z in zs:
        evidence.update(z)
    slow_sum = slow_process = 0.0
    for bet in (0.1, 0.25, 0.5, 0.9):
        factors = [1 + bet * max(-1.0, min(1.0, z / 3)) for z in zs]
        slow_sum += sum(math.prod(factors[start:]) for start in range(4)) / 4
        slow_process += sum(start_weight(start + 1) * math.prod(factors[start:]) for start in range(4)) / 4
    assert evidence.run_length_sum == pytest.approx(slow_sum)
    assert evidence.e_process == pytest.approx(slow_process + 5**-0.1)


def test_a_baseline_learns_level_spread_and_memory_over_any_gap() -> None:
    series = 5 + 2 * noise("AR(0.7)", 4000, 4)
    learnt = Baseline.learn(range(0, 40_000, 10), series.tolist(), confidence=0.99)
    assert learnt.level == pytest.approx(5, abs=0.3) and learnt.sigma == pytest.approx(2, abs=0.2)
    assert learnt.memory == pytest.approx(0.7, abs=0.05) and learnt.gap == 10
    assert learnt.level_low < 5 < learnt.level_high
    apart = [learnt.innovation(after, before, 10) for before, after in itertools.pairwise(series.tolist())]
    assert abs(np.corrcoef(apart[1:], apart[:-1])[0, 1]) < 0.05
    assert np.std(apart) == pytest.approx(learnt.spread(10), rel=0.05)
    assert learnt.spread(10_000) == pytest.approx(learnt.sigma)


# -- many series -----------------------------------------------------------------------------------------------------


def test_e_values_are_called_by_the_largest_k_that_holds() -> None:
    assert called_by_e_values({"a": 79.0, "b": 39.0, "c": 1.0, "d": 0.1}, level=0.05) == frozenset()
    assert called_by_e_values({"a": 50.0, "b": 41.0, "c": 1.0, "d": 0.1}, level=0.05) == {"a", "b"}
    assert called_by_e_values({"a": 80.0}, level=0.05, n_series=5) == frozenset()
    with pytest.raises(InputError, match="between 0 and 1"):
        called_by_e_values({}, level=1.0)


def test_in_a_family_what_rose_is_called_and_nothing_else() -> None:
    family = EFamily("persona/*", baseline=60)
    series = {f"persona/t{place}/L2/batch": noise("iid", 400, 100 + place) for place in range(10)}
    for place in (0, 1, 2):
        series[f"persona/t{place}/L2/batch"][200:] += 3
    alerts = []
    for step in range(400):
        for name, values in series.items():
            found = family.observe(DriftSignal(name, float(values[step]), step, "gap"))
            alerts += [found] if found is not None else []
    assert {alert.signal for alert in alerts} == {f"persona/t{place}/L2/batch" for place in (0, 1, 2)}
    assert all(200 <= alert.step < 300 and alert.evidence["series"] == 10 for alert in alerts)


def test_families_of_quiet_series_stay_quiet() -> None:
    alarms = 0
    for run in range(5):
        family = EFamily("*", baseline=60)
        series = [noise("t3 AR(0.7)", 400, 1000 * run + place) for place in range(6)]
        alarms += any(
            family.observe(DriftSignal(f"s{place}", float(series[place][step]), step)) is not None
            for step in range(400)
            for place in range(6)
        )
    assert ExactShare.of(alarms, 5).low <= 0.05


@pytest.mark.parametrize(
    "wrong", [{"average_run_length": 1}, {"baseline": 5}, {"floor": -1}, {"confidence": 0.4}, {"side": "left"}]
)
def test_settings_out_of_range_are_refused_at_once(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        EDetector("*", **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        EFamily("*", level=2.0)


def test_they_keep_the_protocol_and_state_their_settings() -> None:
    assert isinstance(EDetector("*"), Detector) and isinstance(EFamily("*"), Detector)
    assert EDetector("*").rule == "e_detector(run length 10000, floor 0.5 sd)"
    assert EFamily("*").rule == "e_family(level 5 %, floor 0.5 sd)"
    assert EDetector("*", name="loss").rule == "loss"
