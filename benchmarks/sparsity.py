"""What does each kind of fit find, and what does it invent? BatchTopK, its revival, L1, JumpReLU, a partition."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator

import torch

from benchmarks.figure import Figure
from benchmarks.sparsity_record import KINDS, WORLDS, kept_score, seeds_of


def run() -> list[Figure]:
    """Four worlds, three or five seeds each, 512 latents, 1,500 steps of 512 tokens, brought to the true L0."""
    torch.set_num_threads(1)
    logging.getLogger("diffing.crosscoder.fit").setLevel(logging.ERROR)
    return [figure for kind in KINDS for figure in _figures(kind)]


def _figures(kind: str) -> Iterator[Figure]:
    for name in WORLDS:
        scores = [kept_score(kind, name, seed) for seed in seeds_of(kind)]
        if name == "null":
            yield _figure(f"exclusive calls, null, {kind}", [float(one.n_exclusive) for one in scores])
            continue
        explained = statistics.median(one.variance_explained for one in scores)
        invented = sum(one.false_exclusive for one in scores)
        called = sum(one.n_exclusive for one in scores)
        note = f"{invented} of {called} exclusive calls false; L0 {statistics.median(one.l0 for one in scores):.1f}, "
        note += f"variance explained {explained:.3f}"
        yield _figure(f"macro-F1, {name}, {kind}", [one.macro_f1 for one in scores], note)
        recalls = [one.recall_child for one in scores]
        yield _figure(f"recall of exclusive features with a parent, {name}, {kind}", recalls)


def _figure(name: str, values: list[float], note: str = "") -> Figure:
    return Figure(name, statistics.median(values), "", min(values), max(values), len(values), note=note)
