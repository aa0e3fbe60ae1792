"""What was done to the training itself, and from which step to which?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tracker.events import InterventionChanged
from tracker.journal import Journal


@dataclass(frozen=True)
class InterventionSpan:
    """One stretch of a run in which its training was changed on purpose.

    Attributes:
        name: what was done (`preventive steering`).
        start: optimizer steps that were done when it began; it acted from the next one on.
        stop: steps that were done when it ended; None where it was on to the end.
        settings: JSON values: operation, strength, tokens, vectors.
        reason: why it began: `planned`, `asked`, or the alert that asked.
        ended_by: why it ended; empty where it did not.
    """

    name: str
    start: int
    stop: int | None
    settings: Mapping[str, Any]
    reason: str
    ended_by: str = ""

    def __str__(self) -> str:
        if "vectors" not in self.settings:
            return f"{self.name} at step {self.start} ({self.reason})"
        until = "to the end" if self.stop is None else f"to step {self.stop}"
        strength = self.settings.get("strength")
        said = f"strength {strength:g}" if isinstance(strength, int | float) else f"strengths {strength}"
        places = ", ".join(str(one).rsplit(" ", 1)[0] for one in self.settings.get("vectors", ()))
        return f"{self.name} from step {self.start} {until}: {said} on {places} ({self.reason})"


def intervention_spans(run: Journal | Path | str) -> tuple[InterventionSpan, ...]:
    """The interventions of a run that stand, in order; what a resume took back is not among them.

    Args:
        run: its journal, or its directory.

    Raises:
        JournalMissingError: the directory holds no journal.
    """
    if not isinstance(run, Journal):
        with Journal.read(run) as journal:
            return intervention_spans(journal)
    found: list[InterventionSpan] = []
    for event in run.events():
        if not isinstance(event, InterventionChanged):
            continue
        if event.engaged:
            found.append(InterventionSpan(event.name, event.step, None, event.settings, event.reason))
            continue
        place = next((p for p in reversed(range(len(found))) if found[p].name == event.name), None)
        if place is not None and found[place].stop is None:
            found[place] = replace(found[place], stop=event.step, ended_by=event.reason)
    return tuple(found)
