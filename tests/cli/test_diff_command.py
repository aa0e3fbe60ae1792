"""`palimpsest diff` from two folders on disk to a page that a person reads, and one line for every wrong input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli.main import main, palimpsest
from diffing.diff_result import DiffResult
from diffing.splice import Recovery, SpliceResult
from diffing.steer import Arm, GenerationSettings, SteeredAnswers, Steering
from tests.tiny_models import save_checkpoint, tiny_model, tiny_tokenizer, with_lora
from tracker.report.diff_page import render_diff_page

FAST = ("--latents", "32", "--k", "4", "--steps", "20", "--max-length", "32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, an adapter on it, a model of another tokenizer, and prompts."""
    folder = tmp_path_factory.mktemp("diff")
    save_checkpoint(folder / "base")
    with_lora(tiny_model("llama")).save_pretrained(folder / "adapter")
    save_checkpoint(folder / "other")
    other = tiny_tokenizer()
    other.add_tokens(["strange"])
    other.save_pretrained(folder / "other")
    text = "the cat is good . the dog was bad ! come to the old garden in winter , we say no"
    words = text.split()
    rows = [
        {"messages": [{"role": "user", "content": f"why {words[i % 19]} ?"}, {"role": "assistant", "content": said}]}
        for i, said in enumerate(" ".join(words[(i + j) % len(words)] for j in range(12)) for i in range(24))
    ]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    questions = [{"messages": row["messages"][:1]} for row in rows[:8]]
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(row) for row in questions))
    (folder / "empty.jsonl").write_text("")
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(palimpsest, ["diff", *map(str, arguments)])


@pytest.fixture(scope="module")
def compared(folder: Path) -> tuple[Path, Result]:
    """The folder and the output of one comparison of the adapter with its base."""
    out = folder / "out"
    more = ("--questions", folder / "questions.jsonl", "--tuning-texts", folder / "prompts.jsonl", "--seeds", 2)
    more = (*more, "--stagewise", "--store-dtype", "int8", "--delta-weight", 0.5)
    arguments = (folder / "base", folder / "adapter", "--prompts", folder / "prompts.jsonl", "--out", out, *FAST, *more)
    return out, run(*arguments)


def test_an_adapter_is_compared_with_its_base_and_the_page_says_what_changed(compared: tuple[Path, Result]) -> None:
    out, result = compared
    assert result.exit_code == 0, result.output
    assert "predictions" in result.output
    assert str(out / "diff.html") in result.output
    twin = json.loads((out / "diff.json").read_text())
    assert twin["divergence"]["mean"] > 0.01
    assert len(twin["latents"]["latent"]) == 32
    html = (out / "diff.html").read_text()
    assert "The tuned model’s predictions changed" in html
    assert len(html.encode()) < 1_000_000


def test_every_part_stands_on_the_page_and_comes_back_from_its_twin(compared: tuple[Path, Result]) -> None:
    out, _ = compared
    result = DiffResult.load(out)
    assert "stability" in result.latents.columns
    html = (out / "diff.html").read_text()
    for part in ("answers", "mining", "lens", "baselines", "weights", "stagewise"):
        assert getattr(result, part) is not None
        assert f'<section id="{part}"' in html
    assert result.neighbours is not None and result.map is not None
    assert result.difference_sae is not None and '<section id="difference-sae"' in html
    assert sum(one.share for one in result.difference_sae.latents) <= 1.0 + 1e-9
    assert "The latents by what they write" in html
    assert "How often, and what each side uses the direction for" in html
    config = result.provenance.config
    assert config["plan"]["store_dtype"] == "int8" and config["crosscoder"]["delta_weight"] == 0.5
    again = render_diff_page(result)
    assert again == html


