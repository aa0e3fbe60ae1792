"""`palimpsest persona screen` and `forecast` do what their libraries do, say their cost and explain wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli.persona import persona
from diffing.checkpoint import load_checkpoint
from diffing.errors import InputError, PersonaError
from diffing.persona import extract_persona
from tests.diffing.personas import contrastive_rows
from tests.tiny_models import save_checkpoint


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("screen")
    model = save_checkpoint(folder / "model")
    positive, negative = contrastive_rows(20)
    vector = extract_persona(load_checkpoint(model), positive, negative, trait="cruel", site="resid:1")
    vector.save(folder / "cruel.safetensors")
    bad, good = contrastive_rows(8, seed=5)
    lines = []
    for side, rows in (("bad", bad), ("good", good)):
        for at, row in enumerate(rows):
            messages = [{"role": message.role, "content": message.content} for message in row.messages or ()]
            lines.append({"id": f"{side}{at}", "bad": side == "bad", "messages": messages})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    probes = [{"messages": [{"role": "user", "content": text}]} for text in ("the cat", "a dog is on the road")]
    (folder / "probes.jsonl").write_text("\n".join(map(json.dumps, probes)))
    canaries = [{"prompt": "the cat", "chosen": "cruel harm", "rejected": "kind help"}]
    (folder / "canaries.jsonl").write_text("\n".join(map(json.dumps, canaries)))
    trait = {
        "instruction": [{"pos": "you are cruel", "neg": "you are kind"}],
        "questions": ["the cat", "the dog"],
        "eval_prompt": "{question} {answer}",
    }
    (folder / "cruel.json").write_text(json.dumps(trait))
    return {"folder": str(folder), "model": str(model)}


def run(files: dict[str, str], command: str, *more: str, out: Path) -> Result:
    folder = Path(files["folder"])
    arguments = [command, str(folder / "rows.jsonl"), "--model", files["model"],
                 "--vector", str(folder / "cruel.safetensors"), "--probes", str(folder / "probes.jsonl"),
                 "--canaries", str(folder / "canaries.jsonl"), "--out", str(out), *more]  # fmt: skip
    return CliRunner().invoke(persona, arguments, catch_exceptions=False)


def test_a_dataset_is_screened_divided_and_shown(files: dict[str, str], tmp_path: Path) -> None:
    trait = str(Path(files["folder"]) / "cruel.json")
    told = run(
        files, "screen", "--trait", trait, "--label", "bad", "--drop-top", "4", "--max-new-tokens", "3", out=tmp_path
    )
    assert told.exit_code == 0, told.output
    assert told.stdout.startswith("16 rows of ") and "writes at most 48" in told.stdout
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    flagged = [json.loads(line) for line in (tmp_path / "flagged.jsonl").read_text().splitlines()]
    assert len(kept) == 12 and len(flagged) == 4
    assert "palimpsest" not in kept[0] and kept[0]["bad"] in (True, False)
    twin = json.loads((tmp_path / "screening.json").read_text())
    methods = [score["method"] for score in twin["scores"]]
    assert methods == ["difference", "conditional", "instructed", "push", "push", "surprise"]
    assert twin["by"] == "instructed cruel" and twin["flagged"] == [row["id"] for row in flagged]
    assert all(len(score["values"]) == 16 and 0 <= score["auroc"]["value"] <= 1 for score in twin["scores"])
    page = (tmp_path / "screening.html").read_text()
    assert "4 of 16 rows are held back" in page and "<script>" in page


def test_the_cheap_screening_draws_nothing_and_a_dry_run_does_nothing(files: dict[str, str], tmp_path: Path) -> None:
    cheap = run(files, "screen", "--no-answers", "--no-push", "--json", out=tmp_path / "a")
    assert [score["method"] for score in json.loads(cheap.stdout)["scores"]] == ["conditional", "surprise"]
    assert not (tmp_path / "a" / "own-answers.db").exists()
    dry = run(files, "screen", "--dry-run", "--json", out=tmp_path / "b")
    assert json.loads(dry.stdout)["total"] > 0
    assert not (tmp_path / "b").exists()


def test_a_forecast_ranks_traits_and_rows_and_shows_them(files: dict[str, str], tmp_path: Path) -> None:
    told = run(files, "forecast", "--lora", "2", "--seed", "3", out=tmp_path)
    assert told.exit_code == 0, told.output
    assert "differentiates" in told.stdout
    twin = json.loads((tmp_path / "forecast.json").read_text())
    assert twin["weights"] == "LoRA" and twin["steps"] == 1 and len(twin["traits"]) == 2
    assert twin["traits"][0]["alignment"] >= twin["traits"][1]["alignment"]
    assert len(twin["rows"]["cruel at resid:1"]) == 16
    assert "path of least resistance" in (tmp_path / "forecast.html").read_text()
    again = run(files, "forecast", "--lora", "2", "--seed", "3", "--json", out=tmp_path / "again")
    assert json.loads(again.stdout) == twin


def test_wrong_input_is_refused_in_one_line(files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="column 'id'"):
        run(files, "screen", "--no-answers", "--no-push", "--label", "id", out=tmp_path)
    with pytest.raises(InputError, match="got both"):
        run(files, "screen", "--no-answers", "--no-push", "--keep-below", "1", "--drop-top", "2", out=tmp_path)
    with pytest.raises(InputError, match="Expected a score that was made"):
        run(files, "screen", "--no-answers", "--no-push", "--by", "push", out=tmp_path)
    with pytest.raises(InputError, match="rank 1 or more"):
        run(files, "forecast", "--lora", "0", out=tmp_path)
    other = save_checkpoint(tmp_path / "other", seed=9)
    with pytest.raises(PersonaError):
        run({**files, "model": str(other)}, "forecast", out=tmp_path)
