"""Where do scores that took minutes wait for the rest of their benchmark?"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.planted_score import Score
from diffing.durable import write_atomic

_CACHE = Path(__file__).parent / "cache"


@dataclass(frozen=True)
class KeptScores:
    """One JSON file a score; a score counts only for the code that made it.

    Attributes:
        folder: under `benchmarks/cache`.
        code: digest of the code as it is.
    """

    folder: str
    code: str

    def read(self, name: str) -> Score | None:
        """The score with this name, if the code as it is made it."""
        try:
            record = json.loads(self.path(name).read_text())
        except FileNotFoundError:
            return None
        return Score(**record["score"]) if record["code"] == self.code else None

    def get(self, name: str, measure: Callable[[], Score]) -> Score:
        """The score with this name; measured, and kept, where there is none."""
        found = self.read(name)
        if found is None:
            started = time.process_time()
            found = measure()
            seconds = round(time.process_time() - started, 1)
            record = {"code": self.code, "cpu_seconds": seconds, "score": asdict(found)}
            write_atomic(self.path(name), json.dumps(record, indent=1) + "\n")
        return found

    def path(self, name: str) -> Path:
        """The file of a score."""
        return _CACHE / self.folder / f"{name}.json"


__all__ = ["KeptScores"]
