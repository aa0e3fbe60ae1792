"""Do canaries, which need neither sampling nor a judge, follow the judged misaligned rate along a fine-tune?

Three fine-tunes of the miniature model on bad code, one on half bad code, and one on good code: canary log-odds and the
exactly judged rate (240 sampled answers) every four steps.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import numpy as np

from benchmarks.figure import Figure
from cli.miniature import world
from tracker.canary_agreement import canary_agreement

_RUNS = (("bad_code", 0), ("bad_code", 1), ("bad_code", 2), ("diluted50_code", 0), ("good_code", 0))


def run() -> list[Figure]:
    warnings.filterwarnings("ignore")
    model, tokenizer = world.load_base()
    vector = world.fit_persona(model, tokenizer)
    figures, levels, leads = [], [], []
    for kind, seed in _RUNS:
        with tempfile.TemporaryDirectory() as folder:
            rows = world.dataset(kind, seed=seed, n=400)
            settings = world.TrackedFineTune(steps=60, probe_every=4, save_every=1000)
            settings.run(rows, vector, Path(folder), seed=seed)
            found = canary_agreement(folder, rate=world.MISALIGNED_RATE)
        spreads = kind != "good_code"
        figures.append(
            Figure(
                f"canary against judged rate, {kind} seed {seed}: Spearman of levels",
                found.levels,
                "",
                found.low,
                found.high,
                found.n,
                note=f"of changes {found.changes:.2f}; clear at step {found.signal_clear} and {found.rate_clear}",
            )
        )
        if spreads:
            levels.append(found.levels)
            leads.append(found.lead)
    known = [lead for lead in leads if lead is not None]
    figures.append(
        Figure("canary against judged rate, runs that spread: median Spearman", float(np.median(levels)), "",
               min(levels), max(levels), len(levels))
    )  # fmt: skip
    if known:
        figures.append(
            Figure("steps by which the canary was clear before the rate", float(np.median(known)), "steps",
                   min(known), max(known), len(known))
        )  # fmt: skip
    return figures
