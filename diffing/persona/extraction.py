"""What came of extracting a trait: the vectors, their figures, and why this layer?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffing.durable import write_json
from diffing.errors import PathMissingError, PersonaError
from diffing.json_twin import from_plain, to_plain
from diffing.persona.keep import Kept
from diffing.persona.separation import Separation
from diffing.persona.sweep_result import LayerSweep
from diffing.persona.vector import Null, PersonaVector

RECORD_NAME = "extraction.json"


@dataclass(frozen=True)
class VectorRow:
    """One vector in figures; the fields are those of `PersonaVector`."""

    site: str
    pooling: str
    scale: float
    separation: Separation
    null: Null | None


@dataclass(frozen=True)
class PairExample:
    """One kept pair, for the reader: model text, which a page must escape."""

    question: str
    trait_answer: str
    plain_answer: str


@dataclass(frozen=True)
class ExtractionRecord:
    """What an extraction found, without the vectors themselves; the JSON twin of its page.

    Attributes:
        trait: the trait's name.
        description: what it is.
        trait_digest: SHA-256 of its words.
        model: name of the model.
        model_fingerprint: its content.
        fitted: pairs on extraction questions.
        held_out: pairs on held-out questions.
        cut: answers that `max_new_tokens` cut short, of all.
        answers: answers in all.
        rows: every vector in figures.
        sweep: steering by layer and strength; None where it was left out.
        site: the chosen site.
        pooling: the chosen pooling.
        why: why this site.
        notes: what the reader should know.
        examples: some kept pairs.
        settings: resolved.
    """

    trait: str
    description: str
    trait_digest: str
    model: str
    model_fingerprint: str
    fitted: Kept
    held_out: Kept
    cut: int
    answers: int
    rows: tuple[VectorRow, ...]
    sweep: LayerSweep | None
    site: str
    pooling: str
    why: str
    notes: tuple[str, ...]
    examples: tuple[PairExample, ...]
    settings: Mapping[str, Any]

    @property
    def chosen(self) -> VectorRow:
        """The figures of the chosen vector."""
        return next(row for row in self.rows if (row.site, row.pooling) == (self.site, self.pooling))

    def save(self, folder: Path | str) -> Path:
        """Writes `extraction.json`."""
        return write_json(Path(folder) / RECORD_NAME, to_plain(self))

    @classmethod
    def load(cls, folder: Path | str) -> ExtractionRecord:
        """Reads what `save` wrote.

        Raises:
            PathMissingError: no such file.
            PersonaError: it is not an extraction.
        """
        path = Path(folder) / RECORD_NAME
        if not path.is_file():
            raise PathMissingError(f"Expected an extraction at {path}, got no such file. Check the folder.")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(value, dict):
                raise TypeError(f"a {type(value).__name__}")
            return from_plain(cls, value)
        except (ValueError, KeyError, TypeError) as error:
            raise PersonaError(
                f"Expected an extraction in {path}, got something else ({error}). Extract it again."
            ) from error


@dataclass(frozen=True, eq=False)
class Extraction:
    """The vectors of one trait and how they came about.

    Attributes:
        record: everything but the vectors.
        vectors: every pooling and site.
    """

    record: ExtractionRecord
    vectors: tuple[PersonaVector, ...]

    @property
    def chosen(self) -> PersonaVector:
        """The vector to use: the pooling that was asked for, at the layer that steers best."""
        return next(v for v in self.vectors if (v.site, v.pooling) == (self.record.site, self.record.pooling))

    def save(self, path: Path | str) -> Path:
        """Writes the chosen vector to `path`, and every vector with `extraction.json` into the folder of its name."""
        path = Path(path)
        folder = path.with_suffix("")
        for vector in self.vectors:
            vector.save(folder / vector.pooling / f"{vector.site.replace(':', '-')}.safetensors")
        self.record.save(folder)
        return self.chosen.save(path)
