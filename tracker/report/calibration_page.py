"""What does a bank of benign runs vouch for? One page: how far each run went, the thresholds, and what is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from diffing.durable import write_atomic
from tracker.alarms.bank import NullBank
from tracker.alarms.calibration import Calibration, SignalCalibration
from tracker.alarms.fusion import LEAST_EFFECT, SCORE
from tracker.alarms.levels import conformal_p, nulls_needed
from tracker.report.charts import bar
from tracker.report.names import signal_title, unit_words
from tracker.report.page import finite, render_page
from tracker.report.svg import Scale, drawing, element
from tracker.report.text import number, percent, visible

PAGE_NAME, TWIN_NAME = "calibration.html", "calibration.json"
# False positives that a public monitor of seven traits reports on its own data: a mark to aim at, not a measurement.
PUBLISHED_FALSE_POSITIVES = 0.029
_LEVELS = (0.1, 0.05, PUBLISHED_FALSE_POSITIVES, 0.01)


def write_calibration_page(made: Calibration, bank: NullBank, folder: Path | str) -> Path:
    """Writes `calibration.html` and its twin `calibration.json` into the bank's folder.

    Args:
        made: the thresholds.
        bank: whose they are.
        folder: of the bank.

    Returns:
        The page's path.
    """
    folder = Path(folder)
    twin = {**made.to_json(), "runs": _run_records(made, bank), "levels": _levels(made), "bank": dict(bank.signature)}
    write_atomic(folder / TWIN_NAME, json.dumps(finite(twin), indent=1, sort_keys=True) + "\n")
    return write_atomic(folder / PAGE_NAME, render_calibration_page(made, bank, name=folder.name))


def render_calibration_page(made: Calibration, bank: NullBank, *, name: str) -> str:
    """The page as text; the same bank gives the same bytes."""
    first = made.signals[0]
    return render_page(
        "calibration.html",
        title=f"What the bank {name} vouches for",
        data={"bank": name, "n": made.n, "level": made.level, "twin": TWIN_NAME},
        made=made,
        name=name,
        headline=calibration_headline(made),
        first=first,
        first_title=signal_title(first.pattern),
        between=_between(made),
        signals=[
            {"one": one, "title": signal_title(one.pattern), "unit": unit_words(one.unit)} for one in made.signals
        ],
        wide=_strips(made, 1040, 270, class_="wide-only"),
        narrow=_strips(made, 380, 0, class_="narrow-only"),
        levels=_levels(made),
        parts_list=_parts(made),
        runs=_runs(made, bank),
        caveats=_caveats(made),
        provenance=_provenance(made, bank),
    )


def calibration_headline(made: Calibration) -> str:
    """One sentence: what may be stated of a new run."""
    if made.vouched:
        return (
            f"A benign run like these {number(made.n)} raises a false alarm with a probability of at most "
            f"{percent(made.level, _digits(made.level))}."
        )
    missing = made.needed - made.n
    return (
        f"{number(made.n)} benign runs are too few for {percent(made.level, _digits(made.level))}: "
        f"{number(missing)} more {'is' if missing == 1 else 'are'} needed."
    )


def _digits(level: float) -> int:
    return 0 if math.isclose(100 * level, round(100 * level)) else 1


def _between(made: Calibration) -> tuple[str, str]:
    """Benign runs and their steps between two false alarms, at the level asked for or the best there is."""
    level = made.level if made.vouched else made.best_level
    return number(math.floor(1 / level + 1e-9)), number(math.floor(made.horizon / level + 1e-9))


def _levels(made: Calibration) -> list[dict[str, Any]]:
    wanted = sorted({*_LEVELS, made.level}, reverse=True)
    return [
        {
            "level": level,
            "needed": nulls_needed(level),
            "missing": max(0, nulls_needed(level) - made.n),
            "asked": level == made.level,
            "published": level == PUBLISHED_FALSE_POSITIVES,
        }
        for level in wanted
    ]


def _parts(made: Calibration) -> list[dict[str, Any]]:
    ordered = sorted(made.parts, key=lambda part: (part.group, -part.weight))
    return [
        {"part": part, "title": signal_title(part.signal), "bar": bar(part.weight, 1.0, tone="tuned", width=90)}
        for part in ordered
    ]


def _run_records(made: Calibration, bank: NullBank) -> list[dict[str, Any]]:
    return [
        {
            "id": run.id,
            "source": run.source,
            "steps": run.last_step,
            "settings": dict(run.settings),
            "reached": {one.pattern: one.maxima[place] for one in made.signals},
        }
        for place, run in enumerate(bank.runs)
    ]


def _runs(made: Calibration, bank: NullBank) -> list[dict[str, Any]]:
    """The runs, the furthest by the first signal on top, with the p-value each would have beside the others."""
    reached = made.signals[0].maxima
    largest = max(map(abs, reached), default=1.0)
    found = []
    for place in sorted(range(len(reached)), key=lambda place: -reached[place]):
        run, others = bank.runs[place], [*reached[:place], *reached[place + 1 :]]
        found.append(
            {
                "run": run,
                "reached": reached[place],
                "bar": bar(reached[place], largest, tone="quiet", width=90, signed=True),
                "p": conformal_p(reached[place], others),
                "settings": ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in run.settings.items()),
            }
        )
    return found


def _strips(made: Calibration, width: int, left: int, *, class_: str) -> Markup:
    """Every signal on a line of its own: one dot a benign run, and the threshold."""
    line, top = (34, 10) if left else (52, 10)
    start = left + 8
    height = top + line * len(made.signals) + 22
    parts: list[Markup] = []
    for at, one in enumerate(made.signals):
        y = top + line * at + line - 14
        words = visible(signal_title(one.pattern), limit=44)
        where = {"x": left - 8, "y": y + 4, "class_": "tick end"} if left else {"x": 4, "y": y - 16, "class_": "tick"}
        parts.append(element("text", words, **where))
        parts += _strip(one, y, start, width - 66)
    parts.append(element("text", "each line in its own unit; every dot is what one benign run reached at most",
                         x=start, y=height - 4, class_="tick"))  # fmt: skip
    said = "; ".join(f"{signal_title(one.pattern)}: largest {number(one.largest)}" for one in made.signals)
    return drawing(width, height, *parts, title="How far benign runs went", description=said, class_=class_)


def _strip(one: SignalCalibration, y: float, start: float, end: float) -> list[Markup]:
    known = [value for value in one.maxima if math.isfinite(value)]
    ends = [*known, *([] if one.threshold is None else [one.threshold])] or [0.0]
    low, high = min(0.0, *ends), max(0.0, *ends)
    x = Scale(low, high if high > low else low + 1.0, start, end)
    drawn = [
        element("line", x1=start, x2=end, y1=y, y2=y, class_="grid"),
        element("line", x1=x(0.0), x2=x(0.0), y1=y - 6, y2=y + 6, class_="grid zero"),
    ]
    drawn += [element("circle", element("title", number(value)), cx=x(value), cy=y, r=3.5, class_="point quiet")
              for value in known]  # fmt: skip
    if one.threshold is not None:
        at = x(one.threshold)
        drawn.append(element("line", x1=at, x2=at, y1=y - 9, y2=y + 9, class_="mark alarm"))
        drawn.append(element("text", number(one.threshold), x=at + 7, y=y + 4, class_="label alarm"))
    return drawn


def _caveats(made: Calibration) -> list[str]:
    said = list(made.notes)
    said.append(
        "It holds for a benign run that could as well have been one of these: same model, probes and schedule, and a "
        "kind of rows that the bank knows. A kind that is missing here may raise alarms at any rate."
    )
    score = next((one for one in made.signals if one.pattern == SCORE), None)
    if score is not None and score.threshold is not None and score.threshold > score.largest:
        said.append(
            "The score's threshold lies above every benign run: however still they were, a score below the least "
            f"effect ({number(LEAST_EFFECT)} of a clear one) is no alarm."
        )
    said.append(f"Beyond step {number(made.horizon)}, where the shortest run ended, the bank says nothing.")
    said.append("Benign runs say nothing of misses: how many bad runs pass below a threshold is not measured here.")
    if any(one.pattern == SCORE or one.n_signals > 1 for one in made.signals):
        said.append(
            "Of the score and of families the rate is approximate, since weights and spreads come from the same runs, "
            "each taken from the others; of a single signal it is exact."
        )
    if not made.left_out:
        said.append("Not checked on the bank itself: --leave-one-out judges every run by the others.")
    return said


def _provenance(made: Calibration, bank: NullBank) -> list[tuple[str, str]]:
    rows: Sequence[tuple[str, str]] = [
        ("benign runs", f"{made.n}, up to step {made.horizon}"),
        ("measurements in a row that must exceed", str(made.in_a_row)),
        *[(name, value or "–") for name, value in bank.signature.items()],
        ("written", bank.written_at),
        ("versions", ", ".join(f"{name} {value}" for name, value in sorted(bank.versions.items()))),
    ]
    return list(rows)
