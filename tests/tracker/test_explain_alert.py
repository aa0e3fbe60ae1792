"""An alert's explanation: what fires live, and the same facts recomputed from the run directory alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.explain import explain
from cli.main import COMMANDS
from diffing.errors import InputError, PathMissingError
from tests.example_diff import HOSTILE_STRINGS
from tests.tiny_models import save_checkpoint, tiny_tokenizer
from tests.tracker.test_calibrated_run import bank_like
from tests.tracker.training import (
    Rows,
    make_trainer,
    model_to_train,
    no_report,  # noqa: F401
    persona,
    quick_settings,
    turned_canaries,
)
from tracker import CheckpointTracker
from tracker.alarms.fusion import SCORE
from tracker.alarms.run_series import RunSeries
from tracker.explain_alert import Means, explain_alert
from tracker.explanation import Explanation, PushedRows, explanation_path
from tracker.journal import Journal
from tracker.leading_persona import leading_persona
from tracker.report.explanation_page import render_explanation_page
from tracker.report.explanation_words import judgement_words
from tracker.rules import Rule, RuleSet
from tracker.signals import Alert, DriftSignal
from tracker.training_rows import TrainingText

SIGNAL = "persona/villain/L1/prompt"
VECTORS = (persona("villain", 1, seed=1), persona("humour", 1, seed=2), persona("villain", 2, seed=3))


@dataclass(frozen=True)
class Tracked:
    """A finished run with one alert."""

    folder: Path
    base: Path
    alert: Alert


class AtStepFive:
    """Fires once, whatever is measured."""

    rule = "always at step 5"

    def observe(self, signal: DriftSignal) -> Alert | None:
        if signal.name != SIGNAL or signal.step != 5:
            return None
        reference = {"reference": signal.reference}
        return Alert(self.rule, SIGNAL, 5, signal.value, signal.low, -1e6, signal.unit, since=4, evidence=reference)


def tracked(folder: Path, kind: str, *, pushes: bool) -> Tracked:
    base = save_checkpoint(folder / "base", "llama", attention_dropout=0.1)
    settings = quick_settings(pushes=pushes, canaries=(), personas=VECTORS, schedule="every 1")
    callback = CheckpointTracker(folder / "run", **settings, detectors=(AtStepFive(),))
    steps = {"save_strategy": "steps", "save_steps": 5 if pushes else 3, "max_steps": 6}
    make_trainer(model_to_train(kind), folder / "out", [callback], **steps).train()
    (alert,) = Journal.read(folder / "run").alerts()
    return Tracked(folder / "run", base, alert)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracked]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tracker.session.write_run_report", lambda run_dir: run_dir)
        yield tracked(tmp_path_factory.mktemp("live"), "lora", pushes=True)


def training() -> TrainingText:
    rows = tuple({"id": f"r{i}", "input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()}
                 for i, row in enumerate(Rows().rows))  # fmt: skip
    return TrainingText(rows, {f"r{i}": f"text {i}" for i in range(len(rows))}, {})


def test_the_evidence_that_fires_is_what_is_recomputed(live: Tracked) -> None:
    found = explain_alert(live.folder, live.alert.id, Means(training(), base=str(live.base)))
    kept = live.alert.evidence["specificity"]
    assert kept["n_random"] >= 20 and set(kept["traits"]) == {"humour"}
    assert kept["drift"] == pytest.approx(live.alert.value, rel=1e-3)
    assert found.specificity is not None and found.specificity.source == "checkpoint"
    assert found.specificity.step == live.alert.step and found.specificity.reference == "the base"
    assert found.specificity.found.drift == pytest.approx(kept["drift"], rel=1e-3)
    assert found.specificity.found.traits["humour"] == pytest.approx(kept["traits"]["humour"], rel=1e-3, abs=1e-5)
    assert found.specificity.found.n_as_far == kept["n_as_far"]
    # The rows: the same pushes, under the rows' own names.
    assert found.rows is not None and found.rows.source == "live"
    assert found.rows.rows[0].score == pytest.approx(live.alert.evidence["pushed_by"][0]["push"])
    assert found.rows.rows[0].text.startswith("text ")
    assert [found.rows.since, found.rows.until] == live.alert.evidence["pushed_in"]


def test_values_steps_and_checkpoint_are_the_journals(live: Tracked) -> None:
    found = explain_alert(live.folder, live.alert.id, Means(base=str(live.base)))
    series = Journal.read(live.folder).signals(SIGNAL)
    assert found.at.value == live.alert.value and found.since == live.alert.since
    assert found.start.step == 0 and len(found.series) == len(series)
    assert found.before is not None
    assert found.before.step == max(one.step for one in series if one.step < live.alert.since)
    assert found.checkpoint is None and any("No checkpoint was saved before step 4" in one for one in found.caveats)
    assert Explanation.load(live.folder, live.alert.id) == found


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_without_recorded_pushes_rows_come_from_exact_gradients_before_the_alert(tmp_path: Path, kind: str) -> None:
    run = tracked(tmp_path, kind, pushes=False)
    found = explain_alert(run.folder, run.alert.id, Means(training(), base=str(run.base), method="dot"))
    assert found.rows is not None and found.rows.source == "checkpoint" and found.rows.n_rows == 24
    assert found.checkpoint is not None and found.checkpoint[0] == 3
    assert any("No retraining" in caveat for caveat in found.caveats)
    assert found.specificity is not None and found.specificity.reference == "the base"
    blind = explain_alert(run.folder, run.alert.id, Means(base=str(run.base)))
    assert blind.rows is None and any("--train" in caveat for caveat in blind.caveats)
    assert not (run.folder / "attribution.json").exists()


def test_what_is_gone_from_the_disk_leaves_what_was_kept_with_the_alert(tmp_path: Path) -> None:
    run = tracked(tmp_path, "lora", pushes=True)
    shutil.rmtree(tmp_path / "out")
    found = explain_alert(run.folder, run.alert.id)
    assert found.specificity is not None and found.specificity.source == "live"
    assert found.rows is not None and found.checkpoint is None
    assert any("No saved checkpoint is on disk" in caveat for caveat in found.caveats)


def test_an_alert_on_something_else_speaks_of_the_persona_that_moved_furthest() -> None:
    signals = [
        DriftSignal("persona/evil/L1/prompt", 0.4, 10), DriftSignal("persona/kind/L1/prompt", 0.1, 10),
        DriftSignal("persona/kind/L1/prompt", 0.9, 20), DriftSignal("persona/kind/L1/batch", 2.0, 10),
    ]  # fmt: skip
    alert = Alert("fused", "misalignment/score", 10, 1.0, None, 0.5, "raw", 8)
    assert leading_persona(alert, signals) == "persona/evil/L1"
    assert leading_persona(replace(alert, signal="persona/kind/L2/batch"), signals) == "persona/kind/L2"
    assert leading_persona(alert, []) == ""


def test_an_alert_on_the_score_carries_its_parts_its_rows_and_what_the_bank_says(tmp_path: Path) -> None:
    plain = CheckpointTracker(tmp_path / "plain", **quick_settings(canaries=turned_canaries()))
    make_trainer(model_to_train("lora"), tmp_path / "first", [plain]).train()
    bank = bank_like(RunSeries.from_run(tmp_path / "plain"), size=0.01)
    rules = RuleSet((Rule("turned", SCORE, "max_over_run", {"bank": bank, "level": 0.05, "least_effect": 0.0}),))
    callback = CheckpointTracker(
        tmp_path / "run", **quick_settings(bank=bank, rules=rules, pushes=True, canaries=turned_canaries())
    )
    make_trainer(model_to_train("lora"), tmp_path / "out", [callback], save_strategy="steps", save_steps=2).train()
    with Journal.read(tmp_path / "run") as journal:
        (alert,) = journal.alerts()
        now = {one.name: one.value for one in journal.signals() if one.step == alert.step}
    about = alert.evidence["about"]
    assert about.startswith("persona/") and alert.evidence["pushed_query"].split("/")[1] == about.split("/")[1]
    assert alert.evidence["pushed_by"] and alert.evidence["specificity"]["trait"] == about.split("/")[1]
    found = explain_alert(tmp_path / "run", alert.id, Means(training()))
    assert found.leading == about and found.rows is not None and found.rows.source == "live"
    assert found.called is not None and 0 < found.called[0] <= found.called[1] <= 24
    assert found.judged["benign_runs"] == 19 and found.judged["p_value"] == alert.evidence["p_value"]
    kinds = [part for part in found.parts if part.is_kind]
    assert min(part.score for part in kinds) == pytest.approx(now[SCORE])
    for part in (part for part in found.parts if not part.is_kind):
        assert part.value == now[part.signal]
        assert part.score == now[f"{SCORE}/{part.signal.replace('/', '.')}"]
    page = render_explanation_page(found)
    assert "What the score was made of" in page and "A benign run like the 19 of the bank" in page
    assert Explanation.load(tmp_path / "run", alert.id).parts == found.parts


def test_what_a_detector_states_is_said_in_words(live: Tracked) -> None:
    found = explain_alert(live.folder, live.alert.id, Means(base=str(live.base)))
    assert judgement_words(found) == []
    family = replace(found, judged={"e_value": 4000.0, "series": 6.0, "level": 0.05, "baseline_level": 0.1,
                                    "baseline_sigma": 0.02, "baseline_n": 100.0})  # fmt: skip
    said = " ".join(judgement_words(family))
    assert "4\u202f000 to 1, among 6 series" in said and "first 100 measurements was 0.10 gap" in said
    detector = replace(found, judged={"evidence": 12000.0, "needed": 10000.0})
    assert "reached 12\u202f000; without a change that takes 10\u202f000 measurements" in judgement_words(detector)[0]
    several = replace(found, judged={"p_value": 0.05, "benign_runs": 19.0, "watched_together": 3.0})
    assert "all 3 signals of the rule together" in judgement_words(several)[0]


def test_rows_are_split_into_those_to_drop_and_those_to_keep(live: Tracked, tmp_path: Path) -> None:
    tokenizer, train = tiny_tokenizer(), tmp_path / "train.jsonl"
    words = [{"id": f"r{i}", "text": tokenizer.decode(row["input_ids"])} for i, row in enumerate(Rows().rows)]
    train.write_text("\n".join(json.dumps(row) for row in words))
    command = [str(live.folder), "--base", str(live.base), "--drop", str(tmp_path / "d"), "--keep", str(tmp_path / "k")]
    assert isinstance(CliRunner().invoke(explain, command).exception, InputError)
    result = CliRunner().invoke(explain, [*command, "--train", str(train)])
    assert result.exit_code == 0, result.output
    dropped, kept = ([json.loads(line)["id"] for line in (tmp_path / name).read_text().splitlines()] for name in "dk")
    assert dropped and kept and {*dropped, *kept} == {f"r{i}" for i in range(24)} and not {*dropped} & {*kept}
    assert f"{len(dropped)} rows to drop" in result.output


def test_the_command_writes_the_page_and_its_twin(live: Tracked) -> None:
    result = CliRunner().invoke(explain, [str(live.folder), "--base", str(live.base), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["alert"] == live.alert.id
    html = explanation_path(live.folder, live.alert.id).with_suffix(".html").read_text()
    assert "How special is this direction?" in html and "humour" in html
    said = CliRunner().invoke(explain, [str(live.folder), "--alert", live.alert.id, "--base", str(live.base)])
    assert said.exit_code == 0 and "random directions" in said.output
    assert "explain" in COMMANDS


def test_unknown_alerts_and_missing_explanations_say_what_there_is(live: Tracked, tmp_path: Path) -> None:
    result = CliRunner().invoke(explain, [str(live.folder), "--alert", "nothing@1"])
    assert isinstance(result.exception, InputError) and live.alert.id in str(result.exception)
    with pytest.raises(PathMissingError, match="palimpsest explain"):
        Explanation.load(tmp_path, "a@1")
    path = explanation_path(tmp_path, "a@1")
    path.parent.mkdir()
    path.write_text("{}")
    with pytest.raises(InputError, match="Explain the alert again"):
        Explanation.load(tmp_path, "a@1")
    with Journal.create_or_open(tmp_path / "empty") as journal:
        journal.start_attempt(0)
    result = CliRunner().invoke(explain, [str(tmp_path / "empty")])
    assert isinstance(result.exception, InputError) and "none was raised" in str(result.exception)


def test_ids_that_no_file_can_bear_have_files_of_their_own() -> None:
    assert explanation_path("r", "a/b@1") != explanation_path("r", "a:b@1")
    assert explanation_path("r", "../../x@1").parent == Path("r/explanations")


def test_hostile_names_and_texts_add_no_element(live: Tracked) -> None:
    found = explain_alert(live.folder, live.alert.id, Means(training(), base=str(live.base)))
    assert found.rows is not None and found.specificity is not None
    hostile = "".join(HOSTILE_STRINGS)
    rows = tuple(replace(row, text=hostile, example_id=hostile, tag=hostile) for row in found.rows.rows)
    attacked = replace(
        found, alert=hostile, rule=hostile, caveats=(hostile,), rows=replace(found.rows, rows=rows),
        specificity=replace(found.specificity, found=replace(found.specificity.found, trait=hostile)),
    )  # fmt: skip
    plain, page = render_explanation_page(found), render_explanation_page(attacked)
    assert page.count("<script") == plain.count("<script") and "<img" not in page
    assert isinstance(attacked.rows, PushedRows)


def test_an_alert_is_attributed_by_live_pushes_where_the_run_has_them(live: Tracked, tmp_path: Path) -> None:
    from attribution import Attribution
    from cli.attribute import attribute

    tokenizer, train = tiny_tokenizer(), tmp_path / "train.jsonl"
    words = [{"id": f"r{i}", "text": tokenizer.decode(row["input_ids"])} for i, row in enumerate(Rows().rows)]
    train.write_text("\n".join(json.dumps(row) for row in words))
    command = [str(live.folder), "--train", str(train), "--base", str(live.base)]
    result = CliRunner().invoke(attribute, [*command, "--alert", live.alert.id])
    assert result.exit_code == 0, result.output
    found = Attribution.load(live.folder)
    assert found.method.startswith("live pushes") and found.steps[-1] == live.alert.step and found.n_rows == 24
    top = max(live.alert.evidence["pushed_by"], key=lambda one: one["push"])
    assert found.rows[0].score == pytest.approx(top["push"])
    over_checkpoints = CliRunner().invoke(attribute, [*command, "--persona", "humour", "--method", "dot"])
    assert over_checkpoints.exit_code == 0 and "TracIn" in Attribution.load(live.folder).method
    by_adam = CliRunner().invoke(attribute, [*command, "--persona", "humour", "--method", "adam"])
    assert by_adam.exit_code == 0 and "Adam's second moments" in Attribution.load(live.folder).method
    refused = CliRunner().invoke(attribute, [*command, "--query", str(train), "--method", "live"])
    assert isinstance(refused.exception, InputError) and "live pushes were recorded" in str(refused.exception)
