"""Do benchmarks keep a score exactly as long as the code that made it computes the same?"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from benchmarks import kept_scores, source_digest
from benchmarks.kept_scores import KeptScores
from benchmarks.planted_score import Score
from benchmarks.quantised import _change
from benchmarks.quantised_record import neighbours_of


def digest(folder: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> str:
    for name, text in files.items():
        (folder / "made").mkdir(exist_ok=True)
        (folder / "made" / f"{name}.py").write_text(text)
    monkeypatch.setattr(source_digest, "_ROOT", folder)
    return source_digest.source_digest(("made.first",), within=("made.",))


def test_the_digest_follows_imports_and_ignores_words(tmp_path, monkeypatch):
    before = digest(
        tmp_path,
        monkeypatch,
        first="from made import second\nfrom made.third import g\n\n\ndef f():\n    return 1\n",
        second="X = 1\n",
        third="def g():\n    return 2\n",
        fourth="Y = 1\n",
    )
    f = 'def f():\n    """One."""\n    return 1\n'
    worded = f'"""What?"""\nfrom made import second  # why\nfrom made.third import g\n{f}'
    assert digest(tmp_path, monkeypatch, first=worded) == before
    assert digest(tmp_path, monkeypatch, fourth="Y = 2\n") == before
    assert digest(tmp_path, monkeypatch, second="X = 2\n") != before
    assert digest(tmp_path, monkeypatch, second="X = 1\n") == before
    assert digest(tmp_path, monkeypatch, third="def g():\n    return 3\n") != before


def test_a_score_is_measured_once_a_code(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_scores, "_CACHE", tmp_path)
    made: list[Score] = []

    def measure() -> Score:
        made.append(Score(**{field.name: len(made) for field in fields(Score)}))
        return made[-1]

    old, new = KeptScores("worlds", "a"), KeptScores("worlds", "b")
    assert old.read("std-1") is None
    assert old.get("std-1", measure) == old.get("std-1", measure) == old.read("std-1")
    assert new.read("std-1") is None
    assert new.get("std-1", measure).l0 == 1
    assert old.read("std-1") is None
    assert len(made) == 2


def test_neighbours_differ_from_every_number_by_one_step(tmp_path):
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    moved = neighbours_of(x, seed=0)
    assert (moved != x).all()
    assert ((moved > x).float().mean() - 0.5).abs() < 0.15
    assert torch.equal(torch.nextafter(moved, x), x)


def test_the_cost_of_packing_is_the_mean_of_differences_within_a_seed_with_its_interval():
    def scores(exact: float, packed: float) -> dict[str, Score]:
        values = {field.name: 0 for field in fields(Score)}
        return {"float32": Score(**{**values, "macro_f1": exact}), "int8": Score(**{**values, "macro_f1": packed})}

    seeds = [scores(0.9, 0.9), scores(0.95, 0.93), scores(0.8, 0.81)]
    figure = _change("F1", seeds, "int8", lambda one: one.macro_f1, 0.01)
    assert figure.value == pytest.approx(-0.01 / 3)
    # Standard error of 0, −.02, .01 is .00882; Student's 97.5 % point with two degrees of freedom is 4.303.
    assert figure.high - figure.low == pytest.approx(2 * 4.303 * 0.008819, rel=1e-3)
    assert figure.met and not _change("F1", seeds, "int8", lambda one: one.macro_f1, 0.001).met
