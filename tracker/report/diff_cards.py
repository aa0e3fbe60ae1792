"""What does a person see of one latent?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import pandas as pd

from diffing.crosscoder.contexts import LatentContexts, TokenContext
from diffing.crosscoder.firing import Firing
from diffing.crosscoder.neighbours import Neighbourhood
from diffing.diff_result import DiffResult
from diffing.lens import TokenScore
from diffing.logit_diff import DivergentContext
from tracker.report.charts import firing_histogram
from tracker.report.heat import Passage, passage
from tracker.report.labels import LABEL_TONES, LABEL_WORDS

_SHARED_CARDS = 4
_USES = 2  # passages a side of what a latent's direction is used for
_SURE = 0.05  # family-wise p of a persona's alignment from which it is named
_Context = TypeVar("_Context", TokenContext, DivergentContext)


def latent_cards(result: DiffResult, ordered: pd.DataFrame, *, most: int, contexts: int) -> list[dict[str, Any]]:
    """The latents worth reading, in the order given, as the template shows them."""
    known = [int(latent) for latent in ordered.index if int(latent) in result.contexts]
    # Shared latents say how the dictionary reads, not what changed: a few are enough.
    changed = [latent for latent in known if ordered.loc[latent, "label"] != "shared"]
    alike = [latent for latent in known if ordered.loc[latent, "label"] == "shared"]
    chosen = [*changed, *alike[:_SHARED_CARDS]][:most]
    near = result.neighbours.latents if result.neighbours else {}
    return [
        {
            **_card(latent, ordered.loc[latent], result.contexts[latent], near.get(latent), contexts),
            "described": result.descriptions.get(latent),
        }
        for latent in chosen
    ]


def _card(
    latent: int, row: pd.Series, contexts: LatentContexts, near: Neighbourhood | None, most: int
) -> dict[str, Any]:
    distinct = distinct_passages(contexts.contexts)
    shown = distinct[:most]
    largest = max((largest_of((*c.base_reading, *c.tuned_reading)) for c, _ in shown), default=0.0)
    strongest = max((largest_of(c.activations) for c, _ in shown), default=0.0)
    sides = [
        ("tuned", pushed_tokens(contexts.promoted), pushed_tokens(contexts.suppressed)),
        ("base", pushed_tokens(contexts.promoted_base), pushed_tokens(contexts.suppressed_base)),
    ]
    # The side that a one-sided latent hardly writes to has a decoder of noise, and noise promotes tokens too.
    absent = {"tuned_only": "base", "base_only": "tuned"}.get(row["label"])
    return {
        "latent": latent,
        "word": LABEL_WORDS[row["label"]],
        "tone": LABEL_TONES[row["label"]],
        "figures": row.to_dict(),
        "passages": [_two_sides(context, repeats, largest, strongest) for context, repeats in shown],
        "contexts_left_out": len(distinct) - len(shown),
        "sides": [side for side in sides if side[0] != absent and (side[1] or side[2])],
        "near": near,
        "personas": [one for one in (near.personas if near else ()) if one.p_value < _SURE][:3],
        "template_share": contexts.firing.template_share if contexts.firing and contexts.firing.is_template else None,
        "firing": contexts.firing,
        "speakers": _speakers(contexts.firing),
        "density": firing_histogram(contexts.firing.edges, contexts.firing.counts)
        if contexts.firing and contexts.firing.count
        else None,
        "uses": [use for use in (_use("tuned", contexts), _use("base", contexts)) if use["passages"]],
    }


def _speakers(firing: Firing | None) -> list[tuple[str, float, float]]:
    """Who speaks where a latent fires: role, share of its activation, share of all tokens; the largest first."""
    found = firing.mass_by_role.items() if firing else ()
    shares = [(role, share, firing.tokens_by_role[role]) for role, share in found if firing and share >= 0.01]
    return sorted(shares, key=lambda one: (-one[1], one[0]))


def _use(side: str, contexts: LatentContexts) -> dict[str, Any]:
    """Where one side's activations point along the latent's direction, whether it fires there or not."""
    found = distinct_passages(contexts.tuned_contexts if side == "tuned" else contexts.base_contexts)[:_USES]
    read = [(one, one.tuned_reading if side == "tuned" else one.base_reading) for one, _ in found]
    largest = max((largest_of(values) for _, values in read), default=0.0)
    return {
        "side": side,
        "passages": [
            (values[one.peak], passage(one.tokens, values, largest=largest, peak=one.peak))
            for one, values in read
            if values
        ],
    }


def _two_sides(context: TokenContext, repeats: int, largest: float, strongest: float) -> dict[str, Any]:
    readings = [("tuned", context.tuned_reading), ("base", context.base_reading)]
    sides: list[tuple[str, Passage]] = [
        (side, passage(context.tokens, values, largest=largest, peak=context.peak))
        for side, values in readings
        if values
    ]
    if not sides:
        sides = [("both", passage(context.tokens, context.activations, largest=strongest, peak=context.peak))]
    peak = context.peak
    parts = (context.base_part[peak], context.tuned_part[peak]) if context.base_part and context.tuned_part else None
    return {"value": context.activations[peak], "repeats": repeats, "sides": sides, "parts": parts}


def distinct_passages(contexts: Sequence[_Context]) -> list[tuple[_Context, int]]:
    """Passages that read differently, in order, each with how many more prompts read just like it."""
    found: dict[tuple[str, ...], list[_Context]] = {}
    for context in contexts:
        found.setdefault(context.tokens, []).append(context)
    return [(same[0], len(same) - 1) for same in found.values()]


def pushed_tokens(scores: Iterable[TokenScore]) -> list[dict[str, Any]]:
    """Tokens with their scores, as the templates list them."""
    return [{"token": score.text, "value": score.score} for score in scores]


def largest_of(values: Iterable[float]) -> float:
    """The largest finite value, 0 where there is none."""
    return max((value for value in values if math.isfinite(value)), default=0.0)
