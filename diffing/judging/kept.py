"""Which answers has this judge read already?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffing.answer_cache import AnswerCache
from diffing.judging.judge import Exchange, Judge, Reason, Rubric, Score, digest_of

_FORMAT = 1
_AT_ONCE = 64


class KeptScores:
    """A judge whose scores are kept on disk, by judge, rubric and exchange; a kill costs at most 64 judgements.

    What failed is not kept, so that it is tried again. Use as a context manager, or call `close`.

    Args:
        judge: who judges what is not known yet.
        path: SQLite file, shared by any number of judges; None keeps scores for this object's life alone.

    Attributes:
        n_judged: exchanges that the judge read.
        n_kept: exchanges whose score was there.
    """

    def __init__(self, judge: Judge, path: Path | str | None) -> None:
        self.judge_itself, self.n_judged, self.n_kept = judge, 0, 0
        self._cache = AnswerCache(path)

    @property
    def name(self) -> str:
        """The judge's own."""
        return self.judge_itself.name

    @property
    def rubric(self) -> Rubric:
        """The judge's own."""
        return self.judge_itself.rubric

    @property
    def calls_per_item(self) -> int:
        """The judge's own; 1 where it does not say."""
        return int(getattr(self.judge_itself, "calls_per_item", 1))

    def count_known(self, items: Sequence[Exchange]) -> int:
        """How many of these would cost nothing."""
        return sum(self._cache.get(key) is not None for key in map(self._keys(), items))

    def judge(self, items: Sequence[Exchange], *, progress: bool = False) -> list[Score]:
        """One score an exchange; equal exchanges are judged once."""
        key_of = self._keys()
        keys = [key_of(item) for item in items]
        known: dict[str, Score] = {}
        unknown: dict[str, Exchange] = {}
        for key, item in zip(keys, items, strict=True):
            if key in known or key in unknown:
                continue
            stored = self._cache.get(key)
            if stored is None:
                unknown[key] = item
            else:
                known[key] = Score.from_json(stored)
        self.n_kept += len(items) - len(unknown)
        self.n_judged += len(unknown)
        names = list(unknown)
        for start in range(0, len(names), _AT_ONCE):
            some = names[start : start + _AT_ONCE]
            scores = self.judge_itself.judge([unknown[key] for key in some], progress=progress)
            for key, score in zip(some, scores, strict=True):
                known[key] = score
                if score.reason is not Reason.FAILED:
                    self._cache.put(key, self.name, score.to_json())
        return [known[key] for key in keys]

    def close(self) -> None:
        """Closes the file."""
        self._cache.close()

    def __enter__(self) -> KeptScores:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keys(self) -> _KeyOf:
        return _KeyOf(self.name, self.rubric.hash)


class _KeyOf:
    def __init__(self, judge: str, rubric: str) -> None:
        self._front = [_FORMAT, judge, rubric]

    def __call__(self, item: Exchange) -> str:
        return digest_of([*self._front, item.digest])
