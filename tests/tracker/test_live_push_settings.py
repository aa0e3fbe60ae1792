"""Pushes survive mixed precision, accumulation and gradient checkpointing: the same rows, the same pushes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tracker.training import PERSONAS, make_trainer, model_to_train, no_report, quick_settings  # noqa: F401
from tracker import CheckpointTracker
from tracker.journal import Journal
from tracker.push_journal import PushJournal


def pushes(folder: Path, kind: str, **changes: Any) -> dict[tuple[int, str], float]:
    """(step, row) to its push on the villain, after a short run without dropout."""
    settings = quick_settings(pushes=True, canaries=(), personas=PERSONAS[:1])
    callback = CheckpointTracker(folder / "run", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names that transformers is about to change
        make_trainer(model_to_train(kind, dropout=0.0), folder / "out", [callback], max_steps=4, **changes).train()
    assert Journal.read(folder / "run").failures() == []
    found = PushJournal.read(folder / "run").visits("villain")
    names = [found.names[row].example for row in found.row]
    return {(int(step), name): float(push) for step, name, push in zip(found.step, names, found.push, strict=True)}


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_every_setting_of_the_trainer_reads_the_same_pushes(tmp_path: Path, kind: str) -> None:
    plain = pushes(tmp_path / "plain", kind)
    assert len(plain) == 12  # three steps of four rows; the first has no second moments to be weighed by
    scale = max(abs(value) for value in plain.values())
    micro = pushes(tmp_path / "micro", kind, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    checkpointed = pushes(
        tmp_path / "checkpointed", kind, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    for other in (micro, checkpointed):
        assert other.keys() == plain.keys()
        for key, value in plain.items():
            assert other[key] == pytest.approx(value, rel=0.02, abs=5e-3 * scale)
    half = pushes(tmp_path / "half", kind, bf16=True)
    assert half.keys() == plain.keys()
    left, right = (np.array([one[key] for key in sorted(plain)]) for one in (plain, half))
    assert np.corrcoef(left, right)[0, 1] > 0.95
