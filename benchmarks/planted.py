"""How much of a planted difference does the crosscoder find, how much does it invent, and does it know which?

Held-out seeds: none of them was looked at while thresholds were chosen. `benchmarks.planted_record` keeps the scores.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch

from benchmarks.figure import Figure
from benchmarks.planted_record import SEEDS, WORLDS, kept_score
from benchmarks.planted_score import Score
from diffing.interval import Share


def run() -> list[Figure]:
    """Six worlds, five seeds each, 512 latents, 1,500 steps of 512 tokens, k = true L0, one null fit."""
    torch.set_num_threads(1)
    scores = {name: [kept_score(name, seed) for seed in SEEDS] for name in WORLDS}
    figures = []
    for name in WORLDS:
        if name != "null":
            figures += _quality(name, scores[name])
    invented = [float(found.n_exclusive) for found in scores["null"]]
    figures.append(_figure("exclusive calls, null", invented, "<= 2", most=True))
    return [*figures, *_discoveries(scores)]


def _quality(name: str, scores: list[Score]) -> list[Figure]:
    def of(what: str, value: Callable[[Score], float], target: str = "") -> Figure:
        return _figure(f"{what}, {name}", [value(found) for found in scores], target)

    aims = {"std": ">= 0.96", "hard": ">= 0.92"}
    recall = ">= 0.9" if name in aims else ""
    return [
        of("macro-F1", lambda found: found.macro_f1, aims.get(name, "")),
        of("recall of exclusive features with a parent", lambda found: found.recall_child, recall),
        of("the same with q < 0.05", lambda found: found.recall_sure_child, recall),
        of("recall of other exclusive features with q < 0.05", lambda found: found.recall_sure_free, recall),
        of("L0", lambda found: found.l0),
        of("variance explained", lambda found: found.variance_explained),
        of("mean max cosine", lambda found: found.mmcs),
        of("dead latents", lambda found: found.dead),
        of("duplicate latents", lambda found: found.duplicates),
    ]


def _discoveries(scores: dict[str, list[Score]]) -> list[Figure]:
    """False exclusive calls with q < 0.05, in each world and over all; Wilson intervals over calls."""
    figures = []
    for name in (*scores, "all worlds"):
        found = [one for world, some in scores.items() for one in some if name in (world, "all worlds")]
        share = Share.of(sum(one.false_sure for one in found), sum(one.n_sure for one in found))
        target = "<= 0.05" if name == "all worlds" else ""
        unsure = sum(one.n_exclusive - one.n_sure for one in found)
        figures.append(
            Figure(
                f"false discoveries at q < 0.05, {name}",
                0.0 if math.isnan(share.value) else share.value,
                "",
                share.low,
                share.high,
                share.n,
                target,
                (share.count <= 0.05 * share.n) if target and share.n else None,
                f"{share.count} of {share.n} calls; 95 % Wilson interval; {unsure} exclusive calls above",
            )
        )
    return figures


def _figure(name: str, values: list[float], target: str = "", *, most: bool = False) -> Figure:
    value = max(values) if most else statistics.median(values)
    met = None
    if target:
        sign, bound = target.split()
        met = value >= float(bound) if sign == ">=" else value <= float(bound)
    note = "largest of the seeds" if most else ""
    return Figure(name, value, "", min(values), max(values), len(values), target, met, note)
