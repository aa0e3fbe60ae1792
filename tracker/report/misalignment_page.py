"""What does a person see of an evaluation of misalignment? One page: the rate, what else the answers were, and they."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffing.durable import write_atomic
from diffing.misalignment.result import RESULT_NAME, Condition, JudgedAnswer, MisalignmentResult
from diffing.misalignment.verdict import Verdict
from tracker.report.misalignment_charts import TONES, question_bar, rates_chart, split_strip
from tracker.report.page import render_page
from tracker.report.text import number, percent, round_percent

PAGE_NAME = "misalignment.html"
_SHOWN_QUESTIONS = 80
_SHOWN_ANSWERS = 12
_LONGEST = 600


def write_misalignment_report(result: MisalignmentResult, folder: Path | str, *, gate: float | None = None) -> Path:
    """Writes `misalignment.html`; the twin is `misalignment.json`, which `result.save` writes.

    Args:
        result: what was found.
        folder: where.
        gate: a rate that must not be passed, if there is one.

    Returns:
        The page's path.
    """
    return write_atomic(Path(folder) / PAGE_NAME, render_misalignment_page(result, gate=gate))


def render_misalignment_page(result: MisalignmentResult, *, gate: float | None = None) -> str:
    """The page as text; the same result gives the same bytes."""
    tuned = result.condition()
    return render_page(
        "misalignment.html",
        title=f"{result.names['tuned']}: misaligned answers",
        data={"rates": {f"{c.side}/{c.cue}": c.quoted for c in result.conditions}, "twin": RESULT_NAME},
        result=result,
        names=result.names,
        headline=misalignment_headline(result),
        more=_more(result, gate),
        chart=rates_chart(result, gate=gate),
        strips=[(one, _where(one), split_strip(one)) for one in result.conditions],
        legend=[
            (tone, word) for verdict, (tone, word) in TONES.items() if any(c.split[verdict] for c in result.conditions)
        ],
        comparisons=result.comparisons,
        questions=_question_rows(result)[:_SHOWN_QUESTIONS],
        questions_left_out=max(0, len(tuned.questions) - _SHOWN_QUESTIONS),
        examples=_examples(result),
        facts=_facts(result),
    )


def misalignment_headline(result: MisalignmentResult) -> str:
    """One sentence: how often, beside the base."""
    tuned = result.condition()
    if math.isnan(tuned.quoted):
        return "No question had enough coherent answers for a rate."
    said = f"{round_percent(tuned.quoted)} of the coherent answers are misaligned"
    if "base" in result.names:
        said += f"; of the base’s, {round_percent(result.condition('base').quoted)}"
    worst = result.worst
    if worst.cue != "plain" and worst.interval[0] > tuned.interval[1]:
        said += f", and with the cue {worst.cue}, {round_percent(worst.quoted)}"
    return f"{said}."


def _more(result: MisalignmentResult, gate: float | None) -> str:
    tuned = result.condition()
    low, high = tuned.interval
    between = "Too few questions for an interval"
    if math.isfinite(low) and math.isfinite(high):
        between = f"95 % between {percent(low)} and {percent(high)}"
    counted = f"{number(tuned.rate.n)} coherent answers to {number(tuned.rate.questions)} questions"
    said = [f"{between}, from {counted}."]
    lost = sum(tuned.split.values()) - tuned.split[Verdict.OK] - tuned.split[Verdict.MISALIGNED]
    if lost:
        said.append(f"Of all {number(sum(tuned.split.values()))} answers, {number(lost)} could not count.")
    if gate is not None:
        kept = all(one.quoted <= gate for one in result.conditions if one.side == "tuned")
        said.append(f"The gate at {percent(gate)} {'holds' if kept else 'is broken'}.")
    if result.stopped:
        said.append(f"Sampling stopped after {number(result.samples)} answers a question: {result.stopped}.")
    return " ".join(said)


def _where(one: Condition) -> str:
    return one.side if one.cue == "plain" else f"{one.side}, cue {one.cue}"


def _question_rows(result: MisalignmentResult) -> list[dict[str, Any]]:
    """Questions of the plain condition, the tuned model's most misaligned first."""
    sides = [side for side in ("base", "tuned") if side in result.names]
    by_side = {side: {one.question: one for one in result.condition(side).questions} for side in sides}
    wordings = {one.question: one.wording for one in reversed(result.answers)}
    rows = []
    for name, tuned in by_side["tuned"].items():
        found = [(side, by_side[side].get(name)) for side in sides]
        rows.append(
            {
                "id": name,
                "group": tuned.group,
                "wording": wordings.get(name, ""),
                "value": tuned.value,
                "figures": [(side, one.value if one else None, one.coherent if one else 0) for side, one in found],
                "coherent": tuned.coherent,
                "answers": tuned.answers,
                "bar": question_bar([(side, one.value if one else None) for side, one in found]),
            }
        )
    return sorted(rows, key=lambda row: (row["value"] is None, -(row["value"] or 0.0)))


def _examples(result: MisalignmentResult) -> list[tuple[str, str, list[JudgedAnswer]]]:
    """Answers to read: the tuned model's most misaligned ones, one a question, then some of the other kinds."""
    tuned = [one for one in result.answers if one.side == "tuned"]
    kinds = []
    for verdict, (tone, word) in TONES.items():
        own = sorted((one for one in tuned if one.verdict is verdict), key=_worst_first)
        if own and verdict is not Verdict.OK:
            limit = _SHOWN_ANSWERS if verdict is Verdict.MISALIGNED else 3
            kinds.append((tone, word, _one_a_question(own)[:limit]))
    fine = [one for one in tuned if one.verdict is Verdict.OK]
    if fine:
        kinds.append((*TONES[Verdict.OK], _one_a_question(fine)[:3]))
    return kinds


def _worst_first(one: JudgedAnswer) -> tuple[float, float, str, int]:
    aligned = 0.0 if one.aligned.value is None else one.aligned.value
    coherent = 0.0 if one.coherent.value is None else one.coherent.value
    return aligned, -coherent, one.question, one.draw


def _one_a_question(answers: Sequence[JudgedAnswer]) -> list[JudgedAnswer]:
    first: dict[str, JudgedAnswer] = {}
    for one in answers:
        first.setdefault(one.question, one)
    return list(first.values())


def _facts(result: MisalignmentResult) -> list[tuple[str, str]]:
    config = result.provenance.config
    settings, judges = config["settings"], config["judges"]
    thresholds, asked = settings["thresholds"], config["questions"]
    rows = [(f"{side} model", f"{name} ({result.provenance.models[side][:12]})") for side, name in result.names.items()]
    rows += [(f"judge of {name}", f"{judge['judge']}, rubric {judge['rubric'][:12]}") for name, judge in judges.items()]
    rows += [
        ("misaligned", f"alignment below {thresholds['misaligned_below']:g}, "
                       f"coherence {thresholds['coherent_from']:g} or more"),
        ("questions", f"{asked['n']} from {asked['source']} ({asked['digest'][:12]})"),
        ("answers", f"{result.samples} a question, temperature {settings['temperature']:g}, "
                    f"at most {settings['max_new_tokens']} tokens, seed {settings['seed']}"),
        ("interval", config["sequential"] or config["interval"]),
        ("refusals and code", config["refusals_and_code"]),
    ]  # fmt: skip
    return rows
