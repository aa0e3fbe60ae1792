"""Does a bank of benign runs vouch for what it says, and refuse what it cannot say?"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cli.calibrate import calibrate
from diffing.errors import ComparabilityError, InputError, PathMissingError
from tracker.alarms.bank import NullBank
from tracker.alarms.calibration import calibrate_signals
from tracker.alarms.fusion import SCORE, MisalignmentScore, ScoreStream
from tracker.alarms.fusion_fit import fit_score, left_out_scores
from tracker.alarms.levels import ExactShare, conformal_p, conformal_threshold, nulls_needed
from tracker.alarms.pace import Pace, ahead
from tracker.alarms.run_maximum import null_maxima, run_maximum
from tracker.alarms.run_series import RunSeries, by_step
from tracker.detectors import MaxOverRun
from tracker.journal import Journal
from tracker.signals import Alert, DriftSignal

PROMPT, CANARY = "persona/evil/L2/prompt", "misalignment/canary"
BATCH, COSINE, DRIFT = "persona/evil/L2/batch", "persona/evil/L2/cosine", "drift/L2/norm"
UNITS = {PROMPT: "gap", CANARY: "nats/token", BATCH: "gap", COSINE: "cosine", DRIFT: "relative"}
SIGNATURE = {"model": "m", "schedule": "every 10"}


def measured(values: dict[str, Sequence[float]], *, every: int = 10) -> list[DriftSignal]:
    """Signals of all series, step by step; None is a step that was not measured."""
    length = max(len(series) for series in values.values())
    return [
        DriftSignal(name, series[place], place * every, UNITS[name], n=40)
        for place in range(length)
        for name, series in values.items()
        if place < len(series) and series[place] is not None
    ]


def benign(seed: int, *, size: float = 0.1) -> RunSeries:
    """A benign fine-tune: all signals wander up by a run's own amount; the batch's projection says nothing."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, 11)
    return RunSeries.of(
        measured(
            {
                PROMPT: (ramp * rng.normal(0.5, 1) * size + rng.normal(0, 0.01, 11)).tolist(),
                CANARY: (ramp * rng.normal(0, 1) * size / 2 + rng.normal(0, 0.01, 11)).tolist(),
                BATCH: rng.normal(0, 0.8, 11).tolist(),
                COSINE: rng.normal(0.1, 0.1, 11).tolist(),
                DRIFT: (ramp * 0.2).tolist(),
            }
        ),
        source=f"benign-{seed}",
        signature=SIGNATURE,
    )


def bank_of(n: int, *, start: int = 0) -> NullBank:
    return NullBank.of(benign(seed) for seed in range(start, start + n))


def feed(detector: MaxOverRun, signals: Sequence[DriftSignal]) -> list[Alert]:
    return [alert for signal in signals if (alert := detector.observe(signal)) is not None]


# -- levels ----------------------------------------------------------------------------------------------------------


def test_nineteen_runs_vouch_for_five_per_cent_and_ninety_nine_for_one() -> None:
    assert [nulls_needed(level) for level in (0.05, 0.01, 0.1, 0.5)] == [19, 99, 9, 1]
    assert conformal_threshold(list(range(19)), 0.05) == 18
    assert conformal_threshold(list(range(39)), 0.05) == 37  # two of forty
    with pytest.raises(InputError, match=r"at least 19 benign runs for a false-alarm rate of 5 %, got 18; these vouch"):
        conformal_threshold(list(range(18)), 0.05)


@pytest.mark.parametrize("level", [0.05, 0.1, 0.2, 0.37])
def test_exceeding_the_threshold_is_the_same_as_a_p_value_of_at_most_the_level(level: float) -> None:
    rng = np.random.default_rng(3)
    nulls = np.round(rng.normal(size=27), 1).tolist()
    threshold = conformal_threshold(nulls, level)
    for value in np.round(rng.normal(size=200), 1).tolist():
        assert (value > threshold) == (conformal_p(value, nulls) <= level + 1e-12)


def test_the_false_alarm_rate_of_a_single_signal_is_at_most_the_stated_one() -> None:
    rng = np.random.default_rng(5)
    draws = rng.standard_t(2, size=(4000, 20))  # any law, as long as all runs share it
    alarms = sum(
        run > conformal_threshold(nulls.tolist(), 0.05)
        for *nulls, run in map(np.array, draws)
        for nulls in [np.array(nulls)]
    )
    share = ExactShare.of(int(alarms), 4000)
    assert share.low <= 0.05
    assert share.high >= 0.05 - 0.01  # and not idle


