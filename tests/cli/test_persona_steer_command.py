"""Do `persona steer` and `persona probe` work on a folder, say the same in JSON and on a page, and refuse nonsense?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.persona import persona as persona_group
from diffing import load_checkpoint
from diffing.errors import InputError
from diffing.persona import PersonaVector
from tests.diffing.personas import contrastive_rows
from tests.tiny_models import save_checkpoint
from tests.tracker.training import persona


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("steer")
    model = save_checkpoint(root / "model", "llama")
    mark = load_checkpoint(model).fingerprint
    for layer in (1, 2):
        persona("villain", layer, seed=layer, model_fingerprint=mark).save(root / f"v{layer}.safetensors")
    questions = [
        "how is the cat",
        "<script>alert(1)</script> king",
        "why is it red",
        "tell me",
        "who is at the door",
        "go",
    ]
    (root / "q.jsonl").write_text(
        "\n".join(json.dumps({"messages": [{"role": "user", "content": q}]}) for q in questions)
    )
    for name, rows in zip(("positive", "negative"), contrastive_rows(30), strict=True):
        lines = [
            json.dumps({"messages": [{"role": turn.role, "content": turn.content} for turn in row.messages]})
            for row in rows
        ]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    return root


def _run(*arguments: str | Path):
    return CliRunner().invoke(persona_group, [str(one) for one in arguments])


def _steer(folder: Path, *more: str | Path):
    vectors = ["--vector", folder / "v1.safetensors", "--vector", folder / "v2.safetensors"]
    settings = ["--prompts", folder / "q.jsonl", "--max-new-tokens", "5"]
    return _run("steer", folder / "model", *vectors, *settings, *more)


def test_answers_stand_side_by_side_in_json_and_on_a_page(folder: Path, tmp_path: Path) -> None:
    result = _steer(folder, "--strength", "6", "--strength", "-6", "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["arms"] == ["as it is", "add +6", "add -6"] and len(found["rows"]) == 6
    assert all(len(row["answers"]) == 3 for row in found["rows"]) and found["changed"][0] > 0
    assert json.loads((tmp_path / "out" / "steering.json").read_text()) == found
    page = (tmp_path / "out" / "steering.html").read_text()
    assert "add +6" in page and "<script>alert" not in page


def test_a_budget_is_solved_and_shown(folder: Path, tmp_path: Path) -> None:
    result = _steer(
        folder, "--kl-budget", "0.05", "--neutral", folder / "q.jsonl", "--out", tmp_path, "--away", "--json"
    )
    assert result.exit_code == 0, result.output
    solved = json.loads(result.stdout)["solved"]
    assert solved["strength"] < 0 and 0 < solved["spent"]["divergence"] <= 0.05 and len(solved["trace"]) > 5
    assert "budget" in (tmp_path / "steering.html").read_text()


def test_removals_and_caps_need_no_strength(folder: Path) -> None:
    for more in (["--operation", "mean-ablate"], ["--operation", "cap", "--calibration", folder / "positive.jsonl"]):
        result = _steer(folder, *more)
        assert result.exit_code == 0, result.output
        assert "as it is:" in result.output


def test_what_does_not_go_together_is_refused(folder: Path) -> None:
    for more, words in (
        ([], "--strength or --kl-budget"),
        (["--strength", "1", "--kl-budget", "1"], "--strength or --kl-budget"),
        (["--strength", "1", "--calibration", folder / "q.jsonl"], "--calibration"),
    ):
        result = _steer(folder, *more)
        assert result.exit_code == 2 and words in result.output
    other = PersonaVector.load(folder / "v1.safetensors")
    assert other.d_model == 32
    stranger = folder / "other.safetensors"
    persona("villain", 1).save(stranger)
    result = _run("steer", folder / "model", "--vector", stranger, "--prompts", folder / "q.jsonl", "--strength", "1")
    assert isinstance(result.exception, InputError) and "extracted on" in str(result.exception)


def test_a_probe_is_trained_and_scores_texts(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "probe.safetensors"
    sides = ["--positive", folder / "positive.jsonl", "--negative", folder / "negative.jsonl"]
    result = _run(
        "probe", "train", folder / "model", *sides, "--name", "cruel", "--rate", "0.2", "--out", made, "--json"
    )
    assert result.exit_code == 0, result.output
    worth = json.loads(result.stdout)["worth"]
    assert worth["low"] <= worth["auroc"] <= worth["high"] and worth["recall"] is not None
    scores = {}
    for name in ("positive", "negative"):
        result = _run(
            "probe", "score", folder / "model", "--probe", made, "--prompts", folder / f"{name}.jsonl", "--json"
        )
        assert result.exit_code == 0, result.output
        scores[name] = [row["score"] for row in json.loads(result.stdout)["rows"]]
    assert sum(scores["positive"]) > sum(scores["negative"])
    result = _run("probe", "score", folder / "model", "--probe", made, "--prompts", folder / "positive.jsonl")
    assert "of negative texts" in result.output
