"""What does a person see of a run, or of several beside each other? One page, rebuilt from the run directory alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attribution.ranking import Attribution, AttributionRow
from diffing.diff_result import DiffResult
from diffing.durable import write_atomic, write_json
from tracker.alarms.changepoints import stretches
from tracker.alert_life import mark_of
from tracker.report.charts import bar
from tracker.report.diff_cards import latent_cards
from tracker.report.diff_page import PAGE_NAME as DIFF_PAGE_NAME
from tracker.report.diff_page import by_interest, render_diff_page
from tracker.report.diff_words import diff_headline, diff_story
from tracker.report.labels import LABEL_WORDS
from tracker.report.names import is_share, signal_title, unit_words
from tracker.report.overview import draw_overview, tone_of
from tracker.report.page import LIMIT_BYTES, finite, render_page
from tracker.report.run_report import RunReport, collect_run, evidence_rows, find_runs
from tracker.report.run_words import (
    Piece,
    alert_sentence,
    alert_title,
    behaviour_sentence,
    measured,
    run_headline,
    run_story,
    verdict,
)
from tracker.report.series import as_line
from tracker.report.step_chart import SMALL, Mark, Panel, step_chart
from tracker.report.text import number, visible
from tracker.signals import Alert

PAGE_NAME, TWIN_NAME = "report.html", "report.json"
_MULTIPLES = (60, 24, 8)  # small charts shown, fewer where the page would grow past its limit
_MOST_ROWS = 12
_MOST_ALERTS = 20
_MOST_LEVELS = 8


def write_run_report(run_dir: Path | str) -> Path:
    """Writes `report.html` and its twin `report.json` into a run directory, or into a folder of several runs.

    Everything is read from the directory; the same directory gives the same bytes. A run that holds a diff gets
    that diff's page as well.

    Returns:
        The page's path.

    Raises:
        PathMissingError: there is no such folder.
        InputError: there is no tracked run in it.
    """
    folder = Path(run_dir)
    runs = find_runs(folder)
    return write_runs_report(runs, folder)


def write_runs_report(run_dirs: Sequence[Path | str], out_dir: Path | str) -> Path:
    """Writes one page that lays several runs over each other, as `report.html` with its twin in `out_dir`."""
    folder, reports = Path(out_dir), [collect_run(run) for run in run_dirs]
    for run, report in zip(run_dirs, reports, strict=True):
        if report.diff is not None:
            write_atomic(Path(run) / "diff" / DIFF_PAGE_NAME, render_diff_page(report.diff))
    twins = [report.to_json() for report in reports]
    write_json(folder / TWIN_NAME, finite(twins[0] if len(twins) == 1 else {"format": 1, "runs": twins}))
    return write_atomic(folder / PAGE_NAME, render_runs_page(reports))


def render_runs_page(reports: Sequence[RunReport]) -> str:
    """The page of one run, or of several laid over each other, as text."""
    overview = draw_overview(reports)
    html = ""
    for multiples in _MULTIPLES:
        html = render_page(
            "run.html" if len(reports) == 1 else "runs.html",
            title=" and ".join(report.name for report in reports)[:120],
            data={"charts": {"overview": overview.readings} if overview else {}},
            overview=overview,
            signal_title=signal_title(overview.signal) if overview else "",
            runs=[run_view(report, reports, multiples) for report in reports],
            comparison=_comparison(reports),
            caveats=list(dict.fromkeys(said for report in reports for said in _caveats(report))),
        )
        if len(html.encode()) < LIMIT_BYTES:
            break
    return html


def run_view(report: RunReport, reports: Sequence[RunReport], multiples: int) -> dict[str, Any]:
    """What the templates show of one run."""
    return {
        "report": report,
        "tone": tone_of(report, reports),
        "headline": run_headline(report),
        "story": run_story(report),
        "behaviour": behaviour_sentence(report),
        "alerts": [_alert(alert, report) for alert in report.alerts[:_MOST_ALERTS]],
        "alerts_left_out": max(0, len(report.alerts) - _MOST_ALERTS),
        "multiples": [_multiple(report, name) for name in _by_weight(report)[:multiples]],
        "multiples_left_out": max(0, len(report.names) - multiples),
        "interventions": _interventions(report),
        "attribution": _attribution(report.attribution),
        "latents": _latents(report.diff),
        "caveats": _caveats(report),
        "facts": _facts(report),
    }


def _comparison(reports: Sequence[RunReport]) -> dict[str, Any]:
    """The headline over several runs: who alerted, who stayed silent."""
    loud = [report for report in reports if report.alerts]
    quiet = [report for report in reports if not report.alerts]
    pieces: list[Piece] = []
    for report in (*loud, *quiet):
        name = Piece(visible(report.name, limit=60), "name")
        pieces += [name, Piece(" "), verdict(report), Piece("; ")]
    return {"headline": [*pieces[:-1], Piece(".")]}


def _alert(alert: Alert, report: RunReport) -> dict[str, Any]:
    when, what = alert_title(alert)
    readings = alert.evidence.get("measured")
    told = {"rule_name", "fingerprint", "actions", "notify", "muted"}
    rest = {key: value for key, value in alert.evidence.items() if key not in {"measured", *told}}
    pushed = rest.get("pushed_by")
    if _is_pushed(pushed):
        rest.pop("pushed_by")
    stands = next((one for one in report.incidents if one.fingerprint == mark_of(alert)), None)
    return {
        "alert": alert,
        "stands": stands,
        "explained": report.explanations.get(alert.id),
        "levels": stretches(report.series(alert.signal))[:_MOST_LEVELS],
        "muted": alert.evidence.get("muted"),
        "asked": [str(one) for one in alert.evidence.get("actions", ())],
        "told": [str(one) for one in alert.evidence.get("notify", ())],
        "pushed": pushed if _is_pushed(pushed) else [],
        "when": when,
        "what": what,
        "why": alert_sentence(alert),
        "unit": unit_words(alert.unit),
        "measured": readings if _is_table(readings) else [],
        "evidence": evidence_rows(rest if _is_table(readings) else {"measured": readings, **rest}),
    }


def _is_pushed(rows: Any) -> bool:
    return isinstance(rows, list) and all(isinstance(one, dict) and {"example", "push"} <= one.keys() for one in rows)


def _is_table(readings: Any) -> bool:
    return isinstance(readings, list) and all(
        isinstance(one, dict) and all(isinstance(value, (int, float, type(None))) for value in one.values())
        and {"step", "value"} <= one.keys() for one in readings
    )  # fmt: skip


def _by_weight(report: RunReport) -> list[str]:
    """Signals that alerted first, then behaviour, personas, misalignment and the rest, each by name."""
    alerted = {alert.signal for alert in report.alerts}
    families = ("behaviour/", "persona/", "misalignment/")

    def weight(name: str) -> tuple[bool, int, str]:
        family = next((place for place, start in enumerate(families) if name.startswith(start)), len(families))
        return name not in alerted, family, name

    return sorted(report.names, key=weight)


def _multiple(report: RunReport, name: str) -> dict[str, Any]:
    series = report.series(name)
    last = series[-1]
    alerts = [alert for alert in report.alerts if alert.signal == name]
    panel = Panel(
        "",
        [as_line(series, label="", tone="tuned" if alerts else "base")],
        floor=alerts[0].threshold if alerts and math.isfinite(alerts[0].threshold) else None,
        share=is_share(name),
        zero=not name.startswith("train/"),
    )
    chart = step_chart(
        [panel], marks=[Mark(alert.step, "") for alert in alerts], frame=SMALL, title=signal_title(name),
        description=f"{len(series)} measurements; the last, at step {last.step}, is {measured(last)}.",
    )  # fmt: skip
    counted = f", n = {number(last.n)}" if last.n > 1 else ""
    return {"title": signal_title(name), "name": name, "chart": chart, "last": measured(last), "counted": counted}


def _interventions(report: RunReport) -> list[str]:
    """What the tracker did to the training, as far as the directory proves it."""
    said = [str(one) for one in report.interventions]
    if any("vectors" in one.settings for one in report.interventions):
        said.append(
            "While it is steered, projections of the training batch are read inside the steered passes; those at the "
            "probe prompts and the canaries are not steered."
        )
    if report.status == "stopped":
        said.append(f"Training was stopped at step {report.last_step} by an alert.")
    wanted = _configured_actions(report)
    if report.alerts and "save" in wanted:
        kept = [step for step, _ in report.checkpoints if step >= report.alerts[0].step]
        said.append(
            f"The alert asked for a checkpoint; the first at or after it is of step {kept[0]}."
            if kept
            else "The alert asked for a checkpoint, but none at or after it was recorded."
        )
    return said


def _configured_actions(report: RunReport) -> Sequence[str]:
    config = report.attempts[-1].config if report.attempts else {}
    found = config.get("on_alert") or (config.get("tracker") or {}).get("on_alert") or ()
    return [found] if isinstance(found, str) else [str(action) for action in found]


def _attribution(attribution: Attribution | None) -> dict[str, Any] | None:
    if attribution is None:
        return None
    up = attribution.strongest
    pushed = _distinct(up)[:_MOST_ROWS]
    held = _distinct([row for row in attribution.rows if row.score < 0])[-3:]
    largest = max((abs(same[0].score) for same in (*pushed, *held)), default=0.0)
    tags = Counter(row.tag for row in up if row.tag)
    return {
        "all": attribution,
        "rows": [_attributed(same, largest, "tuned") for same in pushed],
        "held": [_attributed(same, largest, "base") for same in held],
        "tags": [
            f"{count} of the {len(up)} strongest are tagged “{visible(tag, limit=60)}”"
            for tag, count in tags.most_common(3)
        ],
    }


def _distinct(rows: Sequence[AttributionRow]) -> list[list[AttributionRow]]:
    """Rows that read the same stand together, at the place of the strongest."""
    found: dict[tuple[str, str], list[AttributionRow]] = {}
    for row in rows:
        found.setdefault((row.text, row.tag), []).append(row)
    return list(found.values())


def _attributed(same: Sequence[AttributionRow], largest: float, tone: str) -> dict[str, Any]:
    return {
        "row": same[0],
        "repeats": len(same) - 1,
        "share": sum(row.share for row in same),
        "bar": bar(abs(same[0].score), largest, tone=tone, width=90),
    }


def _latents(diff: DiffResult | None) -> dict[str, Any] | None:
    if diff is None:
        return None
    for label in ("tuned_only", "rotated"):
        chosen = by_interest(diff.latents[diff.latents["label"] == label])
        if len(chosen):
            break
    return {
        "diff": diff,
        "said": [diff_headline(diff), *diff_story(diff)],
        "label": LABEL_WORDS[label],
        "count": len(chosen),
        "cards": latent_cards(diff, chosen, most=5, contexts=2),
    }


def _caveats(report: RunReport) -> list[str]:
    said = list(report.attribution.caveats) if report.attribution else []
    said += report.diff.caveats if report.diff else []
    if report.alerts:
        said.append(
            "No floor is calibrated by itself: how often a harmless fine-tune would cross it is only known "
            "from harmless fine-tunes of the same kind."
        )
    return list(dict.fromkeys(said))


def _facts(report: RunReport) -> list[tuple[str, str]]:
    rows = [("run", report.name), ("status", report.status), ("last step", str(report.last_step))]
    rows.append(("measurements", f"{len(report.signals)} of {len(report.names)} signals"))
    rows.append(("probe prompts", str(report.probes.get("digest", "not recorded"))))
    rows.append(("persona vectors", _listed(report.personas)))
    rows.append(("checkpoints", _listed(f"{Path(path).name} (step {step})" for step, path in report.checkpoints)))
    for attempt in report.attempts:
        ended = (
            f"ended at step {attempt.ended_step} ({attempt.status})" if attempt.status else "never said how it ended"
        )
        rows.append((f"attempt {attempt.number}", f"from step {attempt.step}, {ended}"))
    if report.attempts:
        settings = report.attempts[-1].config
        rows.append(("settings", ", ".join(f"{name} {value}" for name, value in sorted(settings.items()))[:4000]))
    return rows


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