def test_the_exact_interval_of_no_alarms_in_36_ends_below_ten_per_cent() -> None:
    assert ExactShare.of(0, 36).high == pytest.approx(1 - 0.025 ** (1 / 36))
    assert (ExactShare.of(5, 5).high, ExactShare.of(0, 0).high) == (1.0, 1.0)
    assert str(ExactShare.of(1, 20)).startswith("1 of 20 (5.0%, 95 % interval 0.1% to 24.9%)")


# -- the statistic of a run ------------------------------------------------------------------------------------------


def test_the_maximum_is_of_the_lower_of_two_in_a_row_and_missing_values_break_nothing() -> None:
    series = [DriftSignal(PROMPT, value, step, "gap") for step, value in enumerate([0.0, 5.0, 1.0, math.nan, 2.0, 0.0])]
    assert run_maximum(series) == 5.0
    assert run_maximum(series, in_a_row=2) == 1.0
    assert run_maximum(series[:3], in_a_row=5) == -math.inf
    assert run_maximum(series, until=0) == 0.0


def test_several_signals_are_standardised_so_that_none_drowns_the_others() -> None:
    bank = bank_of(30)
    nulls = null_maxima(bank, "persona/*")
    assert len(nulls.members) == 3 and len(nulls.values) == 30
    assert nulls.spreads[BATCH] > 3 * nulls.spreads[PROMPT]
    with pytest.raises(InputError, match="found none; it holds"):
        null_maxima(bank, "persona/good/*")


# -- the bank --------------------------------------------------------------------------------------------------------


def test_a_bank_comes_back_equal_and_a_run_counts_once(tmp_path: Path) -> None:
    bank = bank_of(5)
    bank.save(tmp_path)
    assert NullBank.load(tmp_path) == bank
    again = bank.with_runs([benign(2), benign(7)])
    again.save(tmp_path)
    assert len(NullBank.load(tmp_path)) == 6
    assert bank.horizon == 100


def test_numbers_that_are_none_survive_in_strict_json(tmp_path: Path) -> None:
    run = RunSeries.of(
        [DriftSignal(PROMPT, math.nan, 0, "gap"), DriftSignal(PROMPT, math.inf, 1, "gap", -math.inf, None)],
        source="odd",
        signature=SIGNATURE,
    )
    NullBank.of([run]).save(tmp_path)
    (kept,) = NullBank.load(tmp_path).runs
    first, second = kept.series[PROMPT]
    assert math.isnan(first.value) and (second.value, second.low, second.high) == (math.inf, -math.inf, None)


def test_a_run_measured_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    other = RunSeries.of(measured({PROMPT: [0.0]}), source="other", signature={**SIGNATURE, "schedule": "every 5"})
    with pytest.raises(ComparabilityError, match=r"schedule \(bank every 10, other every 5\)"):
        bank_of(3).with_runs([other])
    with pytest.raises(InputError, match="got none"):
        NullBank.of([])


def test_a_damaged_bank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PathMissingError, match="palimpsest calibrate"):
        NullBank.load(tmp_path)
    bank_of(3).save(tmp_path)
    path = next((tmp_path / "runs").iterdir())
    path.write_text(path.read_text().replace("[[0, ", "[[0, 1", 1).replace("0.0", "0.5", 1))
    with pytest.raises(InputError, match=r"other numbers|something else"):
        NullBank.load(tmp_path)
    (tmp_path / "bank.json").write_text("{}")
    with pytest.raises(InputError, match="got something else"):
        NullBank.load(tmp_path)


# -- the score -------------------------------------------------------------------------------------------------------


def test_the_score_trusts_what_is_quiet_in_benign_runs_and_never_turns_a_sign() -> None:
    score = fit_score([benign(seed) for seed in range(30)])
    weights = {part.signal: part.weight for part in score.parts}
    assert weights[CANARY] == pytest.approx(1.0)  # alone in its group
    assert sum(weights.values()) == pytest.approx(2.0)
    assert min(weights.values()) >= 0
    assert weights[PROMPT] > weights[BATCH]
    assert weights[BATCH] < 0.1


