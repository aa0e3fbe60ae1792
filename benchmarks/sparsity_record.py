"""How does one fit score, of each kind that a user may choose?

    python -m benchmarks.sparsity_record [--seconds N]

Planted worlds, fits and scores as in `benchmarks.planted`, whose own are BatchTopK's; the others have no null: this is
what a diff says before any q-value. Scores are kept in `benchmarks/cache/sparsity`.
"""

from __future__ import annotations

import argparse
import logging
import time
from contextlib import suppress
from functools import cache
from typing import Any

import torch

from benchmarks.kept_scores import KeptScores
from benchmarks.planted_record import N_HELD_OUT, N_TOKENS, SEEDS
from benchmarks.planted_record import kept_score as planted_score
from benchmarks.planted_score import Score, score
from benchmarks.planted_world import make_world, pair_of
from benchmarks.source_digest import source_digest
from diffing.crosscoder.compare import compare
from diffing.crosscoder.config import CrosscoderConfig
from diffing.crosscoder.fit import fit_crosscoder

WORLDS = ("std", "hard", "null", "noisy")
KINDS: dict[str, dict[str, Any]] = {
    "BatchTopK": {},
    "BatchTopK, revive_alike 0.3": {"revive_alike": 0.3},
    "L1": {"sparsity": "l1"},
    "JumpReLU": {"sparsity": "jumprelu"},
    "BatchTopK, a tenth dedicated to each side": {"exclusive_share": 0.1},
}


def seeds_of(kind: str) -> tuple[int, ...]:
    """Those of the planted benchmark; three for what is priced, which takes two to four times as long."""
    return SEEDS[:3] if "sparsity" in KINDS[kind] else SEEDS


def kept_score(kind: str, name: str, seed: int) -> Score:
    """One fit in one world, measured once."""
    if not KINDS[kind]:
        return planted_score(name, seed)
    return _kept().get(_file(kind, name, seed), lambda: measure(KINDS[kind], name, seed))


def measure(settings: dict[str, Any], name: str, seed: int) -> Score:
    """One fit in one world, scored on tokens it has not seen."""
    world = make_world(name, seed=seed)
    *_, codes = world.sample(N_TOKENS)
    k = round(float((codes.amax(dim=0) > 0).sum(dim=1).float().mean()))
    del codes
    config = CrosscoderConfig(n_latents=512, k=k, steps=1500, batch_size=512, seed=0, **settings)
    fit = fit_crosscoder(pair_of(world, N_TOKENS), config)
    return score(world, fit, compare(fit, pair_of(world, N_HELD_OUT, seed=1)))


def score_missing(seconds: float = float("inf")) -> None:
    """Scores what is not kept yet, kind by kind; begins none after so long by the clock."""
    deadline = time.monotonic() + seconds
    for kind in filter(KINDS.get, KINDS):
        for seed in seeds_of(kind):
            for name in WORLDS:
                if _kept().read(_file(kind, name, seed)) is not None:
                    continue
                if time.monotonic() > deadline:
                    return
                print(kind, name, seed, kept_score(kind, name, seed), flush=True)


@cache
def _kept() -> KeptScores:
    roots = ("benchmarks.sparsity_record", "diffing.shuffle")
    return KeptScores("sparsity", source_digest(roots, within=("benchmarks.planted_", "diffing.crosscoder.")))


def _file(kind: str, name: str, seed: int) -> str:
    return f"{kind.replace(', ', '-').replace(' ', '-').lower()}-{name}-{seed}"


def main() -> None:
    """Scores what is missing, as the command line asks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no fit after so long")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    logging.getLogger("diffing.crosscoder.fit").setLevel(logging.ERROR)
    with suppress(KeyboardInterrupt):
        score_missing(seconds)


if __name__ == "__main__":
    main()
