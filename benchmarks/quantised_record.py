"""How does a crosscoder score that was fitted on a packed store, and what do equal fits differ by anyway?

    python -m benchmarks.quantised_record [--seconds N]

Training is chaotic: a change in the last bit of the data ends in other latents. So that this is not taken for a loss,
the same fit is made on fp32 data with every number moved to a neighbouring float, and from another seed. Scores are
kept in `benchmarks/cache/quantised`.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.kept_scores import KeptScores
from benchmarks.planted_score import Score, score
from benchmarks.planted_world import World, make_world, pair_of
from benchmarks.source_digest import source_digest
from diffing.append import StoreWriter
from diffing.crosscoder.compare import compare
from diffing.crosscoder.config import CrosscoderConfig
from diffing.crosscoder.fit import fit_crosscoder
from diffing.packed_rows import PACKED_DTYPES
from diffing.pair import PairedActivations
from diffing.provenance import Provenance
from diffing.quantise import quantise_store
from diffing.store import ActivationStore
from diffing.store_header import StoreHeader

SEEDS = (101, 102, 103, 104, 105)
WORLDS = ("std", "hard")
EXACT, ROUNDED, RESEEDED = "float32", "rounded", "reseeded"
VARIANTS = (EXACT, *PACKED_DTYPES, ROUNDED, RESEEDED)
N_TOKENS, N_HELD_OUT = 100_000, 50_000
SITE = "resid:0"
MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
_CHUNK_BYTES = 8 << 20


def scores_of(name: str, seed: int) -> dict[str, Score]:
    """The score of every variant in one world; those that are kept are not made again."""
    missing = [variant for variant in VARIANTS if _kept().read(_file(name, seed, variant)) is None]
    fits = _Fits(name, seed) if missing else None
    return {variant: _kept().get(_file(name, seed, variant), lambda v=variant: fits.score(v)) for variant in VARIANTS}


class _Fits:
    """Fits in one world that differ in nothing but the variant."""

    def __init__(self, name: str, seed: int) -> None:
        self.world: World = make_world(name, seed=seed)
        base, tuned, codes = self.world.sample(N_TOKENS)
        self.sides = {"base": base, "tuned": tuned}
        self.k = round(float((codes.amax(dim=0) > 0).sum(dim=1).float().mean()))

    def score(self, variant: str) -> Score:
        """One fit, scored on exact tokens that it has not seen."""
        config = CrosscoderConfig(n_latents=512, k=self.k, steps=1000, batch_size=512, seed=int(variant == RESEEDED))
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            stores = [self._store(Path(folder), side, variant) for side in self.sides]
            fit = fit_crosscoder(PairedActivations.from_stores(stores, SITE), config)
        return score(self.world, fit, compare(fit, pair_of(self.world, N_HELD_OUT, seed=1)))

    def _store(self, folder: Path, side: str, variant: str) -> ActivationStore:
        x = self.sides[side]
        made = write_store(folder / side, neighbours_of(x, seed=0) if variant == ROUNDED else x)
        return quantise_store(made, folder / f"{side}-{variant}", variant) if variant in PACKED_DTYPES else made


def neighbours_of(x: Tensor, *, seed: int) -> Tensor:
    """Every number moved to the next float above or below it, by chance."""
    up = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return torch.nextafter(x, torch.where(up, torch.inf, -torch.inf))


def loss_of_packing(name: str, seed: int, dtype: str) -> float:
    """Share of the energy that a packed store of a world loses, the worse of its sides."""
    base, tuned, _ = make_world(name, seed=seed).sample(N_TOKENS // 10)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        made = [write_store(Path(folder) / str(side), x) for side, x in enumerate((base, tuned))]
        return max(quantise_store(store, f"{store.path}-{dtype}", dtype).loss[SITE] for store in made)


def write_store(path: Path, x: Tensor) -> ActivationStore:
    """A finished fp32 store of one site."""
    header = StoreHeader(
        sites=(SITE,),
        d_model=(x.shape[1],),
        dtype="float32",
        n_rows=len(x),
        chunk_rows=min(len(x), _CHUNK_BYTES // (4 * x.shape[1])),
        token_digest="",
        max_norm_ratio=None,
        provenance=Provenance(),
    )
    with StoreWriter(path, header, {"prompts": [""], "words": {}}) as writer:
        writer.append([x], np.zeros((len(x), 4), np.int32), x.norm(dim=1)[:, None])
        return writer.finish()


def score_missing(seconds: float = float("inf")) -> None:
    """Scores what is not kept yet, seed by seed; begins no world after so long by the clock."""
    deadline = time.monotonic() + seconds
    for seed in SEEDS:
        for name in WORLDS:
            if time.monotonic() > deadline:
                return
            for variant, found in scores_of(name, seed).items():
                print(name, seed, variant, f"F1 {found.macro_f1:.4f} FVE {found.variance_explained:.5f}", flush=True)


@cache
def _kept() -> KeptScores:
    roots = ("benchmarks.quantised_record", "diffing.shuffle", "diffing.packed_rows", "diffing.chunked_rows")
    return KeptScores("quantised", source_digest(roots, within=("benchmarks.planted_", "diffing.crosscoder.")))


def _file(name: str, seed: int, variant: str) -> str:
    return f"{name}-{seed}-{variant}"


def main() -> None:
    """Scores what is missing, as the command line asks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no world after so long")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    logging.getLogger("diffing.crosscoder.fit").setLevel(logging.ERROR)
    with suppress(KeyboardInterrupt):
        score_missing(seconds)


if __name__ == "__main__":
    main()
