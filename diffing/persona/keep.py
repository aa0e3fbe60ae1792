"""Which rollouts show what they were asked to show?

Rollouts are kept or dropped in pairs: the answers to one question under one pair of system prompts, draw by draw. So
both sides of the difference of means hold the same questions, and what a question is about cancels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from jaxtyping import Bool

from diffing.judging.judge import Exchange, Judge, Score
from diffing.persona.contrast import TRAIT
from diffing.persona.elicit import Ask
from diffing.persona.rollouts import Rollout

_AT_ONCE = 256


@dataclass(frozen=True)
class KeepRule:
    """When a pair is kept.

    Attributes:
        trait_least: the trait answer's trait score must reach this, 0..100.
        plain_most: the plain answer's trait score must stay below this.
        coherent_least: both answers' coherence must reach this, where a judge of coherence is given.

    Source: Chen et al. 2025, whose bounds are all 50.
    """

    trait_least: float = 50.0
    plain_most: float = 50.0
    coherent_least: float = 50.0


@dataclass(frozen=True)
class Kept:
    """Which pairs were kept, and why others were not.

    Attributes:
        pairs: pairs in all, draws counted.
        kept: pairs kept.
        judge: name of the judge of the trait; empty where none was asked.
        coherence_judge: name of the judge of coherence; empty where none was asked.
        reasons: for each reason the pairs it holds for; a pair may have several.
        mean_trait: mean trait score of the trait answers that were scored; None without a judge.
        mean_plain: mean trait score of the plain answers that were scored.
    """

    pairs: int
    kept: int
    judge: str = ""
    coherence_judge: str = ""
    reasons: Mapping[str, int] = field(default_factory=dict)
    mean_trait: float | None = None
    mean_plain: float | None = None

    @property
    def sentence(self) -> str:
        """What a reader needs to know."""
        if not self.judge:
            dropped = f"; {self.pairs - self.kept} were empty" if self.kept < self.pairs else ""
            return f"Unfiltered: no judge read the answers, all {self.kept} pairs are used{dropped}."
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(self.reasons.items(), key=lambda x: -x[1]))
        return f"{self.kept} of {self.pairs} pairs kept by {self.judge}" + (f" (dropped: {why})." if why else ".")


def keep_pairs(
    rollouts: Iterable[Rollout],
    asks: Sequence[Ask],
    *,
    samples: int,
    judge: Judge | None = None,
    coherence: Judge | None = None,
    rule: KeepRule | None = None,
    progress: bool = False,
) -> tuple[Bool[np.ndarray, "pair sample"], Kept]:
    """Marks the pairs that are kept.

    Args:
        rollouts: answers, in any order; read once.
        asks: what was asked, `asks[2 * pair + side]`.
        samples: draws of each ask.
        judge: scores the trait from 0 to 100; None keeps every pair with two answers.
        coherence: scores coherence from 0 to 100; None drops nothing for it.
        rule: the bounds.
        progress: shows the judges' bars.

    Returns:
        The marks `[pair, sample]`, and the counts.

    Cost: one judgement an answer for each judge. Memory: a few bytes an answer.
    """
    rule = rule or KeepRule()
    shape = (len(asks) // 2, samples)
    why: dict[str, np.ndarray] = {}
    missing = np.ones((2, *shape), bool)
    scores = np.full((2, *shape), np.nan)
    stream = iter(rollouts)
    while chunk := list(islice(stream, _AT_ONCE)):
        items = [Exchange(asks[rollout.ask].question, rollout.text.strip()) for rollout in chunk]
        trait_scores = judge.judge(items, progress=progress) if judge else [None] * len(chunk)
        coherent_scores = coherence.judge(items, progress=progress) if coherence else [None] * len(chunk)
        for rollout, trait, coherent in zip(chunk, trait_scores, coherent_scores, strict=True):
            pair, side = divmod(rollout.ask, 2)
            missing[side, pair, rollout.sample] = False
            if trait is not None and trait.value is not None:
                scores[side, pair, rollout.sample] = trait.value
            for reason in _faults(rollout, side, trait, coherent, rule):
                why.setdefault(reason, np.zeros(shape, bool))[pair, rollout.sample] = True
    if missing.any():
        why["not drawn"] = np.asarray(missing.any(axis=0))
    kept = np.ones(shape, bool)
    for marks in why.values():
        kept &= ~marks
    counts = Counter({reason: int(marks.sum()) for reason, marks in why.items()})
    return kept, Kept(
        pairs=kept.size,
        kept=int(kept.sum()),
        judge=judge.name if judge else "",
        coherence_judge=coherence.name if coherence else "",
        reasons=dict(counts),
        mean_trait=_mean(scores[TRAIT]),
        mean_plain=_mean(scores[1 - TRAIT]),
    )


def _faults(rollout: Rollout, side: int, trait: Score | None, coherent: Score | None, rule: KeepRule) -> Iterator[str]:
    if not len(rollout.token_ids) or not rollout.text.strip():
        yield "empty"
    if trait is not None:
        if trait.value is None:
            yield f"without a trait score ({trait.reason})"
        elif side == TRAIT and trait.value < rule.trait_least:
            yield "trait not shown where asked for"
        elif side != TRAIT and trait.value >= rule.plain_most:
            yield "trait shown where not asked for"
    if coherent is not None:
        if coherent.value is None:
            yield f"without a coherence score ({coherent.reason})"
        elif coherent.value < rule.coherent_least:
            yield "incoherent"


def _mean(scores: np.ndarray) -> float | None:
    known = scores[~np.isnan(scores)]
    return float(known.mean()) if known.size else None
