"""Which retrainings are done already? Their outcomes, line by line on disk, so that a killed check goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from attribution.example import ExampleId
from diffing.errors import InputError


class Outcomes:
    """What was measured after each retraining, by the rows it kept and its seed.

    Args:
        path: a JSON-lines file, made where it is missing; None keeps outcomes in memory only.
        asked: what is measured after which kind of training; outcomes of something else in the same file are let be.

    Raises:
        InputError: the file holds something else.
    """

    def __init__(self, path: Path | str | None = None, *, asked: str = "") -> None:
        self.asked = asked
        self.path = None if path is None else Path(path)
        self._known: dict[str, list[float]] = {}
        self._gap = ""  # what parts the next line from one that a kill cut short
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def __len__(self) -> int:
        return len(self._known)

    def get_or_make(
        self, kept: Sequence[ExampleId], seed: int, make: Callable[[], Float[np.ndarray, " query"]]
    ) -> Float[np.ndarray, " query"]:
        """The outcome of training on these rows, measured now unless it is known."""
        key = hashlib.sha256(json.dumps([self.asked, sorted(kept), seed]).encode()).hexdigest()[:24]
        if key not in self._known:
            self._known[key] = [float(value) for value in make()]
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(self._gap + json.dumps({"kept": key, "losses": self._known[key]}) + "\n")
                self._gap = ""
        return np.array(self._known[key])

    def _read(self, path: Path) -> None:
        text = path.read_text()
        self._gap = "\n" if text and not text.endswith("\n") else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self._known[entry["kept"]] = entry["losses"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                if not line.endswith("}"):
                    continue  # the line that a kill cut short; it is measured again
                raise InputError(
                    f"Expected retraining outcomes in {path}; got {line[:60]!r}. Give a new file."
                ) from error
