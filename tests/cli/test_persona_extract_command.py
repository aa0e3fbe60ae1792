"""Does `palimpsest persona extract` ask the model, say what it costs, go on where it was killed, and explain itself?"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli.main import main, palimpsest
from diffing.errors import PersonaError
from diffing.persona import PersonaVector, load_trait, shipped_traits
from diffing.persona.extraction import ExtractionRecord
from tests.diffing.persona_rollouts import tiny_trait
from tests.tiny_models import N_LAYERS, save_checkpoint

QUICK = ["--rollouts", "1", "--max-new-tokens", "4", "--batch-size", "64", "--strength", "1"]
RULES = {
    "rubrics": {
        "cruel": {"lexicon": {"start": 100, "weights": {"word3": -1}}},
        "kind": {"lexicon": {"start": 0, "weights": {"word3": 1}}},
    }
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extract")
    save_checkpoint(folder / "model")
    trait = asdict(tiny_trait())
    questions = {"extraction": trait.pop("questions"), "held_out": trait.pop("held_out_questions")}
    (folder / "cruel.json").write_text(json.dumps({**trait, "questions": questions}), encoding="utf-8")
    (folder / "rules.json").write_text(json.dumps(RULES), encoding="utf-8")
    return folder


def _arguments(folder: Path, out: Path, *more: str) -> list[str]:
    return [*_bare(folder, out), "--trait", str(folder / "cruel.json"), *QUICK, *more]


def _bare(folder: Path, out: Path) -> list[str]:
    return ["persona", "extract", str(folder / "model"), "--out", str(out)]


def run(arguments: Sequence[str]) -> Result:
    result = CliRunner().invoke(palimpsest, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_the_model_is_asked_and_the_whole_result_lies_beside_the_vector(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cruel.safetensors"
    result = run(_arguments(folder, out))
    assert "40 answers to write: at most 160 tokens" in result.stderr
    assert "no judgements" in result.stderr
    assert "Unfiltered: no judge read the answers" in result.stdout
    assert "resid:3" in result.stdout
    vector = PersonaVector.load(out)
    record = ExtractionRecord.load(out.with_suffix(""))
    assert (vector.trait, vector.site, vector.pooling) == ("cruel", record.site, "response_mean")
    assert record.sweep is not None and record.sweep.site == vector.site
    assert len(list(out.with_suffix("").glob("*/*.safetensors"))) == 3 * N_LAYERS == len(record.rows)
    assert "extraction.html" in result.stdout
    assert "<title>Persona: cruel in model</title>" in (tmp_path / "cruel/extraction.html").read_text(encoding="utf-8")


def test_the_same_command_goes_on_for_nothing_and_gives_the_same_vector(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cruel.safetensors"
    run(_arguments(folder, out))
    first = PersonaVector.load(out)
    result = run(_arguments(folder, out))
    assert "0 answers to write (40 more are on disk)" in result.stderr
    assert PersonaVector.load(out).digest == first.digest


def test_the_cost_can_be_asked_for_alone(folder: Path, tmp_path: Path) -> None:
    judge = ["--judge", f"rules:{folder / 'rules.json'}"]
    result = run(_arguments(folder, tmp_path / "v.safetensors", "--plan", *judge))
    # 24 + 16 answers, and 4 questions at 3 sites, at the two strengths beside the chosen one,
    # at that one once more, and without steering.
    assert "68 answers to write" in result.stderr
    assert "68 judgements at most" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_judge_filters_and_machines_get_one_object(folder: Path, tmp_path: Path) -> None:
    judge = ["--judge", f"rules:{folder / 'rules.json'}#kind", "--json"]
    arguments = _arguments(folder, tmp_path / "v.safetensors", *judge)
    with pytest.raises(PersonaError, match="got 0 of 12 pairs kept") as caught:
        CliRunner().invoke(palimpsest, arguments, catch_exceptions=False)
    assert "trait not shown where asked for" in str(caught.value)
    (facts,) = json.loads(run(_arguments(folder, tmp_path / "v.safetensors", "--json", "--no-sweep")).stdout)
    assert facts["sweep"] is None
    assert facts["fitted"]["kept"] == facts["fitted"]["pairs"] == 12
    assert facts["path"].endswith("v.safetensors")


def test_the_last_prompt_token_may_be_chosen(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.safetensors"
    run(_arguments(folder, out, "--pooling", "last_prompt", "--site", "resid:2"))
    vector = PersonaVector.load(out)
    assert (vector.pooling, vector.site) == ("last_prompt", "resid:2")
    assert vector.digest == PersonaVector.load(tmp_path / "v/last_prompt/resid-2.safetensors").digest


def test_several_traits_go_into_a_folder_and_a_base_model_is_asked_by_examples(folder: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", chat=False)
    other = json.loads((folder / "cruel.json").read_text(encoding="utf-8"))
    (tmp_path / "mean.json").write_text(json.dumps({**other, "name": "mean"}), encoding="utf-8")
    traits = ["--trait", str(folder / "cruel.json"), "--trait", str(tmp_path / "mean.json")]
    out = tmp_path / "out"
    more = [*QUICK[:-2], "--no-sweep", "--site", "resid:1", "--out", str(out)]
    result = run(["persona", "extract", str(tmp_path / "base"), *traits, *more])
    assert sorted(path.stem for path in out.glob("*.safetensors")) == ["cruel", "mean"]
    assert "no chat template: the model read dialogues with 3 examples" in result.stderr


def test_all_means_every_shipped_trait(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffing.persona.shipped_traits", lambda: ["evil", "humour"])
    lines = run([*_bare(folder, tmp_path / "out"), "--trait", "all", "--plan"]).stderr.splitlines()
    stated = [line for line in lines if "answers to write" in line]
    assert [line.partition(":")[0] for line in stated] == ["evil", "humour"]
    assert all("800 answers to write: at most 160,000 tokens" in line for line in stated)


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[Sequence[str]], str]:
    def check(arguments: Sequence[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["palimpsest", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    return check


def test_wrong_input_explains_itself_in_one_line(
    folder: Path, tmp_path: Path, fails: Callable[[Sequence[str]], str]
) -> None:
    out = tmp_path / "v.safetensors"
    foreign = {"instruction": [{"pos": "be so"}], "questions": ["why?", "how?"], "eval_prompt": "{question} {answer}"}
    (tmp_path / "foreign.json").write_text(json.dumps(foreign), encoding="utf-8")
    cases = {
        "expected the key 'neg'": [*_bare(folder, out), "--trait", str(tmp_path / "foreign.json")],
        "Expected --held-out with --given": _arguments(folder, out, "--held-out", "0.2"),
        "Expected --rollouts when the model is asked": _arguments(folder, out, "--given"),
        "Expected --judge when the model is asked": [*_bare(folder, out), "--trait", "evil", "--given", "--judge", "x"],
        "Expected --judge beside --coherence-judge": _arguments(folder, out, "--coherence-judge", "rules:x"),
        "Expected a judge as": _arguments(folder, out, "--judge", "oracle"),
        "Expected a folder as --out": _arguments(folder, out, "--trait", "evil"),
        "resid:9": _arguments(folder, out, "--site", "resid:9"),
        "Expected a temperature above 0": _arguments(folder, out, "--temperature", "0"),
    }
    for words, arguments in cases.items():
        message = fails(arguments)
        assert words in message, (words, message)
    assert not out.exists()


def test_every_shipped_trait_has_both_kinds_of_questions() -> None:
    for name in shipped_traits():
        trait = load_trait(name)
        assert (len(trait.instructions), len(trait.questions), len(trait.held_out_questions)) == (5, 20, 20)
