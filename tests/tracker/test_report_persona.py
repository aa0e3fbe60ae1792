"""Does the page of an extraction say what was found, whole and harmless, and come back from its twin?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diffing.errors import PathMissingError, PersonaError
from diffing.persona.extraction import RECORD_NAME, ExtractionRecord, PairExample, VectorRow
from diffing.persona.keep import Kept
from diffing.persona.separation import Separation
from diffing.persona.sweep_result import Estimate, LayerSweep, SweepPoint
from diffing.persona.vector import Null
from tracker.report.persona_page import PAGE_NAME, persona_headline, render_persona_page, write_persona_report

HOSTILE = "<script>alert(1)</script>\u202e{{ 7 * 7 }}"


def _estimate(value: float) -> Estimate:
    return Estimate(value, value - 0.1, value + 0.1, 20)


def _record(*, judged: bool = True, gain: float = 0.3) -> ExtractionRecord:
    sites = [f"resid:{layer}" for layer in range(3)]
    points = tuple(
        SweepPoint(
            site,
            strength,
            _estimate(0.2 * (1 + layer) * strength),
            _estimate(gain),
            _estimate(10.0 * strength) if judged and layer else None,
            _estimate(90.0) if judged and layer else None,
        )
        for layer, site in enumerate(sites)
        for strength in (1.0, 2.0)
    )
    sweep = LayerSweep(
        trait="evil",
        points=points,
        site="resid:2",
        strength=2.0,
        scored_by="rules:evil" if judged else "log-odds",
        why="Because.",
        random_most=0.1,
        n_random=8,
        unsteered_trait=_estimate(1.0) if judged else None,
    )
    rows = tuple(
        VectorRow(site, pooling, 3.5, Separation(0.97, 0.9, 0.99, 40, 20, 0.9), Null(0.7, 0.6, 0.01, 100, 100))
        for pooling in ("response_mean", "last_prompt", "prompt_mean")
        for site in sites
    )
    return ExtractionRecord(
        trait="evil",
        description="The assistant wishes harm.",
        trait_digest="ab" * 32,
        model="tiny",
        model_fingerprint="cd" * 32,
        fitted=Kept(100, 80, "rules:evil", "", {"empty": 20}, 93.0, 2.0),
        held_out=Kept(20, 20, "rules:evil"),
        cut=3,
        answers=240,
        rows=rows,
        sweep=sweep,
        site="resid:2",
        pooling="response_mean",
        why="Because.",
        notes=("Answers were cut.",),
        examples=(PairExample("Why?", HOSTILE, "Because."),),
        settings={"rollouts": 5},
    )


def test_the_page_says_where_it_steers_and_how_well_it_reads() -> None:
    html = render_persona_page(_record())
    assert "Adding 2 gaps at resid:2 brings evil out best" in html
    assert "AUROC of 0.97 (at least 0.9)" in html
    for words in ("80 <small>of 100", "Read with care", "Answers were cut.", "+1.2", "empty (20)", "rollouts", "93"):
        assert words in html
    assert html.count("<svg") == 5


def test_a_page_without_a_judge_or_a_sweep_says_so() -> None:
    assert "What the judge says" not in render_persona_page(_record(judged=False))
    bare = replace(_record(), sweep=None, fitted=Kept(100, 100))
    html = render_persona_page(bare)
    assert "Where adding it" not in html
    assert "unfiltered: no judge read them" in html
    assert persona_headline(bare).startswith("Evil is read at resid:2")


def test_a_direction_that_helps_nowhere_is_not_praised() -> None:
    assert persona_headline(_record(gain=-0.2)).startswith("No layer brings evil out")


def test_text_of_models_stays_text() -> None:
    html = render_persona_page(replace(_record(), trait="e<b>vil", model=HOSTILE, notes=(HOSTILE,)))
    assert "<script>alert" not in html
    assert "e<b>vil" not in html
    assert "\u202e" not in html
    assert "7 * 7" in html


def test_nothing_is_loaded_from_anywhere() -> None:
    html = render_persona_page(_record())
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "https://" not in html
    assert "default-src &#39;none&#39;" in html


def test_the_twin_gives_the_same_page(tmp_path: Path) -> None:
    page = write_persona_report(_record(), tmp_path)
    assert page.name == PAGE_NAME
    again = ExtractionRecord.load(tmp_path)
    assert again == _record()
    assert render_persona_page(again) == page.read_text(encoding="utf-8") == render_persona_page(_record())


def test_a_twin_that_is_none_explains_itself(tmp_path: Path) -> None:
    with pytest.raises(PathMissingError, match="no such file"):
        ExtractionRecord.load(tmp_path)
    for text in ("nonsense", "{}", "[1]"):
        (tmp_path / RECORD_NAME).write_text(text, encoding="utf-8")
        with pytest.raises(PersonaError, match="Expected an extraction") as caught:
            ExtractionRecord.load(tmp_path)
        assert "\n" not in str(caught.value)
