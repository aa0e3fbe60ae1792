"""Does a training go back to where it was clean, without the rows that pushed, and say so?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from attribution.live_rows import row_names
from attribution.pushes import measure_pushes
from diffing.errors import InputError
from tests.tracker.training import PERSONAS, Rows, make_trainer, model_to_train, quick_settings
from tracker.callback import CheckpointTracker
from tracker.events import CheckpointSaved
from tracker.flagged_rows import FlaggedRows
from tracker.interventions import intervention_spans
from tracker.journal import Journal
from tracker.preventive import PreventiveSteering
from tracker.recovery import clean_checkpoint, flagged_until, train_with_recovery
from tracker.rules import Rule, RuleSet
from tracker.run_queries import persona_of, probe_inputs_of, projection_query
from tracker.signals import Alert, DriftSignal
from tracker.unmet_rows import as_hard_as, flag_unmet

SIGNAL = "persona/villain/L1/prompt"


def rules(*actions: str) -> RuleSet:
    return RuleSet((Rule("loss", "train/loss", "non_finite", actions=actions),))


class Seen(TrainerCallback):
    """Every step that was taken, over all attempts."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.steps.append(state.global_step)


def alert_at(step: int, since: int, *, signal: str = SIGNAL) -> Alert:
    return Alert("rule", signal, step, 1.0, None, 0.5, "gap", since)


@pytest.fixture
def run(tmp_path: Path):
    def make(*actions: str, **settings):
        callback = CheckpointTracker(tmp_path / "run", **quick_settings(**settings))
        seen = Seen()
        trainer = make_trainer(
            model_to_train("lora"), tmp_path / "out", [callback, seen], save_strategy="steps", save_steps=2, max_steps=8
        )
        return trainer, callback, seen

    return make


def fire_at(
    callback: CheckpointTracker, step: int, actions: tuple[str, ...], *, signal: str = SIGNAL, times: int = 1
) -> None:
    """Has the tracker judge as if a rule had fired at a step of the first attempts."""
    tracker, fired = callback.tracker, []
    end_step = tracker.end_step

    def end_and_fire(at: int, *rest, **more):
        decision = end_step(at, *rest, **more)
        if at == step and len(fired) < times:
            fired.append(at)
            alert = alert_at(step, step - 1, signal=signal)
            alert = Alert(**{**vars(alert), "evidence": {"rule_name": "drift", "actions": list(actions)}})
            return decision | tracker._decide([alert])
        return decision

    tracker.end_step = end_and_fire


def test_a_rollback_goes_on_from_the_last_clean_checkpoint_and_is_on_record(run) -> None:
    trainer, callback, seen = run()
    fire_at(callback, 6, ("rollback",))
    (recovered,) = train_with_recovery(trainer)
    assert seen.steps == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    assert recovered.step == 4 and recovered.checkpoint.name == "checkpoint-4"
    (span,) = intervention_spans(callback.tracker.output_dir)
    assert (span.name, span.start, span.stop) == ("rollback", 4, 4)
    assert span.settings["from_step"] == 6 and span.reason.startswith("persona.villain")
    with Journal.read(callback.tracker.output_dir) as journal:
        assert [attempt.step for attempt in journal.attempts()] == [0, 4]
        assert journal.attempts()[-1].status == "finished"


