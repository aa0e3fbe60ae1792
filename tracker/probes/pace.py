"""Which steps can be looked at, and when can gradients be taken anew, for what that may cost?

Two purses fill with a share of the training's own time and are emptied by what looking really costs, as the clock of
this process says. A step is read while the purse for reading is not in debt, so that of long steps every one is, and
of short ones one in so many.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

# Hooks are timed from within; torch takes about half as long again to call them.
CALLING = 1.5


class Purse:
    """Seconds that may be spent."""

    def __init__(self) -> None:
        self.held = 0.0
        self._last = 0.0

    def fill(self, seconds: float) -> None:
        """Earns; keeps no more than the last purchase cost, so that a pause is no reason for a burst."""
        self.held = min(self.held + seconds, self._last)

    def spend(self, seconds: float) -> None:
        """Pays, into debt where it must be."""
        self.held -= seconds
        self._last = seconds


class Pace:
    """Decides by what the last steps took. Without a share everything is affordable, and no clock is read.

    Args:
        share: of the training's own time, for reading and gradients together; half for either. None: no limit.
    """

    def __init__(self, share: float | None) -> None:
        self._share = share
        self._reading, self._refreshing = Purse(), Purse()
        self._began: float | None = None
        self._own = 0.0

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self._share is not None

    def begin(self) -> bool:
        """A step begins; whether it may be read."""
        if self._share is None:
            return True
        self._began, self._own = time.perf_counter(), 0.0
        return self._reading.held >= 0

    def end(self) -> None:
        """The step is over; what the loop does between steps earns nothing."""
        if self._share is not None and self._began is not None:
            earned = self._share / 2 * max(0.0, time.perf_counter() - self._began - self._own)
            self._reading.fill(earned)
            self._refreshing.fill(earned)
            self._began = None

    def may_refresh(self) -> bool:
        """Whether gradients may be taken anew; the first always may."""
        return self._share is None or self._refreshing.held >= 0

    def paid(self, seconds: float) -> None:
        """Reading took this long within the training's passes, without the calls."""
        if self._share is not None:
            self._pay(self._reading, seconds * CALLING)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The block belongs to reading."""
        started = time.perf_counter()
        yield
        if self._share is not None:
            self._pay(self._reading, time.perf_counter() - started)

    @contextmanager
    def refreshing(self) -> Iterator[None]:
        """The block takes gradients anew."""
        started = time.perf_counter()
        yield
        if self._share is not None:
            self._pay(self._refreshing, time.perf_counter() - started)

    def _pay(self, purse: Purse, seconds: float) -> None:
        purse.spend(seconds)
        self._own += seconds
