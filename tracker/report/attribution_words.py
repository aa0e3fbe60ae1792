"""How is an attribution said in plain words? Every figure in them stands on the page as well."""

from __future__ import annotations

from attribution.ranking import Attribution
from tracker.report.counterfactual_view import counterfactual_words
from tracker.report.text import number, round_percent, visible


def attribution_headline(result: Attribution) -> str:
    """One sentence: how concentrated the push is."""
    up = result.strongest
    if not up:
        return "No training row pushed it up."
    share = sum(row.share for row in up)
    even = len(up) / max(1, result.n_rows)
    if len(up) == result.n_rows:
        return f"All {number(len(up))} rows pushed the same way."
    tail = (
        "as if all rows pushed alike"
        if share < 1.2 * even
        else f"{number(share / even, 2)} times their part of the rows"
    )
    rows = f"The {number(len(up))} strongest of {number(result.n_rows)} rows"
    return f"{rows} carry {round_percent(share)} of the push: {tail}."


def attribution_story(result: Attribution) -> list[str]:
    """The sentences after the headline: where the rows come from, what they say, what words alone would have said."""
    told = []
    lead = next((source for source in result.sources if source.low > source.row_share), None)
    if lead is not None:
        told.append(
            f"Rows of “{visible(lead.source, limit=60)}” are {round_percent(lead.row_share)} of the data and carry "
            f"{round_percent(lead.push_share)} of the push (95 % {round_percent(lead.low)} to "
            f"{round_percent(lead.high)}); {number(lead.n_top)} of the strongest are among them."
        )
    elif result.sources:
        told.append("No source carries surely more of the push than its share of the rows.")
    if result.themes and result.themes[0].words:
        words = ", ".join(f"“{visible(odds.word, limit=24)}”" for odds in result.themes[0].words[:4])
        told.append(f"What sets the strongest rows apart from the rest: {words}.")
    if result.counterfactual is not None:
        told.append(counterfactual_words(result.counterfactual))
    if result.lexical is not None:
        told.append(
            f"Plain word matching would have named {number(result.lexical.shared_top)} of the same "
            f"{number(result.lexical.n_top)} rows."
        )
    return told
