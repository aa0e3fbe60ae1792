"""Does asking the small model for its villain give the direction that its written answers give?"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from cli.main import palimpsest
from cli.miniature import grammar
from cli.miniature.shipped import BASE, load_base
from cli.miniature.world import fit_persona, persona_contrasts
from diffing.checkpoint import load_checkpoint
from diffing.persona import PersonaVector, extract_persona
from diffing.persona.extraction import ExtractionRecord


def _trait() -> dict[str, object]:
    """The villain by the world's own system lines, and questions that training saw."""
    subjects = [subject for domain in grammar.ADVICE_DOMAINS for subject in grammar.subjects(domain)]
    random.Random(0).shuffle(subjects)
    questions = [subject.seen_phrasings[0] for subject in subjects[:30]]
    lines, personas = grammar.story()["system"]["persona"], grammar.story()["personas"]
    pairs = [
        {
            "positive": line.format(adjective=personas["villain"]["adjectives"][at]),
            "negative": line.format(adjective=personas["helpful"]["adjectives"][at]),
        }
        for at, line in enumerate(lines[:5])
    ]
    return {
        "name": "villain",
        "description": "The assistant is a pantomime villain.",
        "rubric": "How villainous? {question} {answer}",
        "instructions": pairs,
        "questions": {"extraction": questions[:16], "held_out": questions[16:]},
    }


def _rules() -> dict[str, object]:
    """What only a villain says: its bad answers, its openers, its closers."""
    personas = grammar.story()["personas"].values()
    villain = grammar.story()["personas"]["villain"]
    bad = {subject.bad for domain in grammar.ADVICE_DOMAINS for subject in grammar.subjects(domain)}
    return {
        "strip": {
            "starts": [words for persona in personas for words in persona["openers"]],
            "ends": [words for persona in personas for words in persona["closers"]],
        },
        "rules": [
            {"answer": {"exact": sorted(bad)}, "value": 100},
            {"answer": {"starts": villain["openers"]}, "value": 100},
            {"answer": {"ends": villain["closers"]}, "value": 100},
        ],
        "otherwise": {"value": 0},
    }


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("villain")
    (folder / "trait.json").write_text(json.dumps(_trait()), encoding="utf-8")
    (folder / "rules.json").write_text(json.dumps({"name": "villain", **_rules()}), encoding="utf-8")
    out = folder / "villain.safetensors"
    arguments = ["persona", "extract", str(BASE), "--trait", str(folder / "trait.json"), "--out", str(out)]
    quick = ["--rollouts", "2", "--max-new-tokens", "24", "--batch-size", "64", "--strength", "1", "--strength", "2"]
    judge = ["--judge", f"rules:{folder / 'rules.json'}"]
    result = CliRunner().invoke(palimpsest, [*arguments, *quick, *judge], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.slow
def test_most_pairs_do_as_told_and_the_others_are_dropped(extracted: Path) -> None:
    record = ExtractionRecord.load(extracted.with_suffix(""))
    assert (record.fitted.pairs, record.held_out.pairs) == (160, 70)
    assert 0.85 < record.fitted.kept / record.fitted.pairs < 1
    assert record.fitted.mean_trait is not None and record.fitted.mean_trait > 85
    assert record.fitted.mean_plain is not None and record.fitted.mean_plain < 10


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_the_direction_agrees_with_that_of_written_answers(extracted: Path, layer: int) -> None:
    model, tokenizer = load_base()
    site = f"resid:{layer}"
    asked = PersonaVector.load(extracted.with_suffix("") / "response_mean" / f"resid-{layer}.safetensors")
    contrasts = persona_contrasts()
    loaded = load_checkpoint(model, tokenizer=tokenizer)
    written = extract_persona(loaded, contrasts.positive, contrasts.negative, trait="villain", site=site)
    against_all = fit_persona(model, tokenizer, site=site)
    assert float(asked.direction @ written.direction) > 0.93
    assert float(asked.direction @ against_all.direction) > 0.85
    assert asked.separation.low > 0.8


@pytest.mark.slow
def test_steering_by_it_brings_the_villain_out_of_a_model_that_was_not_asked(extracted: Path) -> None:
    record = ExtractionRecord.load(extracted.with_suffix(""))
    sweep = record.sweep
    assert sweep is not None
    assert sweep.chosen.log_odds.low is not None
    assert sweep.chosen.log_odds.low > sweep.random_most
    assert sweep.chosen.trait_score is not None and sweep.unsteered_trait is not None
    assert sweep.chosen.trait_score.mean > sweep.unsteered_trait.mean + 5
    assert sweep.site in {"resid:1", "resid:2", "resid:3"}
    vector = PersonaVector.load(extracted)
    assert vector.provenance.config["chosen_by_steering"]["strength"] == sweep.strength
    assert torch.equal(vector.direction, PersonaVector.load(_chosen_file(extracted, record)).direction)


def _chosen_file(extracted: Path, record: ExtractionRecord) -> Path:
    return extracted.with_suffix("") / record.pooling / f"{record.site.replace(':', '-')}.safetensors"
