"""Which rows come first? A ranked row, with its name and its text, as reports and people read it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float

from attribution.check import Validation
from attribution.counterfactual import Counterfactual
from attribution.example import ExampleId
from attribution.groups import RowGroup, SourceShare, Theme
from diffing.durable import write_json
from diffing.errors import InputError, PathMissingError
from diffing.json_twin import from_plain, to_plain

FILE_NAME = "attribution.json"


@dataclass(frozen=True)
class AttributionRow:
    """One training row's place in a ranking.

    Attributes:
        rank: 1 is the row that pushed the query up most.
        example_id: the row's name.
        score: positive: the row pushed the query up. Only ratios and order mean something.
        share: score over the sum of all positive scores; negative where the row pushed down.
        text: the row as a person reads it.
        tag: the row's source or kind, where the data said so.
    """

    rank: int
    example_id: ExampleId
    score: float
    share: float
    text: str
    tag: str = ""


@dataclass(frozen=True)
class RowTokens:
    """A row's push, token by token.

    Attributes:
        tokens: texts of the tokens.
        pushes: one a token, in the unit of the row's score: what its loss adds to the push; 0 where none is taken.
    """

    tokens: tuple[str, ...]
    pushes: tuple[float, ...]


@dataclass(frozen=True)
class LexicalBaseline:
    """What plain word matching (TF-IDF) between rows and the query's answers would have said.

    Attributes:
        spearman: rank correlation of its scores with these, over all rows.
        shared_top: how many of the `n_top` strongest rows it has among its own.
        n_top: see `shared_top`.
    """

    spearman: float
    shared_top: int
    n_top: int


@dataclass(frozen=True)
class Attribution:
    """A ranking of training rows for one query, with what it rests on.

    Attributes:
        query: what was explained.
        method: how rows were scored.
        rows: strongest push up first; the strongest pushes down stand last.
        n_rows: how many rows were scored (`rows` may hold only both ends).
        steps: optimizer steps of the checkpoints that were used.
        validated: whether retraining confirmed the ranking.
        caveats: what a reader must know before acting on it.
        sources: how the upward push divides over source files or tags; empty where rows have none.
        groups: the strongest rows, those that say the same together.
        themes: what the strongest rows are about.
        tokens: row to its push token by token, for the rows worth reading.
        lexical: the same question asked of plain word matching; None where the query has no words.
        validation: what checks by retraining found; None where none was run.
        counterfactual: what training again without the strongest rows came to; None where that was not done.
    """

    query: str
    method: str
    rows: tuple[AttributionRow, ...]
    n_rows: int
    steps: tuple[int, ...]
    validated: bool = False
    caveats: tuple[str, ...] = ()
    sources: tuple[SourceShare, ...] = ()
    groups: tuple[RowGroup, ...] = ()
    themes: tuple[Theme, ...] = ()
    tokens: Mapping[ExampleId, RowTokens] = field(default_factory=dict)
    lexical: LexicalBaseline | None = None
    validation: Validation | None = None
    counterfactual: Counterfactual | None = None

    def __repr__(self) -> str:
        return f"Attribution({self.query!r}, {self.n_rows} rows, checkpoints {list(self.steps)}, {self.method})"

    @property
    def strongest(self) -> tuple[AttributionRow, ...]:
        """The upper end of the ranking: rows kept from rank 1 on without a gap, as far as they pushed up."""
        return tuple(row for place, row in enumerate(self.rows, start=1) if row.rank == place and row.score > 0)

    def save(self, folder: Path | str) -> Path:
        """Writes `attribution.json` into a run directory."""
        return write_json(Path(folder) / FILE_NAME, to_plain(self))

    @classmethod
    def load(cls, folder: Path | str) -> Attribution:
        """Reads what `save` wrote.

        Raises:
            PathMissingError: the run has no attribution yet.
            InputError: the file is not an attribution.
        """
        path = Path(folder) / FILE_NAME
        if not path.exists():
            raise PathMissingError(f"Expected {path}; it does not exist. Run `palimpsest attribute` on the run first.")
        try:
            return from_plain(cls, json.loads(path.read_text()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"Expected an attribution in {path}; got {error}. Run `palimpsest attribute` again."
            ) from error


def rank_rows(
    scores: Float[np.ndarray, " example"],
    examples: Sequence[ExampleId],
    *,
    texts: Mapping[ExampleId, str],
    tags: Mapping[ExampleId, str] | None = None,
    keep: int = 50,
) -> tuple[AttributionRow, ...]:
    """Orders rows by score and keeps both ends.

    Args:
        scores: one per row; positive pushes up.
        examples: names, in the order of `scores`.
        texts: name to readable text.
        tags: name to source or kind.
        keep: how many rows to keep at either end.
    """
    order = np.argsort(-scores, kind="stable")
    total = float(scores[scores > 0].sum()) or 1.0
    ends = range(len(order)) if len(order) <= 2 * keep else [*range(keep), *range(len(order) - keep, len(order))]
    return tuple(
        AttributionRow(
            rank=place + 1,
            example_id=examples[order[place]],
            score=float(scores[order[place]]),
            share=float(scores[order[place]]) / total,
            text=texts.get(examples[order[place]], ""),
            tag=(tags or {}).get(examples[order[place]], ""),
        )
        for place in ends
    )
