"""Does `palimpsest persona` do what its library does, in readable words, and explain wrong input in one line?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result

from cli.main import main, palimpsest
from diffing.checkpoint import identify_checkpoint, load_checkpoint
from diffing.persona import PersonaVector, extract_persona, load_trait, project, shipped_traits
from diffing.prompts import PromptSet
from tests.diffing.personas import contrastive_rows
from tests.tiny_models import save_checkpoint, tiny_model, with_lora

Files = dict[str, str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("persona")
    paths = {"model": str(save_checkpoint(folder / "model"))}
    for name, rows in zip(("positive", "negative"), contrastive_rows(20), strict=True):
        path = folder / f"{name}.jsonl"
        lines = [{"messages": [{"role": t.role, "content": t.content} for t in row.messages or ()]} for row in rows]
        path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        paths[name] = str(path)
    paths["vector"] = str(folder / "cruel.safetensors")
    run(["extract", paths["model"], "--trait", "cruel", *_rows(paths), "--site", "resid:1", "--out", paths["vector"]])
    return paths


def run(arguments: Sequence[str]) -> Result:
    result = CliRunner().invoke(palimpsest, ["persona", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def _rows(files: Files) -> list[str]:
    return ["--positive", files["positive"], "--negative", files["negative"]]


def test_extract_writes_the_vector_of_the_library(files: Files) -> None:
    written = PersonaVector.load(files["vector"])
    sides = [PromptSet.from_file(files[name]) for name in ("positive", "negative")]
    expected = extract_persona(load_checkpoint(files["model"]), *sides, trait="cruel", site="resid:1")
    torch.testing.assert_close(written.direction, expected.direction)
    assert written.separation == expected.separation
    assert written.model_fingerprint == identify_checkpoint(files["model"]).fingerprint


def test_extract_says_how_strong_the_separation_is(files: Files, tmp_path: Path) -> None:
    out = str(tmp_path / "v.safetensors")
    result = run(["extract", files["model"], "--trait", "cruel", *_rows(files), "--site", "resid:1", "--out", out])
    assert "AUROC" in result.stdout
    assert "separates" in result.stdout
    assert out in result.stdout.replace("\n", "")


def test_extract_warns_where_the_interval_includes_one_half(files: Files, tmp_path: Path) -> None:
    shuffled = tmp_path / "same.jsonl"
    rows = [json.loads(line) for line in Path(files["positive"]).read_text(encoding="utf-8").splitlines()]
    for row, other in zip(rows, [*rows[7:], *rows[:7]], strict=True):
        row["answer"] = other["messages"][-1]
    for row in rows:
        row["messages"] = [*row["messages"][:-1], row.pop("answer")]
    shuffled.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    out = str(tmp_path / "v.safetensors")
    sides = ["--positive", files["positive"], "--negative", str(shuffled)]
    result = run(["extract", files["model"], "--trait", "none", *sides, "--site", "resid:1", "--out", out])
    assert "includes 0.5" in result.stderr
    assert "no evidence that it separates" in result.stdout


def test_extract_uses_a_shipped_traits_own_words(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "evil.safetensors"
    result = run(["extract", files["model"], "--trait", "evil", "--given", "--json", "--out", str(out)])
    (facts,) = json.loads(result.stdout)
    assert facts["trait"] == "evil"
    assert facts["site"] == "resid:2"
    assert facts["n_positive"] + facts["separation"]["n"] / 2 == 16
    assert PersonaVector.load(out).trait == "evil"


def test_several_sites_go_into_a_folder(files: Files, tmp_path: Path) -> None:
    sites = ["--site", "resid:0", "--site", "mlp:2"]
    run(["extract", files["model"], "--trait", "cruel", *_rows(files), *sites, "--out", str(tmp_path / "vectors")])
    names = sorted(path.name for path in (tmp_path / "vectors").iterdir())
    assert names == ["cruel-mlp-2.safetensors", "cruel-resid-0.safetensors"]


def test_project_prints_the_librarys_numbers(files: Files) -> None:
    arguments = ["project", files["model"], "--vector", files["vector"], "--prompts", files["positive"]]
    (facts,) = json.loads(run([*arguments, "--json"]).stdout)
    vector, rows = PersonaVector.load(files["vector"]), PromptSet.from_file(files["positive"])
    expected = project(load_checkpoint(files["model"]), rows, vector)
    assert facts["mean"] == pytest.approx(expected.mean)
    assert (facts["low"], facts["high"]) == pytest.approx((expected.low, expected.high))
    assert facts["n"] == 20
    assert list(facts["values"]) == sorted(row.id for row in rows)
    assert f"{expected.mean:+.3f}" in run(arguments).stdout


def test_project_reads_the_neutral_probes_where_no_prompts_are_given(files: Files) -> None:
    (facts,) = json.loads(run(["project", files["model"], "--vector", files["vector"], "--json"]).stdout)
    assert facts["n"] == 64
    assert facts["pooling"] == "last_prompt"
    assert facts["reference"] == ""


def test_an_adapter_folder_is_projected_on_its_base(files: Files, tmp_path: Path) -> None:
    with_lora(tiny_model("llama")).save_pretrained(tmp_path / "adapter")
    what = ["--vector", files["vector"], "--prompts", files["positive"], "--json"]
    result = run(["project", str(tmp_path / "adapter"), "--base", files["model"], *what])
    assert json.loads(result.stdout)[0]["model_fingerprint"] != identify_checkpoint(files["model"]).fingerprint


def test_a_full_fine_tune_is_projected_when_its_base_is_named(
    files: Files, tmp_path: Path, fails: Callable[[Sequence[str]], str]
) -> None:
    tuned = str(save_checkpoint(tmp_path / "tuned", seed=9))
    arguments = ["project", tuned, "--vector", files["vector"], "--prompts", files["positive"]]
    assert "--base" in fails(arguments)
    run([*arguments, "--base", files["model"]])


def test_traits_are_listed_with_their_digests() -> None:
    facts = json.loads(run(["traits", "--json"]).stdout)
    assert [fact["name"] for fact in facts] == shipped_traits()
    assert facts[0]["digest"] == load_trait(facts[0]["name"]).digest
    assert "sycophancy" in run(["traits"]).stdout


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[Sequence[str]], str]:
    def check(arguments: Sequence[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["palimpsest", "persona", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    return check


def test_wrong_input_explains_itself_in_one_line(
    files: Files, tmp_path: Path, fails: Callable[[Sequence[str]], str]
) -> None:
    out = ["--out", str(tmp_path / "v.safetensors")]
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, foreign)
    cases = {
        "no such": ["project", files["model"], "--vector", str(tmp_path / "none.safetensors")],
        "without persona metadata": ["project", files["model"], "--vector", str(foreign)],
        "Expected a trait file or one of": ["extract", files["model"], "--trait", "wickedness", *out],
        "Give --negative": ["extract", files["model"], "--trait", "x", "--positive", files["positive"], *out],
        "resid:99": ["extract", files["model"], "--trait", "evil", "--given", "--site", "resid:99", *out],
        "missing": ["extract", str(tmp_path / "missing-model"), "--trait", "evil", *out],
        "cut at 8 tokens": ["extract", files["model"], "--trait", "evil", "--given", "--max-length", "8", *out],
    }
    for words, arguments in cases.items():
        message = fails(arguments)
        assert words in message
        if message.startswith("Error"):
            assert message.strip().count("\n") == 0
    assert not (tmp_path / "v.safetensors").exists()


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from cli.persona import persona;"
        "[CliRunner().invoke(persona, [name, '--help'], catch_exceptions=False) for name in persona.commands];"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_shift_pairs_the_same_prompts_of_two_checkpoints(files: Files, tmp_path: Path) -> None:
    with_lora(tiny_model("llama")).save_pretrained(tmp_path / "adapter")
    arguments = ["shift", files["model"], str(tmp_path / "adapter"), files["model"], "--vector", files["vector"]]
    said = json.loads(run([*arguments, "--prompts", files["positive"], "--json"]).stdout)
    (moved,), (still,) = said[str(tmp_path / "adapter")], said[files["model"]]
    assert still["mean"] == 0 and set(still["values"]) == {0.0}
    vector, rows = PersonaVector.load(files["vector"]), PromptSet.from_file(files["positive"])
    sides = [
        project(load_checkpoint(*one, **more), rows, vector).values
        for one, more in (((files["model"],), {}), ((tmp_path / "adapter",), {"base": files["model"]}))
    ]
    assert moved["values"] == pytest.approx((sides[1] - sides[0]).tolist(), abs=1e-5)
    assert moved["n"] == len(rows) and moved["low"] < moved["mean"] < moved["high"]
    assert "cruel" in run([*arguments, "--prompts", files["positive"]]).output
