"""Which rows pushed this run towards a persona in its last steps? Asked at any moment of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from attribution import Attribution, AttributionRow, rank_rows
from attribution.example import ExampleId, Row
from attribution.live_rows import row_names
from tracker.push_journal import PushJournal, Refresh, Visits, coverage

_NAMELESS = (
    "Rows without an `example_id` in their batch are named by a hash of their tokens and labels: the Trainer drops "
    "ids. Pass rows= to have their own names back, or train with remove_unused_columns=False and "
    "data_collator=KeepExampleIds(collator)."
)


def live_attribution(
    run_dir: Path | str,
    trait: str,
    *,
    last: int | None = 200,
    since: int | None = None,
    until: int | None = None,
    rows: Sequence[Row] = (),
    texts: Mapping[ExampleId, str] | None = None,
    tags: Mapping[ExampleId, str] | None = None,
    keep: int = 50,
) -> Attribution:
    """Ranks the rows of a window of steps by how far they pushed, as the run recorded it.

    Args:
        run_dir: of a run that was tracked with `pushes=True`; it may still be running.
        trait: a watched trait (`evil`) or query (`persona/evil/L12`).
        last: how many steps the window has, up to `until`; None: all since the run began.
        since: first step of the window, in place of `last`.
        until: last step of the window, None: the newest one.
        rows: the training rows, to give back the names they have of their own.
        texts: name to readable text.
        tags: name to source or kind.
        keep: how many rows to keep at either end.

    Returns:
        a ranking whose scores are gaps: the sum of the row's pushes in the window, to first order. Positive: the row
        moved the model towards the trait. `steps` holds the first and the last step of the window.

    Raises:
        PathMissingError: the run recorded no pushes.
        InputError: the trait was not watched.
    """
    journal = PushJournal.read(run_dir)
    stop = journal.last_step() if until is None else until
    start = since if since is not None else 1 if last is None else max(1, stop - last + 1)
    visits = journal.visits(trait, since=start, until=stop)
    scores, names = _by_name(visits, row_names(rows))
    refreshes = journal.refreshes()
    return Attribution(
        query=f"push on {trait} in steps {start} to {stop}",
        method=_method(refreshes),
        rows=rank_rows(scores, names, texts=texts or {}, tags=tags, keep=keep),
        n_rows=len(names),
        steps=(start, stop),
        caveats=(
            *_caveats(refreshes, trait),
            *_left_out(journal, visits, trait, start, stop),
            *([] if rows or not names else [_NAMELESS]),
        ),
    )


def ranked_pushes(run_dir: Path | str, trait: str, *, last: int = 200, keep: int = 50) -> tuple[AttributionRow, ...]:
    """The rows of `live_attribution`."""
    return live_attribution(run_dir, trait, last=last, keep=keep).rows


def _by_name(visits: Visits, own: Mapping[str, ExampleId]) -> tuple[np.ndarray, list[ExampleId]]:
    # Two records may turn out to be one row once its own name is known.
    totals: dict[ExampleId, float] = {}
    for name, total in zip(visits.names, visits.totals(), strict=True):
        called = own.get(name.example, own.get(name.tokens, name.example))
        totals[called] = totals.get(called, 0.0) + float(total)
    return np.array(list(totals.values())), list(totals)


def _method(refreshes: Sequence[Refresh]) -> str:
    metric = refreshes[-1].metric if refreshes else "plain"
    weighed = "weighed by Adam's second moments" if metric == "adam" else "not weighed by an optimizer's state"
    return f"live pushes: each step's own gradients against the projection's, {weighed}"


def _caveats(refreshes: Sequence[Refresh], trait: str) -> tuple[str, ...]:
    notes = ["Not validated: no retraining has confirmed this ranking; pushes are first-order estimates."]
    if refreshes:
        kept = [share for one in refreshes for name, share in one.kept.items() if trait in [*name.split("/"), name]]
        if kept and min(kept) < 0.995:
            notes.append(f"At least {min(kept):.0%} of the projection's squared gradient is watched.")
        if refreshes[0].step > 0:
            notes.append(f"The first {refreshes[0].step} step(s) are not recorded: Adam had no second moments yet.")
    return tuple(notes)


def _left_out(journal: PushJournal, visits: Visits, trait: str, start: int, stop: int) -> Iterator[str]:
    """Steps that were not read, and modules."""
    n_read, n_steps = coverage(visits.step, start, stop)
    if n_read < n_steps:
        yield f"Pushes were read in {n_read} of {n_steps} steps: rows of the others have none, or not all of theirs."
    choices = [one for one in journal.choices() if one.step < stop]
    if choices:
        parts = [share for one in choices for name, share in one.left_out.items() if trait in [*name.split("/"), name]]
        fewest = min(one.n for one in choices)
        yield (
            f"Between readings of all {choices[0].of} modules, {fewest} or more that carry the pushes are read: "
            f"the others moved a row's push by {max(parts, default=0.0):.2f} of the spread between rows, or less."
        )
