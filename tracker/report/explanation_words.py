"""How is an alert's explanation said in plain words? Every figure in them stands on the page as well."""

from __future__ import annotations

from tracker.explanation import Explanation, Reading, SpecificityAt
from tracker.report.names import is_share, signal_title, unit_words
from tracker.report.text import number, percent, places, round_percent, visible


def figure(value: float | None, found: Explanation) -> str:
    """A value of the signal with its unit."""
    if value is None:
        return "–"
    if is_share(found.signal):
        return round_percent(value)
    said = places(value, 2) if found.unit == "gap" else number(value)
    return f"{said} {unit_words(found.unit)}".rstrip()


def reading_words(reading: Reading, found: Explanation) -> str:
    """One measurement with its interval."""
    said = figure(reading.value, found)
    if reading.low is None or reading.high is None:
        return said
    return f"{said} (95 % {figure(reading.low, found)} to {figure(reading.high, found)})"


def explanation_headline(found: Explanation) -> str:
    """One sentence: what moved, from what to what, between which steps."""
    origin = found.before or found.start
    return (
        f"{signal_title(found.signal)}: from {figure(origin.value, found)} at step {origin.step} to "
        f"{figure(found.at.value, found)} at step {found.step}."
    )


def explanation_story(found: Explanation) -> list[str]:
    """The sentences after the headline."""
    told = [
        f"It stood above {figure(found.threshold, found)} from step {found.since} on; rule: {visible(found.rule)}.",
        *judgement_words(found),
    ]
    if found.parts:
        told.append(parts_words(found))
    if found.specificity is not None:
        told.append(specificity_words(found.specificity))
    if found.rows is not None:
        told.append(_rows_words(found))
    if found.checkpoint is not None:
        told.append(f"The last checkpoint before it began is of step {found.checkpoint[0]}.")
    return told


def judgement_words(found: Explanation) -> list[str]:
    """What the detector's own figures say of how rare this is; nothing for a plain floor."""
    said, of = found.judged, []
    if "p_value" in said and "benign_runs" in said:
        together = said.get("watched_together", 1)
        family = f", all {number(together)} signals of the rule together" if together > 1 else ""
        of.append(
            f"A benign run like the {number(said['benign_runs'])} of the bank goes this far with a probability of at "
            f"most {number(said['p_value'], 2)}{family}; the furthest of them reached "
            f"{figure(said.get('benign_largest'), found)}."
        )
    if "e_value" in said:
        of.append(
            f"The evidence that it left its own level is {number(said['e_value'])} to 1, among "
            f"{number(said.get('series', 1))} series at a share of false alerts of {percent(said.get('level'), 0)}."
        )
    if "evidence" in said and "needed" in said:
        of.append(
            f"Its evidence reached {number(said['evidence'])}; without a change that takes "
            f"{number(said['needed'])} measurements on average at least."
        )
    if "baseline_level" in said:
        of.append(
            f"Its level over its first {number(said.get('baseline_n'))} measurements was "
            f"{figure(said['baseline_level'], found)}, with a standard deviation of "
            f"{figure(said.get('baseline_sigma'), found)}."
        )
    return of


def parts_words(found: Explanation) -> str:
    """What the score was made of."""
    kinds = [part for part in found.parts if part.is_kind]
    measured = [part for part in found.parts if not part.is_kind and part.score > 0]
    told = ""
    if kinds:
        told = " and ".join(f"{visible(part.signal)} say {places(part.score, 2)}" for part in kinds)
        told = f"Of its kinds of evidence, each with the rise to expect at its pace, {told}; the smaller counts. "
    largest = ", ".join(f"{signal_title(part.signal)} ({places(part.score, 2)})" for part in measured[:3])
    return f"{told}Its largest parts: {largest}." if largest else told.strip()


def specificity_words(at: SpecificityAt) -> str:
    """One sentence on how special the direction is."""
    found = at.found
    went = f"The model moved {places(found.drift, 2)} gap towards {visible(found.trait)}"
    far = "further than along any" if found.n_as_far == 0 else f"no further than along {number(found.n_as_far)}"
    against = f"{went}, {far} of {number(found.n_random)} random directions (p {number(found.p_value, 2)})"
    if not found.styles:
        return f"{against}; no style was tracked beside it."
    name, value = max(found.styles.items(), key=lambda one: abs(one[1]))
    beside = "and further than any style" if found.specific else "but not further than everything else"
    return f"{against} {beside}: {visible(name)} moved {places(value, 2)}."


def _rows_words(found: Explanation) -> str:
    assert found.rows is not None
    up = [row for row in found.rows.rows if row.score > 0]
    tags = [row.tag for row in up[:20] if row.tag]
    live = found.rows.source == "live"
    window = f" met in steps {found.rows.since} to {found.rows.until}" if live else ""
    told = f"{number(found.rows.n_rows)} rows{window} were ranked by how far they pushed"
    if tags:
        most = max(sorted(set(tags)), key=tags.count)
        told = f"{told}; of the {len(tags)} strongest, {percent(tags.count(most) / len(tags), 0)} are “{visible(most)}”"
    if found.called is None:
        return f"{told}."
    called, met = found.called
    return (
        f"{told}. By what each pushed beside the rows of its time, {number(called)} of the {number(met)} met stand out."
    )
