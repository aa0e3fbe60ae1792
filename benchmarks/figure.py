"""One measured number beside its target."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A figure that a benchmark reports.

    Attributes:
        name: what was measured.
        value: median over repeats unless the note names another, in `unit`.
        unit: `ratio`, `%`, `MiB`, `tokens/CPU-s`, …
        low: smallest repeat, or the lower end of the interval that the note names.
        high: largest repeat, likewise.
        n: repeats.
        target: what must hold, in words (`<= 2`), or empty where the figure only informs.
        met: whether it held; None where there is no target.
        note: settings a reader needs.
    """

    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    n: int = 1
    target: str = ""
    met: bool | None = None
    note: str = ""

    def __str__(self) -> str:
        spread = "" if self.low is None or self.high is None else f" [{self.low:.3g}, {self.high:.3g}], n={self.n}"
        verdict = "" if self.met is None else ("  ok" if self.met else "  MISSED")
        goal = f"  (target {self.target}){verdict}" if self.target else ""
        note = f"  {self.note}" if self.note else ""
        return f"{self.name}: {self.value:.4g} {self.unit}{spread}{goal}{note}"
