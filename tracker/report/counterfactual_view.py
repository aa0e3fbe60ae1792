"""How is a run shown that was trained again without its strongest rows?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from attribution.counterfactual import Counterfactual, Estimate
from tracker.report.svg import Scale, element, padded
from tracker.report.text import number, round_percent

_WIDTH = 260


def counterfactual_view(found: Counterfactual | None) -> dict[str, Any] | None:
    """Everything that the page's section names; None where nothing was trained again."""
    if found is None:
        return None
    bars = [
        ("before training", "quiet", Estimate(found.start, None, None, ())),
        ("the run itself", "other", Estimate(found.trained, None, None, ())),
        ("trained again on all rows", "other", found.everything),
        (f"without {number(found.n_dropped)} random rows", "base", found.without_random),
        (f"without the {number(found.n_dropped)} flagged rows", "tuned", found.without_flagged),
    ]
    shown = [value for _, _, one in bars for value in (one.value, one.low, one.high, *one.values) if value is not None]
    low, high = padded(shown)
    scale = Scale(low, high, 5, _WIDTH - 5)
    return {
        "found": found,
        "says": counterfactual_words(found),
        "bars": [(name, estimate, _spread(estimate, scale, tone)) for name, tone, estimate in bars],
        "falls": [
            ("leaving out the flagged rows", found.fall, found.undone),
            ("leaving out as many random rows", found.random_fall, found.random_undone),
            ("the flagged rows beyond random ones", found.beyond_random, None),
        ],
    }


def counterfactual_words(found: Counterfactual) -> str:
    """One sentence: what leaving the rows out came to, and whether chance could have done it."""
    n = len(found.beyond_random.values)
    if found.undone is None:
        return f"Training again on all rows did not raise it ({number(found.rise)}), so there is nothing to take back."
    taken = (
        f"Trained again without the {number(found.n_dropped)} strongest rows it rises {_less(found.undone)}; "
        f"without as many random rows {_less(found.random_undone)}"
    )
    ends = found.beyond_random
    if ends.low is None:
        return f"{taken} (one seed: no interval)."
    sure = "more than chance does" if found.confirmed else "which chance could do as well"
    return f"{taken}: {sure} (95 % {number(ends.low)} to {number(ends.high)} in its own units, {n} seeds)."


def _less(share: float | None) -> str:
    return "–" if share is None else f"{round_percent(abs(share))} {'less' if share >= 0 else 'more'}"


def _spread(estimate: Estimate, x: Scale, tone: str) -> Markup:
    """Every seed as a faint dot, their mean with its interval."""
    parts: list[Markup] = [element("line", x1=x.start, x2=x.end, y1=9, y2=9, class_="grid")]
    parts += [element("circle", cx=x(value), cy=9, r=2.5, class_="dot quiet") for value in estimate.values]
    if estimate.low is not None and estimate.high is not None:
        parts.append(_whisker(x, estimate.low, estimate.high, tone))
    parts.append(element("circle", cx=x(estimate.value), cy=9, r=4, class_=f"dot {tone}"))
    return element("svg", *parts, viewBox=f"0 0 {_WIDTH} 18", width=_WIDTH, height=18, aria_hidden="true")


def _whisker(x: Scale, low: float, high: float, tone: str) -> Markup:
    tones: Sequence[str] = ("tuned", "base", "quiet")
    return element("line", x1=x(low), x2=x(high), y1=9, y2=9, class_=f"whisker {tone if tone in tones else 'quiet'}")
