"""How do latents, shares and single figures look? Small static drawings; colours come from classes, as for steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tracker.report.svg import Scale, drawing, element, tick_label, ticks
from tracker.report.text import number


@dataclass(frozen=True)
class Dot:
    """One latent in the plane of relative norm and decoder cosine.

    Attributes:
        x: relative norm, 0 only base … 1 only tuned.
        y: decoder cosine, -1 … 1.
        tone: colour class, from its label.
        text: shown on hover.
        target: fragment to go to on click, None for nowhere.
    """

    x: float
    y: float
    tone: str
    text: str
    target: str | None = None


def latent_plane(dots: Sequence[Dot]) -> Markup:
    """Every latent by how much of it lives in the tuned model (x) and whether it still points the same way (y)."""
    width, height = 420, 300
    lowest = min((dot.y for dot in dots if math.isfinite(dot.y)), default=0.0)
    x, y = Scale(0, 1, 40, width - 14), Scale(min(-0.05, lowest), 1.04, height - 44, 14)
    parts: list[Markup] = []
    for value in ticks(min(0.0, lowest), 1.0, 4):
        parts.append(element("line", x1=x.start, x2=x.end, y1=y(value), y2=y(value),
                             class_="grid zero" if value == 0 else "grid"))  # fmt: skip
        parts.append(element("text", tick_label(value), x=x.start - 6, y=y(value) + 4, class_="tick end"))
    for value, text in ((0.0, "only base"), (0.5, "equal"), (1.0, "only tuned")):
        anchor = "" if value == 0 else " end" if value == 1 else " middle"
        tone = ("base", "", "tuned")[int(value * 2)]
        parts.append(element("text", text, x=x(value), y=height - 26, class_=f"tick {tone}{anchor}"))
    parts.append(element("text", "share of the decoder norm that is tuned", x=(x.start + x.end) / 2, y=height - 8,
                         class_="tick middle"))  # fmt: skip
    parts.append(element("text", "cosine of the two decoders", x=x.start + 4, y=10, class_="tick"))
    parts += [_plane_dot(dot, x, y) for dot in dots if math.isfinite(dot.x) and math.isfinite(dot.y)]
    counted = f"{len(dots)} latents"
    return drawing(width, height, *parts, title="Latents by side and direction", description=(
        f"{counted}: to the right those that mostly the tuned model writes, to the left those of the base; "
        "high ones point the same way in both models, low ones have turned."))  # fmt: skip


def _plane_dot(dot: Dot, x: Scale, y: Scale) -> Markup:
    circle = element("circle", element("title", dot.text), cx=x(dot.x), cy=y(dot.y),
                     r=3 if dot.tone == "quiet" else 4, class_=f"point {dot.tone}")  # fmt: skip
    return circle if dot.target is None else element("a", circle, href=f"#{dot.target}")


def scatter(dots: Sequence[Dot]) -> Markup:
    """Points in a plane whose axes have no unit: only who is near whom means something."""
    width, height, edge = 520, 360, 14
    shown = [dot for dot in dots if math.isfinite(dot.x) and math.isfinite(dot.y)]
    xs, ys = [dot.x for dot in shown] or [0.0], [dot.y for dot in shown] or [0.0]
    x = Scale(min(xs), max(max(xs), min(xs) + 1e-9), edge, width - edge)
    y = Scale(min(ys), max(max(ys), min(ys) + 1e-9), height - edge, edge)
    # The rare labels lie on top of the shared cloud.
    ordered = sorted(shown, key=lambda dot: dot.tone not in ("quiet", "dead"))
    return drawing(width, height, *(_plane_dot(dot, x, y) for dot in ordered), title="Latents by what they write",
                   description=f"{len(shown)} latents; near ones write alike to both models.")  # fmt: skip


def histogram(values: Sequence[float], *, bins: int = 40) -> Markup:
    """How many latents have which relative norm, on a square-root scale so that the rare sides stay visible."""
    width, height = 420, 150
    counts = [0] * bins
    for value in values:
        if math.isfinite(value):
            counts[min(bins - 1, max(0, int(value * bins)))] += 1
    x, y = Scale(0, 1, 40, width - 14), Scale(0, math.sqrt(max(counts) or 1), height - 40, 12)
    parts = [element("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="grid zero")]
    wide = (x.end - x.start) / bins
    for index, count in enumerate(counts):
        if count:
            middle = (index + 0.5) / bins
            tone = "base" if middle < 0.1 else "tuned" if middle > 0.9 else "quiet"
            top = y(math.sqrt(count))
            bar = element("title", f"{index / bins:.3f}–{(index + 1) / bins:.3f}: {count}")
            parts.append(element("rect", bar, x=x(index / bins) + 0.5, y=top, width=wide - 1, height=y.start - top,
                                 class_=f"fill {tone}"))  # fmt: skip
    peak = max(counts) or 1
    parts.append(element("text", number(peak), x=x.start - 6, y=16, class_="tick end"))
    for value, text in ((0.0, "only base"), (0.5, "equal"), (1.0, "only tuned")):
        anchor = "" if value == 0 else " end" if value == 1 else " middle"
        parts.append(element("text", text, x=x(value), y=height - 24, class_=f"tick{anchor}"))
    parts.append(element("text", "share of the decoder norm that is tuned", x=(x.start + x.end) / 2, y=height - 6,
                         class_="tick middle"))  # fmt: skip
    return drawing(width, height, *parts, title="Histogram of relative norms", description=(
        f"{len(values)} latents by relative norm; bar heights are roots of counts, the highest {peak}."))  # fmt: skip


def firing_histogram(edges: Sequence[float], counts: Sequence[int]) -> Markup:
    """On how many tokens a latent is how strong, on a logarithmic scale: the strong ones are few."""
    width, height = 240, 64
    most = max(counts, default=0)
    x = Scale(0, edges[-1] if edges and edges[-1] > 0 else 1.0, 2, width - 2)
    y = Scale(0, math.log1p(most) or 1.0, height - 14, 4)
    parts = [element("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="grid zero")]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            top = y(math.log1p(count))
            hint = element("title", f"{number(low)} to {number(high)}: {number(count)} tokens")
            size = {"width": max(0.5, x(high) - x(low) - 1), "height": y.start - top}
            parts.append(element("rect", hint, x=x(low) + 0.5, y=top, **size, class_="fill quiet"))
    for place, text, anchor in ((x.start, "0", ""), (x.end, number(edges[-1] if edges else 0), " end")):
        parts.append(element("text", text, x=place, y=height - 2, class_=f"tick{anchor}"))
    said = f"Tokens by activation; heights are logarithms of counts, the highest {most}."
    return drawing(width, height, *parts, title="How strongly the latent fires", description=said)


def bar(value: float, largest: float, *, tone: str = "quiet", width: int = 120, signed: bool = False) -> Markup:
    """One bar beside a figure in a table; with `signed` it grows to either side of a middle line."""
    height = 10
    size = 0.0 if not largest or not math.isfinite(value) else min(abs(value) / largest, 1.0)
    if not signed:
        parts = [element("rect", x=0, y=1, width=max(size * width, 0.5), height=height - 2, class_=f"fill {tone}")]
    else:
        half = width / 2
        start = half if value >= 0 else half - size * half
        parts = [
            element("rect", x=start, y=1, width=max(size * half, 0.5), height=height - 2, class_=f"fill {tone}"),
            element("line", x1=half, x2=half, y1=0, y2=height, class_="grid zero"),
        ]
    return element("svg", *parts, viewBox=f"0 0 {width} {height}", width=width, height=height, aria_hidden="true")


def interval(value: float, low: float | None, high: float | None, *, largest: float, tone: str = "tuned") -> Markup:
    """A dot with its whisker on a line that starts at zero."""
    width = 180
    x = Scale(0, largest or 1.0, 4, width - 4)
    parts = [element("line", x1=4, x2=width - 4, y1=8, y2=8, class_="grid"),
             element("line", x1=4, x2=4, y1=3, y2=13, class_="grid zero")]  # fmt: skip
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        parts.append(element("line", x1=x(low), x2=x(high), y1=8, y2=8, class_=f"whisker {tone}"))
    parts.append(element("circle", cx=x(value), cy=8, r=4, class_=f"dot {tone}"))
    return element("svg", *parts, viewBox=f"0 0 {width} 16", width=width, height=16, aria_hidden="true")


def composition(parts_by_tone: Sequence[tuple[str, str, int]]) -> Markup:
    """One strip cut in proportion: (tone, label, count) from left to right; empty parts are left out."""
    width, height = 420, 14
    whole = sum(count for _, _, count in parts_by_tone) or 1
    at, parts = 0.0, []
    for tone, label, count in parts_by_tone:
        if count:
            wide = max(count / whole * (width - 8), 2.0)
            parts.append(element("rect", element("title", f"{label}: {count} of {whole}"), x=at, y=0,
                                 width=max(wide - 1, 1), height=height, class_=f"fill {tone}"))  # fmt: skip
            at += wide
    said = ", ".join(f"{count} {label}" for _, label, count in parts_by_tone if count)
    return drawing(min(max(at, 1.0), width), height, *parts, title="Latents by label",
                   description=f"{said} of {whole}.", class_="strip", preserveAspectRatio="none")  # fmt: skip
