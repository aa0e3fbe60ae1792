"""Of what is the misalignment score made at a step, and how far had each part got?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tracker.alarms.fusion import SCORE, part_name
from tracker.signals import DriftSignal


@dataclass(frozen=True)
class PartAt:
    """One part of the score, or one of the kinds of evidence that it is made of.

    Attributes:
        signal: the measured signal; of a kind its name (`activations`, `answers`).
        score: what it adds, in the score's unit; of a kind, what that kind says as a whole.
        before: the same before the alert's stretch began; None where it was not known then.
        value: the signal's own measurement; None for a kind.
        low: lower end of its 95 % interval, None where it has none.
        high: upper end.
        unit: of value; of a kind the score's.
    """

    signal: str
    score: float
    before: float | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""

    @property
    def is_kind(self) -> bool:
        """Whether it is a whole kind of evidence."""
        return self.value is None


def score_parts(signals: Iterable[DriftSignal], *, step: int, since: int) -> tuple[PartAt, ...]:
    """Kinds of evidence first, then the parts, largest first; empty where there is no score at that step.

    Args:
        signals: of a run, in order.
        step: of the alert.
        since: first step of the alert's stretch.
    """
    now: dict[str, DriftSignal] = {}
    before: dict[str, float] = {}
    for one in signals:
        if one.step <= step:
            now[one.name] = one
        if one.step < since:
            before[one.name] = one.value
    if SCORE not in now or now[SCORE].step != step:
        return ()
    measured_as = {part_name(name): now[name] for name in now}
    found = []
    for name, one in now.items():
        if not name.startswith(f"{SCORE}/") or one.step != step:
            continue
        part = name.removeprefix(f"{SCORE}/")
        measured = measured_as.get(name) if "." in part else None
        if measured is None:
            found.append(PartAt(part, one.value, before.get(name), unit=one.unit))
        else:
            found.append(
                PartAt(measured.name, one.value, before.get(name), measured.value, measured.low, measured.high,
                       measured.unit)
            )  # fmt: skip
    return tuple(sorted(found, key=lambda part: (not part.is_kind, -part.score)))