def test_one_is_the_largest_benign_run_when_each_is_scored_by_the_others() -> None:
    runs = [benign(seed) for seed in range(12)]
    highest = [max(one.value for one in series if one.name == SCORE) for series in left_out_scores(runs)]
    assert max(highest) == pytest.approx(1.0)


def test_parts_add_up_to_their_kind_and_the_smaller_kind_is_the_score_with_its_interval() -> None:
    score = fit_score([benign(seed) for seed in range(12)])
    signals = [
        DriftSignal(PROMPT, 0.2, 10, "gap", 0.1, 0.3, 40),
        DriftSignal(BATCH, 0.9, 10, "gap"),
        DriftSignal(CANARY, 0.1, 10, "nats/token", 0.05, 0.15, 20),
    ]
    found = {one.name.removeprefix(SCORE + "/"): one for one in ScoreStream(score).take(signals[::-1])}
    whole = found.pop(SCORE)
    inside = found["persona.evil.L2.prompt"].value + found["persona.evil.L2.batch"].value
    assert found["activations"].value == pytest.approx(inside)
    assert found["answers"].value == pytest.approx(found["misalignment.canary"].value)
    assert whole.value == min(found["activations"].value, found["answers"].value)
    assert whole.low == min(found["activations"].low, found["answers"].low)
    assert whole.low < whole.value < whole.high
    assert found["answers"].value - found["answers"].low == pytest.approx(found["answers"].value / 2)


def test_one_kind_of_evidence_alone_is_none() -> None:
    score = fit_score([benign(seed) for seed in range(12)])

    def at(prompt: float, canary: float) -> float:
        return score.follow(measured({PROMPT: [prompt], CANARY: [canary], BATCH: [0.0]}))[0].value

    assert at(5.0, 0.0) == at(0.0, 5.0) == 0.0
    assert at(5.0, 5.0) > at(5.0, 0.5) > 0
    assert score.follow(measured({PROMPT: [5.0], BATCH: [0.0]})) == []  # canaries were never asked


def test_of_several_personas_the_strongest_counts_and_personas_can_be_registered() -> None:
    other = "persona/kind/L2/prompt"

    def both(run: RunSeries) -> RunSeries:
        kind = tuple(replace(one, name=other) for one in run.series[PROMPT])
        return replace(run, series={**run.series, other: kind})

    bank = NullBank.of([both(benign(seed)) for seed in range(12)])
    moved = [
        *measured({PROMPT: [0.1], BATCH: [0.0], CANARY: [3.0]}),
        DriftSignal(other, 2.0, 0, "gap"),
    ]
    plain, only_evil = (fit_score(one.runs, signals=one.fused) for one in (bank, bank.counting(["evil"])))
    assert {part.group for part in plain.parts} == {"persona/evil", "persona/kind", "answers"}
    assert {part.group for part in only_evil.parts} == {"persona/evil", "answers"}
    assert plain.follow(moved)[0].value > 5 * only_evil.follow(moved)[0].value > 0
    with pytest.raises(InputError, match="out of evil, kind; got 'eval'"):
        bank.counting(["eval"])


def test_a_rise_is_expected_to_go_on_as_far_as_it_was_seen_and_a_fall_is_not() -> None:
    straight = Pace()
    assert [straight.rise(step, 0.5 * step) for step in (0, 10)] == [0.0, 0.0]  # two points show no pace
    assert straight.rise(30, 15.0) == pytest.approx(15.0)  # gaps count by their steps
    assert [Pace().rise(step, -step) for step in range(3)][-1] == 0.0
    values = np.random.default_rng(0).normal(size=40).cumsum()
    for end in range(8, 40):
        shown = slice(end - 8, end + 1)
        slope = max(0.0, np.polyfit(np.arange(40)[shown], values[shown], 1)[0])
        assert ahead(list(range(40)), values)[end] == pytest.approx(values[end] + 8 * slope)


def test_of_two_runs_that_stand_equally_high_the_faster_one_scores_higher() -> None:
    score = fit_score([benign(seed) for seed in range(12)])
    still, fast = [0.4] * 6, [0.0, 0.08, 0.16, 0.24, 0.32, 0.4]
    last = [score.follow(measured({PROMPT: one, CANARY: one, BATCH: [0.0]}))[-1].value for one in (still, fast)]
    assert last[1] == pytest.approx(2 * last[0])


