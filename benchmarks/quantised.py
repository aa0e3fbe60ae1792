"""What do int8 and int4 stores cost a crosscoder, how many bytes do they save, and how fast are they read?

Planted worlds are written to fp32 stores and quantised; one crosscoder is fitted on each, and all are scored on the
same exact tokens that they have not seen. Beside it stands what the same fit differs by where nothing is lost: numbers
moved by one bit, and another seed. Reading is one pass in order over both sides, from memory, by turns.
"""

from __future__ import annotations

import logging
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from scipy.stats import t as student

from benchmarks.alternate import alternate
from benchmarks.figure import Figure
from benchmarks.planted_score import Score
from benchmarks.quantised_record import EXACT, MEMORY, RESEEDED, ROUNDED, SEEDS, SITE, WORLDS, scores_of, write_store
from diffing import PairedActivations
from diffing.packed_rows import PACKED_DTYPES, PackedRows
from diffing.quantise import quantise_store
from diffing.store import ActivationStore

MOST_FVE, MOST_F1 = 0.001, 0.01
TURNS = 5
READ_ROWS, READ_WIDTH = 16_384, 1024
_WORDS = {ROUNDED: "fp32 moved by one bit", RESEEDED: "fp32 from another seed"}


def run() -> list[Figure]:
    """Both worlds, five seeds; then bytes and speed at the width of a real model."""
    torch.set_num_threads(1)
    logging.getLogger("diffing.crosscoder.fit").setLevel(logging.ERROR)
    figures = [figure for name in WORLDS for figure in _fits(name)]
    return figures + list(_reading())


def _fits(name: str) -> Iterator[Figure]:
    scores = [scores_of(name, seed) for seed in SEEDS]
    for variant in (*PACKED_DTYPES, ROUNDED, RESEEDED):
        what = f"{_WORDS.get(variant, variant)} less fp32, {name}"
        yield _change(f"variance explained, {what}", scores, variant, lambda one: one.variance_explained, MOST_FVE)
        yield _change(f"macro-F1, {what}", scores, variant, lambda one: one.macro_f1, MOST_F1)


def _change(
    name: str, scores: list[dict[str, Score]], variant: str, of: Callable[[Score], float], most: float
) -> Figure:
    """Mean over seeds of the difference within a seed, with its 95 % t-interval."""
    values = [of(found[variant]) - of(found[EXACT]) for found in scores]
    value, n = statistics.mean(values), len(values)
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    exact = statistics.mean(of(found[EXACT]) for found in scores)
    note = f"mean and 95 % t-interval; by seed {' '.join(f'{one:+.4f}' for one in values)}; fp32 {exact:.4f}"
    if variant != "int8":  # targets are set for int8 alone
        return Figure(name, value, "", value - half, value + half, n, note=note)
    return Figure(name, value, "", value - half, value + half, n, f">= -{most}", value >= -most, note)


def _reading() -> Iterator[Figure]:
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        rows = [torch.randn(READ_ROWS, READ_WIDTH, generator=generator) for _ in range(2)]
        exact = [write_store(Path(name) / str(number), x) for number, x in enumerate(rows)]
        theirs = PairedActivations.from_stores(exact, SITE)
        for dtype in PACKED_DTYPES:
            packed = [quantise_store(store, f"{store.path}-{dtype}", dtype) for store in exact]
            share = _bytes(packed[0]) / _bytes(exact[0])
            bound = PackedRows(READ_WIDTH, dtype).row_bytes / (4 * READ_WIDTH)
            note = f"rows alone {bound:.4f}; the rest is tokens, norms and errors, d {READ_WIDTH}"
            yield Figure(f"bytes of a store in fp32's, {dtype}", share, "ratio", note=note)
            ours = PairedActivations.from_stores(packed, SITE)
            turns = alternate(lambda ours=ours: _sum(ours), lambda: _sum(theirs), turns=TURNS)
            yield Figure(f"seconds to read in fp32's, {dtype}", turns.times, "ratio", turns.each[0], turns.each[-1],
                         TURNS, note=f"from memory, best turn of each; CPU time {turns.cpu_times:.2f}")  # fmt: skip


def _bytes(store: ActivationStore) -> int:
    return sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())


def _sum(paired: PairedActivations) -> float:
    return sum(float(batch.sum()) for batch in paired.sequential(2048) if isinstance(batch, torch.Tensor))
