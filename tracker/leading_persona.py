"""Which persona is an alert about, where its signal is made of several or is none?"""

from __future__ import annotations

from collections.abc import Iterable

from tracker.alarms.fusion import SCORE, part_name
from tracker.signals import Alert, DriftSignal

_PROMPT = "/prompt"


def leading_persona(alert: Alert, signals: Iterable[DriftSignal]) -> str:
    """`persona/<trait>/<place>` that an alert is about.

    Of an alert on a persona its own; of one on the misalignment score the persona that made most of it; of one on
    anything else the persona that had moved furthest. Empty where no persona was measured by then, and for what the
    loop itself reports (`train/…`): a loss that diverged is about no persona.

    Args:
        alert: what was raised.
        signals: of the run, in order; later ones than the alert do not count.
    """
    if alert.signal.startswith("persona/"):
        return "/".join(alert.signal.split("/")[:3])
    if alert.signal.startswith("train/"):
        return ""
    latest = {one.name: one.value for one in signals if one.step <= alert.step}
    moved = {name.removesuffix(_PROMPT): value for name, value in latest.items() if _is_prompt(name)}
    if not moved:
        return ""
    made = dict.fromkeys(moved, 0.0)
    if alert.signal == SCORE:
        for name in latest:
            place = "/".join(name.split("/")[:3])
            part = latest.get(part_name(name))
            if part is not None and place in made:
                made[place] += part
    return max(moved, key=lambda place: (made[place], moved[place]))


def _is_prompt(name: str) -> bool:
    return name.startswith("persona/") and name.endswith(_PROMPT)