def test_what_is_trained_after_a_rollback_is_what_a_resume_trains(run, tmp_path: Path) -> None:
    trainer, callback, _ = run()
    fire_at(callback, 6, ("rollback",))
    train_with_recovery(trainer)
    plain = make_trainer(model_to_train("lora"), tmp_path / "plain", save_strategy="steps", save_steps=2, max_steps=8)
    plain.train()
    for (name, one), (_, other) in zip(trainer.model.named_parameters(), plain.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_rows_that_pushed_are_left_out_from_there_on(run) -> None:
    trainer, callback, _ = run(pushes=True)
    fire_at(callback, 6, ("rollback", "drop"))
    (recovered,) = train_with_recovery(trainer, drop_share=0.25)
    assert 1 <= len(recovered.dropped) <= 6 and recovered.left == 24 - len(recovered.dropped)
    assert len(trainer.train_dataset) == recovered.left
    left = {name for row in trainer.train_dataset for name in row_names([row]).values()}
    assert not left & set(recovered.dropped)
    assert [span.name for span in intervention_spans(callback.tracker.output_dir)] == ["rollback", "rows dropped"]


def test_rows_stay_on_record_as_dropped_when_a_later_alert_goes_back_further(run) -> None:
    trainer, callback, _ = run(pushes=True)
    fire_at(callback, 6, ("rollback", "drop"), times=2)
    first, second = train_with_recovery(trainer, most=2, drop_share=0.25)
    assert second.step < first.step and first.dropped
    spans = intervention_spans(callback.tracker.output_dir)
    assert [span.name for span in spans][:3] == ["rollback", "rows dropped", "rollback"]
    assert spans[1].settings["rows"] == list(first.dropped) and spans[1].settings["to_step"] == first.step
    assert {span.start for span in spans} == {second.step}


def test_the_rows_dropped_are_the_run_s_own_record_up_to_the_alert(run) -> None:
    trainer, callback, _ = run(pushes=True)
    trainer.train()
    rows = [Rows()[place] for place in range(24)]
    found = flagged_until(callback.tracker.output_dir, alert_at(6, 5), rows)
    assert (found.since, found.until) == (1, 6) and 1 <= len(found.places) < 24
    whole = flagged_until(callback.tracker.output_dir, alert_at(6, 5), rows, until=8)
    assert whole.until == 8 and set(whole.met) >= set(found.met)


def test_an_alert_on_no_persona_drops_the_rows_of_the_one_that_moved_furthest(run) -> None:
    trainer, callback, _ = run(pushes=True)
    fire_at(callback, 6, ("rollback", "drop"), signal="misalignment/canary")
    (recovered,) = train_with_recovery(trainer)
    assert recovered.dropped


def test_steering_is_switched_on_when_an_alert_asks_and_stays_on_after_the_rollback(run) -> None:
    steering = PreventiveSteering((PERSONAS[0],), strength=0.5, from_step=None)
    trainer, callback, _ = run(intervention=steering)
    fire_at(callback, 6, ("rollback", "steer"))
    (recovered,) = train_with_recovery(trainer)
    assert recovered.steered
    spans = intervention_spans(callback.tracker.output_dir)
    assert [(span.name, span.start, span.stop) for span in spans] == [
        ("rollback", 4, 4),
        ("preventive steering", 4, None),
    ]


def test_an_alert_after_the_last_recovery_stops_the_training(run) -> None:
    trainer, callback, seen = run()
    fire_at(callback, 6, ("rollback",))
    assert train_with_recovery(trainer, most=0) == ()
    assert seen.steps == [1, 2, 3, 4, 5, 6]


def test_without_a_clean_checkpoint_it_says_what_to_do(tmp_path: Path) -> None:
    with Journal.create_or_open(tmp_path) as journal, pytest.raises(InputError, match="save_steps"):
        journal.start_attempt(0, {})
        clean_checkpoint(journal, alert_at(6, 5))


def test_a_trainer_without_a_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one CheckpointTracker"):
        train_with_recovery(make_trainer(model_to_train(), tmp_path))


def test_steering_cannot_be_asked_for_without_an_intervention(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="intervention="):
        CheckpointTracker(tmp_path, rules=rules("steer"), sinks=())


def test_a_script_fails_on_demand_once_the_run_is_on_record(run) -> None:
    trainer, callback, _ = run()
    fire_at(callback, 4, ("stop", "exit"))
    with pytest.raises(SystemExit) as left:
        trainer.train()
    assert left.value.code == 3
    with Journal.read(callback.tracker.output_dir) as journal:
        assert journal.attempts()[-1].status == "stopped"


def test_a_clean_checkpoint_is_one_at_which_the_signal_had_hardly_left_its_start(tmp_path: Path) -> None:
    with Journal.create_or_open(tmp_path / "run") as journal:
        journal.start_attempt(0, {})
        for step, value in enumerate([0.1, 0.1, 0.15, 0.19, 0.3, 0.45, 0.6, 0.7]):
            journal.record_signals([DriftSignal(SIGNAL, value, 10 * step, "gap")])
            folder = tmp_path / f"checkpoint-{10 * step}"
            folder.mkdir()
            (folder / "trainer_state.json").write_text("{}")
            save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
            journal.record_event(CheckpointSaved(10 * step, folder))
        # From 0.1 to a threshold of 0.5: a quarter of the way is 0.2.
        assert clean_checkpoint(journal, alert_at(70, 60)).step == 30
        assert clean_checkpoint(journal, alert_at(70, 60, signal="unknown")).step == 50
        assert clean_checkpoint(journal, alert_at(70, 60), before=30).step == 20
        assert clean_checkpoint(journal, alert_at(70, 60), before=0).step == 30


def test_rows_that_were_not_met_are_told_by_their_gradients_or_left_alone(run, caplog) -> None:
    trainer, callback, _ = run(pushes=True)
    trainer.train()
    rows = [Rows()[place] for place in range(24)]
    folder = callback.tracker.output_dir
    query = projection_query(persona_of(folder, "villain"), probe_inputs_of(folder))
    whole = measure_pushes(trainer.model, [{**row, "id": str(n)} for n, row in enumerate(rows)], [query])
    order = sorted(range(24), key=lambda place: -whole.scores[0][place] / whole.tokens[place])
    bad, good = tuple(order[:6]), tuple(order[-6:])
    met = (*bad[:4], *good[:4])
    flagged = FlaggedRows("villain", bad[:4], tuple(map(str, bad[:4])), (1.0,) * 4, 0.5, 1.0, met, 24, 1, 6)
    found = flag_unmet(trainer.model, rows, flagged, query)
    assert set(bad) <= set(found.places) and not set(good) & set(found.places)
    assert found.places[:4] == flagged.places and len(found.names) == len(found.places)
    turned = replace(flagged, places=good[:4])
    assert flag_unmet(trainer.model, rows, turned, query) is turned and "stay unjudged" in caplog.text


def test_an_alert_that_comes_again_drops_only_rows_that_push_as_those_did(run) -> None:
    trainer, callback, _ = run(pushes=True)
    trainer.train()
    rows = [{**Rows()[place], "id": str(place)} for place in range(24)]
    folder = callback.tracker.output_dir
    query = projection_query(persona_of(folder, "villain"), probe_inputs_of(folder))
    whole = measure_pushes(trainer.model, rows, [query])
    pushes = whole.scores[0] / whole.tokens
    order = sorted(range(24), key=lambda place: -pushes[place])
    assert pushes[order[0]] > 0 > pushes[order[-1]]
    asked = (order[0], order[-1])
    flagged = FlaggedRows("villain", asked, tuple(map(str, asked)), (2.0, 1.0), 0.5, 1.0, asked, 24, 1, 6)
    found = as_hard_as(trainer.model, rows, flagged, [rows[place] for place in order[:3]], query)
    assert (found.places, found.names, found.pushes) == ((order[0],), (str(order[0]),), (2.0,))
    assert as_hard_as(trainer.model, rows, flagged, [], query) is flagged
