"""What has every sink that follows the journal from a thread of its own?"""

from __future__ import annotations

import threading

from tracker.sinks import RunInfo


class Follower:
    """Starts a thread with the run, wakes it for news, and waits for it at the end; what it does is `_work`'s."""

    name: str

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._news, self._closing = threading.Event(), threading.Event()

    def start(self, run: RunInfo) -> None:
        """Training is about to begin; what an earlier attempt left undone is done now."""
        self._news.set()
        self._closing.clear()
        self._thread = threading.Thread(target=self._work, args=(run,), name=self.name, daemon=True)
        self._thread.start()

    def wake(self, step: int) -> None:
        """The journal holds something new."""
        self._news.set()

    def close(self, timeout: float) -> None:
        """Finishes what is left, for at most so many seconds."""
        self._closing.set()
        self._news.set()
        if self._thread is not None:
            self._thread.join(timeout)
        self._thread = None

    def _work(self, run: RunInfo) -> None:
        """Follows the journal of this run until `_closing` is set; runs in the thread."""
        raise NotImplementedError
