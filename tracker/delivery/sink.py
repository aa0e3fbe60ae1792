"""How does every alert reach a receiver once, though the receiver is down, the run is killed, or is resumed?

A thread drains the journal; the training thread only sets an event. What could not be sent stays in the journal's
outbox and is sent when the receiver is back, by a later attempt at the run, or by `palimpsest sync RUN_DIR`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tracker.alert_life import RESOLVED, is_muted, mark_of, rule_name
from tracker.delivery.follower import Follower
from tracker.delivery.message import Message, firing, resolved
from tracker.delivery.receivers import Outcome, Receiver
from tracker.events import AlertChanged
from tracker.journal import Journal, JournalError
from tracker.journal_rows import OutboxEntry
from tracker.signals import Alert
from tracker.sinks import RunInfo

_log = logging.getLogger(__name__)
_KEPT = 500  # ids that are remembered as told


class DeliverySink(Follower):
    """Tells one receiver of the alerts that concern it; a sink like any other.

    An alert is told once: not again after a resume, and not while its incident was told of and is still open. Muted
    alerts are not told.

    Args:
        receiver: who is told.
        rules: names of the rules that it is told of; None for all alerts.
        timeout: seconds for one try.
        tries: at a stretch, with growing pauses; then once a minute.
        first_pause: seconds after the first failure; doubled at each further one up to a minute.
    """

    def __init__(
        self,
        receiver: Receiver,
        rules: frozenset[str] | None = None,
        *,
        timeout: float = 10.0,
        tries: int = 5,
        first_pause: float = 1.0,
    ) -> None:
        super().__init__()
        self.receiver = receiver
        self.rules = rules
        self.name = f"deliver:{receiver.name}"
        self._timeout, self._tries, self._first_pause = timeout, tries, first_pause

    def __deepcopy__(self, memo: Mapping[int, Any]) -> DeliverySink:
        return DeliverySink(
            self.receiver, self.rules, timeout=self._timeout, tries=self._tries, first_pause=self._first_pause
        )

    def drain(self, run_dir: Path, name: str = "") -> Drained:
        """Sends what is pending, each message tried once; for use after the run.

        Args:
            run_dir: the run directory.
            name: of the run, as people are told it.
        """
        with Journal.attach(run_dir) as journal:
            return _Outbox(journal, self, name or run_dir.resolve().name).drain()

    def _work(self, run: RunInfo) -> None:
        try:
            with Journal.attach(run.run_dir) as journal:
                self._serve(_Outbox(journal, self, run.name or run.run_dir.name), journal)
        except JournalError as error:
            _log.warning("Receiver %s is not told of alerts: %s", self.receiver.name, error)

    def _serve(self, outbox: _Outbox, journal: Journal) -> None:
        failures, given_up = 0, False
        while True:
            closing = self._closing.is_set()
            self._news.clear()
            drained = Drained() if given_up else outbox.drain()
            if drained.failed is None:
                failures = 0
            else:
                failures += 1
                journal.record_failure(f"sink {self.name}", drained.step, drained.failed.reason)
                given_up = not drained.failed.retry
            if closing:
                return
            pause = None if not failures else min(60.0, self._first_pause * 2 ** min(failures - 1, self._tries))
            self._wait(pause)

    def _wait(self, pause: float | None) -> None:
        if pause is None:
            self._news.wait()
        else:
            # News of a further alert is no reason to try a dead receiver sooner; the end of the run is.
            self._closing.wait(pause)


class Drained:
    """What draining came to.

    Attributes:
        sent: messages that were sent.
        failed: how the last try failed; None where nothing is left.
        step: of the message that failed.
    """

    def __init__(self, sent: int = 0, failed: Outcome | None = None, step: int = -1) -> None:
        self.sent, self.failed, self.step = sent, failed, step


class _Outbox:
    """What one receiver has not been told yet, and what it has."""

    def __init__(self, journal: Journal, sink: DeliverySink, run: str) -> None:
        self._journal, self._sink, self._run = journal, sink, run

    def drain(self) -> Drained:
        sent = 0
        while entries := self._journal.pending(self._sink.name, limit=200):
            for entry in entries:
                message = self._message(entry)
                if message is None:
                    continue
                outcome = self._sink.receiver.send(message, self._sink._timeout)
                if not outcome.sent:
                    self._journal.acknowledge(self._sink.name, entry.id - 1)
                    return Drained(sent, outcome, getattr(entry.item, "step", -1))
                sent += 1
                self._remember(message, entry)
            self._journal.acknowledge(self._sink.name, entries[-1].id)
        return Drained(sent)

    def _message(self, entry: OutboxEntry) -> Message | None:
        told = self._told()
        item = entry.item
        if isinstance(item, Alert):
            wanted = self._sink.rules is None or rule_name(item) in self._sink.rules
            if not wanted or is_muted(item) or item.id in told["ids"] or told["open"].get(mark_of(item)):
                return None
            return firing(item, self._run)
        if isinstance(item, AlertChanged) and item.state == RESOLVED:
            open_ = told["open"].get(item.fingerprint)
            alert = next((one for one in self._journal.alerts() if one.id == open_), None)
            return None if alert is None else resolved(item, alert, self._run)
        return None

    def _told(self) -> dict[str, Any]:
        state = self._journal.sink_state(self._sink.name)
        return {"ids": state.get("ids", []), "open": state.get("open", {})}

    def _remember(self, message: Message, entry: OutboxEntry) -> None:
        told = self._told()
        mark = message.facts["fingerprint"]
        open_ = {name: value for name, value in told["open"].items() if name != mark}
        # Only a named rule says when its incident is over; without, every alert is told.
        if message.status == "firing" and isinstance(entry.item, Alert) and "fingerprint" in entry.item.evidence:
            open_[mark] = entry.item.id
        ids = [*told["ids"], message.id][-_KEPT:]
        self._journal.remember(self._sink.name, ids=ids, open=open_, told_ms=time.time_ns() // 1_000_000)
