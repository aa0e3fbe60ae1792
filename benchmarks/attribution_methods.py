"""How do our methods score the benchmark's worlds? Through the public doors, on the same files as the peers.

`along`: EK-FAC summed over the run's start and its six checkpoints, each to its own spread, fitted at each.
`ensemble`: the same over further runs on the same rows in other orders: what they share is the rows' doing.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import nn
from transformers import LlamaForCausalLM

from attribution.lexical import lexical_scores
from attribution.trajectory import SavedStep, influence_along
from benchmarks.attribution_training import fine_tune
from benchmarks.attribution_truth import Setting, measured, run_seed

N_FURTHER_RUNS = 3


def score_words(setting: Setting) -> Float[np.ndarray, "measured row"]:
    """TF-IDF on the rows' words."""
    world = setting.world
    return lexical_scores([world.text(row) for row in world.rows], [world.text(row) for row in measured(world)])


def score_along(setting: Setting) -> tuple[Float[np.ndarray, "measured row"], float]:
    """Scores over the run, and their CPU-seconds."""
    started = time.process_time()
    return _score_run(setting, setting.checkpoints), time.process_time() - started


def score_ensemble(
    setting: Setting, along: Float[np.ndarray, "measured row"]
) -> tuple[Float[np.ndarray, "measured row"], float]:
    """The run's scores with those of further runs, and the CPU-seconds of these, their training included."""
    started = time.process_time()
    further = [_score_run(setting, _further_run(setting, number)) for number in range(N_FURTHER_RUNS)]
    return np.sum([along, *further], axis=0), time.process_time() - started


def _score_run(setting: Setting, checkpoints: list[Path]) -> Float[np.ndarray, "measured row"]:
    saved = [SavedStep(int(folder.name.split("-")[1]), 1.0, partial(_load, folder)) for folder in checkpoints]
    start = SavedStep(0, 1.0, setting.base)
    rows, asked = list(setting.world.rows), measured(setting.world)
    return influence_along([start, *saved], rows, asked, level=True).values  # chosen on worlds 10 to 12


def _further_run(setting: Setting, number: int) -> list[Path]:
    """A run on the same rows in an order that no truth used."""
    folder = setting.folder / f"further-{number}"
    if not list(folder.glob("checkpoint-*")):
        folder.mkdir(exist_ok=True)
        fine_tune(setting.base(), setting.world.rows, seed=run_seed(setting.world) + 950 + number, save_to=folder)
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def _load(folder: Path) -> nn.Module:
    return LlamaForCausalLM.from_pretrained(folder)
