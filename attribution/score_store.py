"""How are scores of more rows than memory holds kept, and how are they gone on with after a kill?

A folder with one zarr array `[example, query]` in chunks of rows, checksummed, and a header that names model, rows,
queries and method. Rows are scored chunk by chunk in the data set's own order; a chunk counts once it is committed.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from attribution.curvature_file import check_room, digest_rows, fingerprint_model
from attribution.example import ExampleId, Row, check_rows, context_length, example_id
from attribution.scorer import Scorer, TopRows
from diffing.chunks import ChunkedArray, flush
from diffing.commits import CommitLog
from diffing.durable import write_json
from diffing.errors import InputError, PathMissingError
from diffing.provenance import check_comparable, installed_versions

CHUNK_ROWS = 1024

_HEADER, _LOG, _ARRAY, _IDS = "scores.json", "commits.log", "values", "examples.json"


@dataclass(frozen=True)
class ScoreStore:
    """Scores on disk.

    Attributes:
        folder: where.
        queries: their names.
        examples: names of the rows, in the data set's order.
        method: curvature, with its settings.
        n_scored: rows scored so far; less than all where a writer was stopped.
        chunk_rows: rows of a chunk.
    """

    folder: Path
    queries: tuple[str, ...]
    examples: tuple[ExampleId, ...]
    method: str
    n_scored: int
    chunk_rows: int = CHUNK_ROWS

    def __repr__(self) -> str:
        return f"ScoreStore({self.folder}, {self.n_scored} of {len(self.examples)} rows, {len(self.queries)} queries)"

    @classmethod
    def open(cls, folder: Path | str) -> ScoreStore:
        """Reads what `write_scores` wrote, finished or not.

        Raises:
            PathMissingError: there is no store.
        """
        folder = Path(folder)
        if not (folder / _HEADER).exists():
            raise PathMissingError(f"Expected a score store in {folder}; there is none. Write one with write_scores.")
        header = json.loads((folder / _HEADER).read_text())
        examples = json.loads((folder / _IDS).read_text())
        scored = CommitLog(folder / _LOG).last()
        rows_of_a_chunk = header.get("chunk_rows", CHUNK_ROWS)
        return cls(folder, tuple(header["queries"]), tuple(examples), header["method"], scored, rows_of_a_chunk)

    def chunks(self) -> Iterator[tuple[int, Float[np.ndarray, "example query"]]]:
        """(first row, scores) of what is committed, chunk after chunk.

        Raises:
            StoreCorruptError: a chunk's bytes are not those written.
        """
        array = _array(self.folder, len(self.examples), len(self.queries), self.chunk_rows)
        for chunk in range(array.chunks_of(self.n_scored)):
            start = chunk * array.chunk_rows
            yield start, array.read(chunk)[: min(array.chunk_rows, self.n_scored - start)]

    def values(self, query: int) -> Float[np.ndarray, " example"]:
        """All committed scores of one query, in the data set's order."""
        parts = [chunk[:, query] for _, chunk in self.chunks()]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def top(self, query: int, k: int) -> TopRows:
        """The `k` rows that pushed a query up most, reading one chunk at a time."""
        best: list[tuple[float, int]] = []
        for start, chunk in self.chunks():
            scores = chunk[:, query]
            strongest = np.argsort(-scores, kind="stable")[:k]
            best = heapq.nlargest(k, [*best, *((float(scores[at]), -(start + int(at))) for at in strongest)])
        places = tuple(-place for _, place in best)
        names = tuple(self.examples[place] for place in places)
        return TopRows(self.queries[query], names, places, tuple(value for value, _ in best))


def write_scores(scorer: Scorer, rows: Sequence[Row], folder: Path | str) -> ScoreStore:
    """Scores rows into a store; started again after a kill, it goes on behind the last committed chunk.

    Args:
        scorer: from `prepare_queries` or `prepare_rows`.
        rows: the data set, any length that can be indexed.
        folder: the store; made if it is missing.

    Raises:
        InputError: rows that cannot be scored.
        ComparabilityError: the folder holds scores of another model, other rows, queries or method.
        StoreFullError: too little room, said before anything is scored.
    """
    folder = Path(folder)
    check_rows(rows, what="training row", context_length=context_length(scorer.model))
    header = _header(scorer, rows)
    log = CommitLog(folder / _LOG)
    begun = (folder / _HEADER).exists()
    found = json.loads((folder / _HEADER).read_text()) if begun else {}
    array = _array(folder, len(rows), len(scorer.names), found.get("chunk_rows", CHUNK_ROWS))
    if begun:
        check_comparable(
            "Stored scores and this request",
            {key: found.get(key) for key in header},
            header,
            names=("stored", "now"),
            fix="Name another folder, or delete the store.",
        )
    else:
        check_room(folder, array.chunks_of(len(rows)) * array.chunk_bytes)
        array.create({"axes": ["example", "query"]})
        write_json(folder / _IDS, [example_id(row) for row in rows])
        write_json(folder / _HEADER, {**header, "chunk_rows": array.chunk_rows, "versions": installed_versions()})
    done = log.last()
    for start in range(done - done % array.chunk_rows if done < len(rows) else len(rows), len(rows), array.chunk_rows):
        stop = min(start + array.chunk_rows, len(rows))
        padded = np.zeros((array.chunk_rows, array.width), np.float32)
        padded[: stop - start] = scorer.scores([rows[place] for place in range(start, stop)]).T
        number = start // array.chunk_rows
        array.write(number, padded)
        flush(array.files(range(number, number + 1)))
        log.append(stop)
    return ScoreStore.open(folder)


def _header(scorer: Scorer, rows: Sequence[Row]) -> dict[str, object]:
    return {
        "model": fingerprint_model(scorer.model),
        "rows": digest_rows(rows),
        "queries": list(scorer.names),
        "method": scorer.description,
        "coverage": scorer.coverage.share,
    }


def _array(folder: Path, n_rows: int, n_queries: int, chunk_rows: int) -> ChunkedArray:
    if n_queries < 1:
        raise InputError("Expected at least one query in a score store; got none. Prepare queries first.")
    return ChunkedArray(folder / _ARRAY, n_rows, n_queries, chunk_rows, np.dtype(np.float32))
