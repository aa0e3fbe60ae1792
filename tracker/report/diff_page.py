"""What does a person see of a diff? One page from one `DiffResult`, and its JSON twin beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from diffing.crosscoder.contexts import LatentContexts
from diffing.diff_result import DiffResult
from diffing.durable import write_atomic
from diffing.lens import GroupDifference, TokenScore
from diffing.logit_diff import Divergence, DivergentContext
from tracker.report.charts import Dot, bar, composition, histogram, interval, latent_plane
from tracker.report.diff_cards import distinct_passages, largest_of, latent_cards, pushed_tokens
from tracker.report.diff_sections import section_views
from tracker.report.diff_words import diff_headline, diff_story
from tracker.report.heat import passage
from tracker.report.labels import LABEL_TONES, LABEL_WORDS
from tracker.report.page import LIMIT_BYTES, render_page
from tracker.report.text import number

PAGE_NAME = "diff.html"


@dataclass(frozen=True)
class Budget:
    """How much of a result one page shows; the JSON twin always holds everything.

    Attributes:
        rows: latents in the table.
        cards: latents with a card of their own.
        contexts: passages on each card.
        dots: points in the plane.
        passages: passages of high divergence.
    """

    rows: int = 400
    cards: int = 24
    contexts: int = 3
    dots: int = 900
    passages: int = 12


_BUDGETS = (Budget(), Budget(200, 16, 2, 500, 8), Budget(100, 8, 2, 250, 5), Budget(40, 4, 1, 100, 3))


def write_diff_report(result: DiffResult, out_dir: Path | str) -> Path:
    """Writes `diff.html` and its twin `diff.json` into a folder.

    Args:
        result: what was measured.
        out_dir: made where missing; older pages there are replaced.

    Returns:
        The page's path. The same result gives the same bytes.
    """
    result.save(out_dir)
    return write_atomic(Path(out_dir) / PAGE_NAME, render_diff_page(result))


def render_diff_page(result: DiffResult) -> str:
    """The page as text, under one megabyte: where a result is too large, the page shows less of it and says so."""
    html = ""
    for budget in _BUDGETS:
        html = render_page(
            "diff.html",
            title=f"{result.base_name} → {result.tuned_name}: what changed",
            data=_island(result),
            **diff_view(result, budget),
        )
        if len(html.encode()) < LIMIT_BYTES:
            break
    return html


def diff_view(result: DiffResult, budget: Budget) -> dict[str, Any]:
    """Everything the template names."""
    ordered = by_interest(result.latents)
    counts = result.counts()
    cards = latent_cards(result, ordered, most=budget.cards, contexts=budget.contexts)
    carded = {card["latent"] for card in cards}
    rows = ordered.head(budget.rows)
    return {
        "result": result,
        "headline": diff_headline(result),
        "story": diff_story(result),
        "figures": _figures(result),
        "strip": composition([(LABEL_TONES[label], LABEL_WORDS[label], counts[label]) for label in LABEL_TONES]),
        "counts": [(LABEL_TONES[label], LABEL_WORDS[label], counts[label]) for label in LABEL_TONES],
        "passages": _divergent_passages(result.divergence, budget),
        "promoted": pushed_tokens(result.divergence.promoted if result.divergence else ()),
        "suppressed": pushed_tokens(result.divergence.suppressed if result.divergence else ()),
        "by_role": _divergence_by_role(result.divergence),
        "mean": _mean(result),
        "plane": latent_plane(_dots(ordered, carded, budget)),
        "histogram": histogram([float(value) for value in result.latents["relative_norm"]]),
        "rows": [_row(int(latent), row, result, carded) for latent, row in rows.iterrows()],
        "rows_left_out": len(ordered) - len(rows),
        "labels": [(label, LABEL_WORDS[label], LABEL_TONES[label]) for label in LABEL_TONES if counts[label]],
        "calibrated": bool(result.latents["q_value"].notna().any()) if "q_value" in result.latents else False,
        "cards": cards,
        "cards_left_out": len(result.contexts) - len(cards),
        "provenance": _provenance(result),
        **section_views(result),
    }


def _island(result: DiffResult) -> dict[str, Any]:
    return {
        "base": result.base_name,
        "tuned": result.tuned_name,
        "site": result.site,
        "labels": result.counts(),
        "divergence": None if result.divergence is None else result.divergence.mean,
        "twin": "diff.json",
    }


def by_interest(latents: pd.DataFrame) -> pd.DataFrame:
    """Exclusive latents first, then rotated, then shared; within a label the often firing ones first."""
    rank = latents["label"].map({label: place for place, label in enumerate(LABEL_TONES)})
    order = latents.assign(_rank=rank, _latent=latents.index).sort_values(
        ["_rank", "firing_rate", "_latent"], ascending=[True, False, True]
    )
    return order.drop(columns=["_rank", "_latent"])


def _figures(result: DiffResult) -> dict[str, Any]:
    explained = result.fit.variance_explained
    sides = [("base", explained[0]), ("tuned", explained[-1])] if len(explained) > 1 else []
    spread = result.divergence
    return {
        "explained": [(side, value, bar(value, 1.0, tone=side)) for side, value in sides],
        "divergence": spread
        and interval(spread.mean, spread.low, spread.high, largest=max(spread.mean, _real(spread.high)) * 1.25),
    }


def _divergent_passages(divergence: Divergence | None, budget: Budget) -> list[dict[str, Any]]:
    grouped = distinct_passages(divergence.contexts if divergence else ())[: budget.passages]
    largest = max((largest_of(context.divergence) for context, _ in grouped), default=0.0)
    return [_divergent_passage(context, repeats, largest) for context, repeats in grouped]


def _divergent_passage(context: DivergentContext, repeats: int, largest: float) -> dict[str, Any]:
    return {
        "repeats": repeats,
        "value": context.divergence[context.peak],
        "passage": passage(context.tokens, context.divergence, largest=largest, peak=context.peak),
        "base_next": context.base_next[:3],
        "tuned_next": context.tuned_next[:3],
    }


def _divergence_by_role(divergence: Divergence | None) -> list[dict[str, Any]]:
    roles = divergence.by_role if divergence else ()
    largest = max((role.mean for role in roles), default=0.0)
    return [
        {"name": role.role, "value": role.mean, "n": role.n_tokens, "bar": bar(role.mean, largest, tone="tuned")}
        for role in roles
    ]


def _mean(result: DiffResult) -> dict[str, Any] | None:
    mean = result.mean_difference
    if mean is None:
        return None
    groups = [*mean.by_role, *mean.by_position]
    largest = max((_real(group.relative_norm) for group in groups), default=0.0)
    return {
        "all": mean,
        "by_role": [_group(group, largest) for group in mean.by_role],
        "by_position": [_group(group, largest) for group in mean.by_position],
        "promoted": pushed_tokens(mean.promoted),
        "suppressed": pushed_tokens(mean.suppressed),
        "is_noise": mean.norm <= 2 * mean.noise_norm,
    }


def _group(group: GroupDifference, largest: float) -> dict[str, Any]:
    # Below twice the sampling noise a difference is drawn grey: it may be nothing.
    tone = "tuned" if group.norm > 2 * group.noise_norm else "quiet"
    return {"group": group, "bar": bar(group.relative_norm, largest, tone=tone)}


def _dots(ordered: pd.DataFrame, carded: set[int], budget: Budget) -> list[Dot]:
    alive = ordered[ordered["label"] != "dead"].head(budget.dots)
    # Drawn in reverse, so that the rare labels lie on top of the shared cloud.
    return [
        Dot(
            x=float(row["relative_norm"]),
            y=float(row["decoder_cosine"]),
            tone=LABEL_TONES[row["label"]],
            text=f"latent {latent}, {LABEL_WORDS[row['label']]}: norm {number(row['relative_norm'])}, "
            f"cosine {number(row['decoder_cosine'])}, fires on {number(100 * row['firing_rate'], 2)} % of tokens",
            target=f"latent-{latent}" if latent in carded else None,
        )
        for latent, row in reversed(list(alive.iterrows()))
    ]


def _row(latent: int, row: pd.Series, result: DiffResult, carded: set[int]) -> dict[str, Any]:
    known = result.contexts.get(latent)
    return {
        "latent": latent,
        "label": row["label"],
        "word": LABEL_WORDS[row["label"]],
        "tone": LABEL_TONES[row["label"]],
        "figures": row.to_dict(),
        "tokens": [score.text for score in _promoted_on(known, row["label"])[:4]],
        "carded": latent in carded,
    }


def _promoted_on(contexts: LatentContexts | None, label: str) -> Sequence[TokenScore]:
    if contexts is None:
        return ()
    return contexts.promoted_base if label == "base_only" and contexts.promoted_base else contexts.promoted


def _provenance(result: DiffResult) -> list[tuple[str, str]]:
    made = result.provenance
    rows = [(f"{side} fingerprint", value) for side, value in sorted(made.models.items())]
    rows += [("prompt digest", made.prompts or "none"), ("site", ", ".join(made.sites) or result.site or "none")]
    rows += [("seed", "none" if made.seed is None else str(made.seed)), ("made", made.created_at)]
    # As JSON, whose order of keys does not depend on whether the result was made just now or read back.
    rows += [("settings", json.dumps(made.config, sort_keys=True, default=str))]
    rows += [("versions", ", ".join(f"{name} {value}" for name, value in sorted(made.versions.items())))]
    return rows


def _real(value: float) -> float:
    return value if math.isfinite(value) else 0.0