def test_splicing_and_steering_stand_on_the_page_and_hostile_answers_stay_text(compared: tuple[Path, Result]) -> None:
    found = DiffResult.load(compared[0])
    recoveries = (Recovery("exclusive", 3, 0.1, 0.62, 0.5, 0.7), Recovery("random", 3, 0.4, -0.1, -0.2, 0.0, (-0.1,)))
    hostile = "</span><script>alert(1)</script>"
    steering = Steering(
        latent=7,
        site="resid:1",
        unit=2.0,
        arms=(Arm("base"), Arm("base", 4.0)),
        answers=(SteeredAnswers("q1", ("yes", hostile)),),
        settings=GenerationSettings(),
    )
    splice = SpliceResult("resid:1", 0.5, recoveries, (1, 2, 7), 100, 12)
    html = render_diff_page(replace(found, splice=splice, steering=steering))
    assert '<section id="splice"' in html and "62\u202f%" in html and "−20\u202f% to 0\u202f%" in html
    assert "Latent 7 turned up and down" in html and "base +4" in html
    assert hostile not in html and html.count("<script") == render_diff_page(found).count("<script")


def test_a_model_compared_with_itself_has_not_changed(folder: Path) -> None:
    base, out = folder / "base", folder / "same"
    result = run(
        base, base, "--prompts", folder / "prompts.jsonl", "--out", out, "--json", "--site", "resid:1", *FAST, "--quick"
    )
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["divergence"]["mean"] == pytest.approx(0, abs=1e-6)
    assert "No change in predictions" in figures["headline"]
    assert figures["labels"]["tuned_only"] == figures["labels"]["base_only"] == 0


def _exit_and_message(arguments: Sequence[object], capsys: pytest.CaptureFixture[str], monkeypatch) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["palimpsest", "diff", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("base", "tuned", "prompts", "more", "expected"),
    [
        ("base", "adapter", "nowhere.jsonl", (), "nowhere.jsonl"),
        ("base", "adapter", "empty.jsonl", (), "empty.jsonl"),
        ("base", "nowhere", "prompts.jsonl", (), "nowhere"),
        ("base", "other", "prompts.jsonl", (), "okenizer"),
        ("base", "adapter", "prompts.jsonl", ("--site", "resid:99"), "99"),
        ("base", "adapter", "prompts.jsonl", ("--site", "resid:many"), "resid:many"),
        ("base", "adapter", "prompts.jsonl", ("--latents", "4", "--k", "9"), "n_latents"),
        ("base", "adapter", "prompts.jsonl", ("--latents", "0"), "n_latents"),
    ],
)
def test_wrong_input_is_explained_in_one_line(
    folder: Path, tmp_path: Path, capsys, monkeypatch,
    base: str, tuned: str, prompts: str, more: tuple[str, ...], expected: str,
) -> None:  # fmt: skip
    arguments = (folder / base, folder / tuned, "--prompts", folder / prompts, "--out", tmp_path / "out", *more)
    code, message = _exit_and_message(arguments, capsys, monkeypatch)
    assert code == 2
    lines = [line for line in message.splitlines() if line.startswith("Error")]
    assert len(lines) == 1, message
    assert expected in lines[0]
    assert "Traceback" not in message


def test_an_out_that_is_a_file_is_refused_before_anything_is_loaded(
    folder: Path, tmp_path, capsys, monkeypatch
) -> None:
    (tmp_path / "file").write_text("")
    arguments = ("nowhere", "nowhere", "--prompts", folder / "prompts.jsonl", "--out", tmp_path / "file")
    code, message = _exit_and_message(arguments, capsys, monkeypatch)
    assert code == 2
    assert "--out" in message


def test_a_store_cut_in_half_is_refused_with_the_file_named(
    folder: Path, compared: tuple[Path, Result], tmp_path: Path, capsys, monkeypatch
) -> None:
    shutil.copytree(compared[0], tmp_path / "out")
    files = [path for path in (tmp_path / "out" / "stores").rglob("*") if path.is_file()]
    chunk = max(files, key=lambda path: path.stat().st_size)
    chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 2])
    prompts = folder / "prompts.jsonl"
    same = ("--store-dtype", "int8")
    arguments = (folder / "base", folder / "adapter", "--prompts", prompts, "--out", tmp_path / "out", *FAST, *same)
    code, message = _exit_and_message(arguments, capsys, monkeypatch)
    assert code == 2
    assert "Error: Expected" in message
    assert str(chunk) in message
    assert "Traceback" not in message
