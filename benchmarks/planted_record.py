"""How does one fit in one planted world score, and its null?

    python -m benchmarks.planted_record [--seconds N]

A fit with its null takes a minute or two and there are thirty. Each one's score is kept in
`benchmarks/cache/planted/<world>-<seed>.json`, so that a killed benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from contextlib import suppress
from functools import cache

import torch

from benchmarks.kept_scores import KeptScores
from benchmarks.planted_score import Score, score
from benchmarks.planted_world import make_world, pair_of
from benchmarks.source_digest import source_digest
from diffing.crosscoder.compare import compare
from diffing.crosscoder.config import CrosscoderConfig
from diffing.crosscoder.fit import fit_crosscoder
from diffing.crosscoder.null import calibrate_null

# Held out: none of them was looked at while thresholds were chosen.
SEEDS = (101, 102, 103, 104, 105)
WORLDS = ("std", "hard", "null", "faint", "noisy", "rare")
N_TOKENS, N_HELD_OUT = 200_000, 50_000


def measure(name: str, seed: int) -> Score:
    """One fit in one world and its null, scored on tokens it has not seen."""
    world = make_world(name, seed=seed)
    *_, codes = world.sample(N_TOKENS)
    true_l0 = float((codes.amax(dim=0) > 0).sum(dim=1).float().mean())
    del codes
    config = CrosscoderConfig(n_latents=512, k=round(true_l0), steps=1500, batch_size=512, seed=0)
    paired = pair_of(world, N_TOKENS)
    fit = fit_crosscoder(paired, config)
    null = calibrate_null(paired, config, fit=fit)
    return score(world, fit, compare(fit, pair_of(world, N_HELD_OUT, seed=1), null=null))


def kept_score(name: str, seed: int) -> Score:
    """The score that was kept of the code as it is; else a new one, which is kept."""
    return _kept().get(f"{name}-{seed}", lambda: measure(name, seed))


def score_missing(seconds: float = float("inf")) -> None:
    """Scores what is not kept yet, seed by seed; begins none after so long by the clock."""
    deadline = time.monotonic() + seconds
    for seed in SEEDS:
        for name in WORLDS:
            if _kept().read(f"{name}-{seed}") is not None:
                continue
            if time.monotonic() > deadline:
                return
            print(name, seed, kept_score(name, seed), flush=True)


@cache
def _kept() -> KeptScores:
    roots = ("benchmarks.planted_record", "diffing.shuffle")
    return KeptScores("planted", source_digest(roots, within=("benchmarks.planted_", "diffing.crosscoder.")))


def main() -> None:
    """Scores what is missing, as the command line asks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no fit after so long")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    with suppress(KeyboardInterrupt):
        score_missing(seconds)


if __name__ == "__main__":
    main()