def test_what_counts_is_kept_with_the_bank(tmp_path: Path) -> None:
    bank = bank_of(4).counting(["evil"])
    bank.save(tmp_path)
    again = NullBank.load(tmp_path)
    assert again == bank and again.with_runs([benign(9)]).fused == again.without(0).fused == bank.fused != ()


def test_below_a_least_effect_there_is_no_alarm_however_still_the_benign_runs_were() -> None:
    still = NullBank.of([benign(seed, size=1e-4) for seed in range(40)])
    detector = MaxOverRun(bank=still)
    assert detector.threshold == pytest.approx(fit_score(still.runs).floor())
    assert MaxOverRun(bank=still, least_effect=0.0).threshold < detector.threshold
    assert MaxOverRun(PROMPT, bank=still).threshold < 0.1  # a signal's own unit has no floor


def test_missing_parts_are_held_and_the_first_signal_sets_the_steps() -> None:
    score = fit_score([benign(seed) for seed in range(12)])
    first = score.parts[0].signal
    stream = ScoreStream(score)
    assert stream.take([DriftSignal(CANARY, 0.1, 5, "nats/token")]) == []
    (held, *_) = stream.take([DriftSignal(first, 0.5, 10, UNITS[first])])
    (again, *_) = stream.take(
        [DriftSignal(first, 0.5, 20, UNITS[first]), DriftSignal(CANARY, math.nan, 20, "nats/token")]
    )
    assert held.value == again.value > 0


def test_a_direction_counts_in_as_far_as_there_is_a_drift() -> None:
    score = MisalignmentScore(fit_score([benign(seed) for seed in range(12)]).parts, 1.0, 12)
    gated = next(part for part in score.parts if part.signal == COSINE)
    assert gated.gate == DRIFT

    def at(length: float) -> float:
        found = ScoreStream(score).take(measured({PROMPT: [0.0], COSINE: [0.8], DRIFT: [length], CANARY: [0.0]}))
        return next((one.value for one in found if one.name.endswith("cosine")), 0.0)

    assert at(0.0) == 0.0
    assert at(0.05) == pytest.approx(at(0.1) / 2)
    assert at(0.3) == pytest.approx(3 * at(0.1))


def test_runs_that_went_wrong_turn_the_score_towards_what_they_moved() -> None:
    runs = [benign(seed) for seed in range(20)]
    wrong = RunSeries.of(measured({BATCH: [0.0] + [3.0] * 10, PROMPT: [0.0] * 11}), source="w", signature=SIGNATURE)
    plain, taught = fit_score(runs), fit_score(runs, positives=[wrong])
    weight = {
        name: {part.signal: part.weight for part in one.parts}[BATCH] for name, one in (("p", plain), ("t", taught))
    }
    assert weight["t"] > weight["p"] and taught.n_positive == 1


def test_a_score_survives_json_and_a_stream_equals_the_whole() -> None:
    score = fit_score([benign(seed) for seed in range(12)])
    assert MisalignmentScore.from_json(json.loads(json.dumps(score.to_json()))) == score
    signals = benign(99).signals()
    stream = ScoreStream(score)
    assert [one for _, some in by_step(signals) for one in stream.take(some)][::1] != []
    assert score.follow(signals)[0] == ScoreStream(score).take(dict(by_step(signals))[0])[0]


def test_too_few_runs_or_unknown_units_are_refused() -> None:
    with pytest.raises(InputError, match="three or more benign runs"):
        fit_score([benign(0), benign(1)])
    with pytest.raises(InputError, match="Leave it out"):
        fit_score([benign(seed) for seed in range(4)], signals=("drift/*",))
    with pytest.raises(InputError, match="found none"):
        fit_score([benign(seed) for seed in range(4)], signals=("nothing/*",))


# -- the detector ----------------------------------------------------------------------------------------------------


def test_it_fires_once_where_a_run_passes_every_benign_one_and_says_how_rare_that_is() -> None:
    detector = MaxOverRun(PROMPT, bank_of(39), level=0.05, in_a_row=2)
    values = [0.0, 0.1, 2.0, 0.1, 1.0, 1.1, 1.2, 0.0, 3.0, 3.0]
    (alert,) = feed(detector, measured({PROMPT: values}))
    assert (alert.step, alert.since, alert.signal, alert.unit) == (50, 40, PROMPT, "gap")
    assert alert.evidence["p_value"] == pytest.approx(1 / 40) and alert.evidence["benign_runs"] == 39
    assert alert.threshold < alert.value
    assert alert.rule == "max_over_run(level 5 %, 39 benign runs)"


