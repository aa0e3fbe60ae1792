"""What does Prometheus see of a run? A text file that its node exporter collects, or a page on this machine."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffing.errors import InputError
from tracker.alert_life import incidents
from tracker.delivery.follower import Follower
from tracker.journal import Journal, JournalError
from tracker.sinks import RunInfo

_log = logging.getLogger(__name__)
_NAME = "prometheus"


class PrometheusSink(Follower):
    """Keeps Prometheus metrics of the run up to date: newest value of every signal, alerts by state, failures, step.

    `palimpsest_last_record_timestamp_seconds` is when something was last recorded: a rule on its age, on Prometheus'
    side, notices a run that died.

    Args:
        path: text file to rewrite, for the node exporter's textfile collector (its name must end in `.prom`). None:
            `metrics.prom` in the run directory.
        port: serve the metrics on this port of this machine as well; None for no server.

    Raises:
        InputError: prometheus_client is not installed.
    """

    name = _NAME

    def __init__(self, path: Path | str | None = None, port: int | None = None) -> None:
        if importlib.util.find_spec("prometheus_client") is None:
            raise InputError("Expected prometheus_client, it is not installed. pip install 'palimpsest[alerts]'.")
        super().__init__()
        self.path = None if path is None else Path(path)
        self.port = port

    def __deepcopy__(self, memo: Mapping[int, Any]) -> PrometheusSink:
        return PrometheusSink(self.path, self.port)

    def _work(self, run: RunInfo) -> None:
        server: Any = None
        path = self.path or run.run_dir / "metrics.prom"
        try:
            metrics = _Metrics(run.name or run.run_dir.name)
            if self.port is not None:
                from prometheus_client import start_http_server

                server, _ = start_http_server(self.port, addr="127.0.0.1", registry=metrics.registry)
            with Journal.read(run.run_dir) as journal:
                while True:
                    self._news.wait()
                    self._news.clear()
                    closing = self._closing.is_set()
                    metrics.read(journal)
                    metrics.write(path)
                    if closing:
                        return
                    self._closing.wait(1.0)  # a burst of measurements is one file
        except (JournalError, OSError) as error:
            _log.warning("Prometheus sees nothing of this run: %s", error)
        finally:
            if server is not None:
                server.shutdown()
                server.server_close()


class _Metrics:
    def __init__(self, run: str) -> None:
        from prometheus_client import CollectorRegistry, Gauge

        self.registry = CollectorRegistry()
        self._run = run

        def gauge(name: str, said: str, *labels: str) -> Any:
            return Gauge(f"palimpsest_{name}", said, ("run", *labels), registry=self.registry)

        self._signal = gauge("signal", "Newest value of a signal.", "signal", "unit")
        self._step = gauge("step", "Optimizer steps done at the newest measurement.")
        self._alerts = gauge("alerts", "Incidents of a rule by state.", "rule", "severity", "state")
        self._failures = gauge("failures", "Failures that were caught while tracking.")
        self._last = gauge("last_record_timestamp_seconds", "When something was last recorded.")

    def read(self, journal: Journal) -> None:
        """Takes the newest of everything."""
        step = 0
        for entry in journal.latest(1 << 60):
            signal: Any = entry.item
            self._signal.labels(self._run, signal.name, signal.unit).set(signal.value)
            step = max(step, signal.step)
        self._step.labels(self._run).set(step)
        counted: dict[tuple[str, str, str], int] = {}
        for one in incidents(journal.alerts(), journal.events()):
            severity = one.alerts[-1].severity if one.alerts else "warning"
            place = (one.rule, severity, "muted" if one.muted else one.state)
            counted[place] = counted.get(place, 0) + 1
        self._alerts.clear()
        for place, count in counted.items():
            self._alerts.labels(self._run, *place).set(count)
        self._failures.labels(self._run).set(sum(failure.count for failure in journal.failures()))
        last = journal.last_ms()
        if last is not None:
            self._last.labels(self._run).set(last / 1000)

    def write(self, path: Path) -> None:
        """Rewrites the file at once."""
        from prometheus_client import write_to_textfile

        write_to_textfile(str(path), self.registry)
