"""Which direction leads from plain rollouts to trait rollouts, at every layer and in every pooling, in one pass?

The kept rollouts come from disk in chunks, go through the model once, and leave only sums; the held-out ones follow
and leave only numbers. Memory does not grow with the number of rollouts that are fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Bool

from diffing.checkpoint import LoadedCheckpoint
from diffing.errors import PersonaError
from diffing.persona.contrast import ContrastFit, ContrastSums, HeldOutScores
from diffing.persona.extract import fitted_vector
from diffing.persona.keep import Kept
from diffing.persona.pooling import POOLINGS, CountedProgress, Progress, answered_rows
from diffing.persona.rollouts import Rollout, Rollouts
from diffing.persona.split import label_swaps
from diffing.persona.traits import digest_of
from diffing.persona.vector import PersonaVector
from diffing.provenance import Provenance
from diffing.site import Site, resolve_site

_MIN_PAIRS = 8
_MIN_HELD_OUT = 2
_ROWS_AT_ONCE = 256
# Activations of one batch at all sites; more would not make the pass faster.
_HELD_VALUES = 1 << 27


@dataclass(frozen=True, eq=False)
class KeptRollouts:
    """Rollouts with the pairs of them that count.

    Attributes:
        rollouts: the answers.
        pairs: marks `[pair, sample]`.
        counts: how many were kept, and why not the others.
    """

    rollouts: Rollouts
    pairs: Bool[np.ndarray, "pair sample"]
    counts: Kept

    def __iter__(self) -> Iterator[Rollout]:
        """The rollouts of kept pairs, from disk."""
        return (rollout for rollout in self.rollouts if self.pairs[rollout.ask // 2, rollout.sample])

    def __len__(self) -> int:
        return 2 * int(self.pairs.sum())

    @property
    def n_questions(self) -> int:
        """Distinct questions with a kept pair."""
        kept = np.flatnonzero(self.pairs.any(axis=1))
        return len({self.rollouts.asks[2 * pair].question for pair in kept.tolist()})


def fit_rollouts(
    loaded: LoadedCheckpoint,
    fitted: KeptRollouts,
    held_out: KeptRollouts,
    *,
    trait: str,
    sites: Sequence[Site | str],
    poolings: Sequence[str] = POOLINGS,
    seed: int = 0,
    batch_tokens: int = 8192,
    config: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[PersonaVector]:
    """One vector for every pooling and site, poolings one after the other, sites in the order given.

    Left out is a site at which a pooling of the prompt reads the same on both sides, such as the token before the
    answer in a first block whose attention window does not reach the system prompt.

    Args:
        loaded: the model that wrote the rollouts.
        fitted: rollouts on extraction questions.
        held_out: rollouts on other questions, to measure separation on.
        trait: name for the vectors.
        sites: where to fit.
        poolings: which of `POOLINGS`; the first must have a direction at every site.
        seed: fixes the nulls.
        batch_tokens: most tokens a forward pass; fewer where many sites of a wide model are read at once.
        config: what the vectors' provenance records besides.
        progress: called with rows read and rows in all.

    Raises:
        PersonaError: too few pairs were kept, both sides' answers read the same at a site, or activations are not
            finite.

    Cost: one forward pass over the kept rollouts, stopped after the deepest site. Memory: one batch, and for each
    site and pooling 102 float64 vectors and 201 numbers a held-out answer.
    """
    _check_counts(trait, fitted, held_out)
    resolved = [resolve_site(loaded.model, site) for site in sites]
    names = [str(site.site) for site in resolved]
    width = max((site.d_model or 1) for site in resolved)
    batch_tokens = max(1, min(batch_tokens, _HELD_VALUES // (width * len(names))))
    counted = CountedProgress(progress, total=len(fitted) + len(held_out))

    def feed(kept: KeptRollouts, updates: Sequence[Callable[..., None]]) -> None:
        _feed(loaded, kept, updates, names, poolings, seed=seed, batch_tokens=batch_tokens, counted=counted)

    every = [(pooling, site) for pooling in poolings for site in resolved]
    sums = [ContrastSums() for _ in every]
    feed(fitted, [part.update for part in sums])
    fits = [_fit(part, needed=pooling == poolings[0]) for part, (pooling, _) in zip(sums, every, strict=True)]
    scores = [None if fit is None else HeldOutScores(fit, seed=seed) for fit in fits]
    feed(held_out, [_unread if part is None else part.update for part in scores])
    provenance = {pooling: _provenance(loaded, fitted, held_out, names, pooling, seed, config) for pooling in poolings}
    return [
        fitted_vector(
            trait,
            site,
            fit,
            score,
            pooling=pooling,
            n_questions=held_out.n_questions,
            provenance=provenance[pooling],
        )
        for (pooling, site), fit, score in zip(every, fits, scores, strict=True)
        if fit is not None and score is not None
    ]


def _fit(sums: ContrastSums, *, needed: bool) -> ContrastFit | None:
    """The direction; None where both sides read the same and nobody depends on it."""
    try:
        return sums.fit()
    except PersonaError:
        if needed:
            raise
        return None


def _unread(*_: object) -> None:
    """Takes rows at a site and pooling that have no direction."""


def _feed(
    loaded: LoadedCheckpoint,
    kept: KeptRollouts,
    updates: Sequence[Callable[..., None]],
    sites: Sequence[str],
    poolings: Sequence[str],
    *,
    seed: int,
    batch_tokens: int,
    counted: CountedProgress,
) -> None:
    stream, asks = iter(kept), kept.rollouts.asks
    while chunk := list(islice(stream, _ROWS_AT_ONCE)):
        for side in (0, 1):
            some = [rollout for rollout in chunk if asks[rollout.ask].side == side]
            if not some:
                continue
            rows = kept.rollouts.rows(some)
            for batch in answered_rows(loaded, rows, sites, poolings=poolings, batch_tokens=batch_tokens):
                index = batch[0].index
                swaps = label_swaps(seed, [asks[some[row].ask].question for row in index])
                values = [value for pooled in batch for value in pooled.values]
                for update, value in zip(updates, values, strict=True):
                    update(side, value, swaps)
                counted.add(len(index))


def _provenance(
    loaded: LoadedCheckpoint,
    fitted: KeptRollouts,
    held_out: KeptRollouts,
    sites: Sequence[str],
    pooling: str,
    seed: int,
    config: dict[str, Any] | None,
) -> Provenance:
    settings = fitted.rollouts.settings
    return Provenance(
        models={"model": loaded.fingerprint},
        prompts=digest_of([fitted.rollouts.digest, held_out.rollouts.digest]),
        sites=tuple(sites),
        seed=seed,
        config={
            "pooling": pooling,
            "elicited": True,
            "temperature": settings.temperature,
            "max_new_tokens": settings.max_new_tokens,
            "rollouts": settings.samples,
            "pairs_kept": [fitted.counts.kept, held_out.counts.kept],
            "pairs": [fitted.counts.pairs, held_out.counts.pairs],
            "judge": fitted.counts.judge,
            "coherence_judge": fitted.counts.coherence_judge,
            "questions": fitted.n_questions + held_out.n_questions,
            **(config or {}),
        },
    )


def _check_counts(trait: str, fitted: KeptRollouts, held_out: KeptRollouts) -> None:
    for kept, least, what in ((fitted, _MIN_PAIRS, "extraction"), (held_out, _MIN_HELD_OUT, "held-out")):
        if kept.counts.kept < least:
            raise PersonaError(
                f"Trait {trait!r}: expected at least {least} pairs of answers to {what} questions, got "
                f"{kept.counts.sentence} Draw more (--rollouts), or look whether the model shows the trait when told "
                "to and the judge sees it."
            )
