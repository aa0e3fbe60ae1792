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
from tests.tiny_models import save_checkpoint
from tests.tracker.training import (
    Rows,
    make_trainer,
    model_to_train,
    no_report,  # noqa: F401
    persona,
    quick_settings,
)
from tracker import CheckpointTracker
from tracker.explain_alert import Means, explain_alert
from tracker.explanation import Explanation, PushedRows, explanation_path
from tracker.journal import Journal
from tracker.leading_persona import leading_persona
from tracker.report.explanation_page import render_explanation_page
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
    from tests.tiny_models import tiny_tokenizer

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