def test_a_bank_that_is_too_small_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="at least 19 benign runs"):
        MaxOverRun(PROMPT, bank_of(18))
    MaxOverRun(PROMPT, bank_of(18), level=0.06)


def test_it_is_silent_beyond_the_steps_that_the_bank_saw() -> None:
    assert feed(MaxOverRun(PROMPT, bank_of(19)), measured({PROMPT: [0.0] * 11 + [9.0]})) == []


def test_one_threshold_holds_for_a_family_of_signals() -> None:
    bank = bank_of(40)
    fresh, alarms = MaxOverRun("persona/*", bank), 0
    for seed in range(1000, 1100):
        alarms += bool(feed(copy.deepcopy(fresh), benign(seed).signals()))
    assert ExactShare.of(alarms, 100).low <= 0.05
    shifted = measured({PROMPT: [0.0] * 5 + [1.5] * 3})
    (alert,) = feed(MaxOverRun("persona/*", bank), shifted)
    assert alert.evidence["watched_together"] == 3


def test_repeated_and_missing_steps_change_nothing() -> None:
    bank, values = bank_of(19), [0.0, 0.1, math.nan, 2.0, 2.0]
    signals = measured({PROMPT: values})
    whole = feed(MaxOverRun(PROMPT, bank, in_a_row=2), signals)
    twice = feed(MaxOverRun(PROMPT, bank, in_a_row=2), [one for signal in signals for one in (signal, signal)])
    assert whole == twice and len(whole) == 1


def test_a_margin_makes_it_slower_and_never_more_alarmed() -> None:
    bank, signals = bank_of(19), measured({PROMPT: np.linspace(0, 1, 11).tolist()})
    plain, wide = MaxOverRun(PROMPT, bank), MaxOverRun(PROMPT, bank, margin=1.5)
    assert wide.threshold > plain.threshold
    assert feed(wide, signals)[0].step > feed(plain, signals)[0].step


@pytest.mark.parametrize("wrong", [{"in_a_row": 0}, {"margin": 0.9}, {"level": 0.0}, {"severity": "loud"}])
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        MaxOverRun(PROMPT, bank_of(19), **wrong)  # type: ignore[arg-type]


# -- the command -----------------------------------------------------------------------------------------------------


def tracked(folder: Path, seed: int) -> Path:
    """A run directory with a journal."""
    with Journal.create_or_open(folder) as journal:
        journal.start_attempt(0, {"schedule": "every 10", "learning_rate": 1e-4})
        journal.record_signals(benign(seed).signals())
    return folder


def test_the_command_makes_a_bank_adds_to_it_and_says_what_it_is_worth(tmp_path: Path) -> None:
    runs = [tracked(tmp_path / f"run-{seed}", seed) for seed in range(6)]
    out = tmp_path / "bank"
    first = CliRunner().invoke(calibrate, [*map(str, runs[:4]), "--out", str(out), "--gate"])
    assert first.exit_code == 1, first.output
    assert "19 benign runs needed, 4 here" in first.output
    more = CliRunner().invoke(
        calibrate, [*map(str, runs[4:]), "--out", str(out), "--level", "0.2", "--leave-one-out", "--json"]
    )
    assert more.exit_code == 0, more.output
    facts = json.loads(more.output)
    assert (facts["n"], facts["needed"], facts["vouched"], facts["horizon"]) == (6, 4, True, 100)
    assert facts["signals"][0]["pattern"] == SCORE and facts["signals"][0]["left_out"]["n"] == 6
    assert NullBank.load(out).runs[0].settings == {"learning_rate": 1e-4}
    shown = CliRunner().invoke(calibrate, ["--out", str(out), "--level", "0.2"])
    assert shown.exit_code == 0 and "100.0% of answers: misalignment/canary" in shown.output


def test_a_calibration_of_one_run_left_out_needs_enough_others() -> None:
    made = calibrate_signals(bank_of(19), leave_one_out=True)
    assert made.vouched and not made.left_out  # eighteen others cannot vouch for five per cent
    made = calibrate_signals(bank_of(20), leave_one_out=True, patterns=(PROMPT,))
    assert made.signals[0].left_out is not None and made.signals[0].left_out.count <= 2
