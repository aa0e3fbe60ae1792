"""What does everything cost a training step when all of it is live at once?

The demo's model, data and LoRA, as in `benchmarks.overhead`: each batch is trained on twice in a row, tracked and with
every hook off, by turns, in CPU time of the training thread. Tracked means: personas in the batch, 60 probe prompts
and 16 canaries every 50 steps, weights, gradients, pushes of rows, a bank of 19 runs with the fused score, seven rules
(thresholds, e-detector, e-family, maximum over the run) and an alert for a receiver that does not answer.

What is rare comes when it comes (gradients of pushes anew at steps 64, 128, 200; all modules read from time to time),
so that sums of windows of 50 steps are compared and not medians. The first window has most of the rare work, five
fresh gradients among it, and is told apart. Parts are timed from within the same tracked steps.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.figure import Figure
from benchmarks.overhead import N_PROMPTS, TRAITS, Loop
from benchmarks.watched import HooksOff, random_personas
from cli.miniature.personas import canaries, neutral_probes
from diffing.persona import PersonaVector
from tracker.alarms.bank import NullBank
from tracker.alarms.run_series import RunSeries
from tracker.core import Tracker
from tracker.probes.live_push import LivePush
from tracker.probes.persona_prompts import as_prompt_set
from tracker.push_journal import PushJournal

WINDOW = 50
LIMIT = 5.0
BUDGET = 0.01
LOG_EVERY = 10
_RULES = """
receivers:
  nobody: {{webhook: "https://127.0.0.1:9/alerts", allow_private: ["127.0.0.1"]}}
rules:
  - {{name: drift, signal: "persona/*/prompt", detector: {{kind: effect_floor, floor: 0.25, unit: gap}}, for: 2,
     severity: critical, cooldown: 200, inhibited_by: [loss-diverged], notify: [nobody]}}
  - {{name: canary, signal: misalignment/canary, notify: [nobody],
     detector: {{kind: effect_floor, floor: 0.00001, unit: nats/token}}}}
  - {{name: score, signal: misalignment/score, detector: {{kind: max_over_run, bank: "{bank}", level: 0.05}}}}
  - {{name: family, signal: "persona/*/batch", detector: {{kind: e_family, level: 0.05, baseline: 10}}}}
  - {{name: loss-diverged, signal: train/loss, detector: non_finite, severity: critical}}
  - {{name: gradient-norm, signal: train/grad_norm, detector: {{kind: e_detector, average_run_length: 10000}}}}
  - {{name: tracker-silent, signal: "persona/*", detector: {{kind: silence, steps: 500}}}}
"""


@dataclass(eq=False)
class Parts:
    """CPU seconds of the training thread by part, counted from within."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def watch(self, tracker: Tracker) -> None:
        """Times what a tracker that has started does between the model's passes."""
        session = tracker._session
        assert session is not None
        for watched in session._watched:
            for name in ("begin_step", "before_update", "end_step", "measure"):
                part = "pushes, new gradients" if (watched.name, name) == ("live_push", "end_step") else watched.name
                self._time(watched.running, name, part)
        for name, part in (("_derived", "fused score"), ("_judge", "rules"), ("_record", "journal"), ("_wake", "news")):
            self._time(session.pipeline, name, part)

    def _time(self, owner: Any, name: str, part: str) -> None:
        call = getattr(owner, name)

        @functools.wraps(call)
        def timed(*arguments: Any) -> Any:
            started = time.thread_time()
            try:
                return call(*arguments)
            finally:
                self.seconds[part] += time.thread_time() - started

        object.__setattr__(owner, name, timed)

    def told(self, whole: float) -> str:
        """Every part in per cent of the untracked steps' time, the largest first."""
        shares = sorted(((100 * spent / whole, part) for part, spent in self.seconds.items()), reverse=True)
        return ", ".join(f"{part} {share:.2f}" for share, part in shares if share >= 0.005)


class LoggedLoop(Loop):
    """The loop of `overhead`, which also hands the tracker its optimizer's and its own figures, as the Trainer does."""

    def step(self, number: int, tracker: Tracker | None = None) -> float:
        """CPU seconds of one step of the thread that trains."""
        batch = self.batches[number % len(self.batches)]
        started = time.thread_time()
        if tracker is not None:
            tracker.begin_step()
        loss = self.model(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if tracker is not None:
            tracker.before_update()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if tracker is not None:
            due = number % LOG_EVERY == 0
            tracker.end_step(number, {"loss": float(loss), "grad_norm": float(norm)} if due else {})
        return time.thread_time() - started


@dataclass(frozen=True)
class Live:
    """One tracked run.

    Attributes:
        tracked: CPU seconds of tracked steps by window.
        untracked: of the same steps with every hook off.
        parts: what the time between the passes went to, after the first window.
        other_threads: CPU seconds of the other threads, after the first window.
        n_alerts: alerts raised.
    """

    tracked: np.ndarray
    untracked: np.ndarray
    parts: Parts
    other_threads: float
    n_alerts: int

    def percent(self, windows: Any = slice(1, None)) -> float:
        """Extra time in per cent."""
        return float(100 * (self.tracked[windows].sum() / self.untracked[windows].sum() - 1))

    def figures(self, name: str, limit: float | None) -> list[Figure]:
        """The extra time with the range that holds 95 % of resamplings of the windows, and that of the first one."""
        n = len(self.tracked) - 1
        draws = 1 + np.random.default_rng(0).integers(n, size=(500, n))
        low, high = np.quantile([self.percent(draw) for draw in draws], [0.025, 0.975])
        value, whole = self.percent(), float(self.untracked[1:].sum())
        note = f"between passes: {self.parts.told(whole)}; other threads {100 * self.other_threads / whole:.2f}"
        early = f"{1000 * self.untracked[0] / WINDOW:.0f} ms a step untracked; {self.n_alerts} alerts in the run"
        return [
            Figure(name, value, "%", float(low), float(high), n, "" if limit is None else f"<= {limit:g}",
                   None if limit is None else value <= limit, note),
            Figure(f"{name}, first {WINDOW} steps", self.percent([0]), "%", note=early),
        ]  # fmt: skip


def follow(loop: Loop, tracker: Tracker, windows: int) -> Live:
    """Trains tracked and untracked by turns."""
    times, parts = np.zeros((2, windows, WINDOW)), Parts()
    tracker.start(loop.model, loop.tokenizer, optimizer=loop.optimizer)
    off = HooksOff(loop.model)
    loop.step(0)
    beside = 0.0
    for number in range(1, windows * WINDOW + 1):
        if number == WINDOW + 1:
            parts.watch(tracker)
            beside = time.process_time() - time.thread_time()
        at = divmod(number - 1, WINDOW)
        for tracked in (True, False) if number % 2 else (False, True):
            if tracked:
                times[0][at] = loop.step(number, tracker)
                continue
            with off:
                times[1][at] = loop.step(number)
    beside = time.process_time() - time.thread_time() - beside
    session = tracker._session
    assert session is not None
    failed = [one for one in session.journal.failures() if not one.place.startswith("sink deliver")]
    assert not failed, failed
    n_alerts = len(session.journal.alerts())
    with suppress(Exception):
        tracker.end()
    return Live(times[0].sum(axis=1), times[1].sum(axis=1), parts, beside, n_alerts)


def run(windows: int = 6) -> list[Figure]:
    """One persona, as the demo watches, and seven; pushes of every step, and of as many as 1 % of the time allows."""
    torch.set_num_threads(1)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        for traits, layers in ((TRAITS[:1], (2,)), (TRAITS, (1, 2))):
            loop, at = LoggedLoop(), Path(folder) / str(len(traits))
            vectors = random_personas(loop.model, traits, layers)
            what = f"{len(traits)} persona(s) x {len(layers)} layer(s)"
            start: Callable[..., Tracker] = functools.partial(_tracker, vectors=vectors)
            probes = follow(loop, start(at / "probes", detectors=()), windows)
            figures += probes.figures(f"probes alone, {what}", None)
            bank = _bank(at, windows)
            rules = at / "rules.yaml"
            rules.write_text(_RULES.format(bank=bank))
            for budget in (None, BUDGET):
                pushes = LivePush(tuple(vectors), as_prompt_set(neutral_probes()[:N_PROMPTS]), budget=budget)
                run_dir = at / f"everything-{budget}"
                live = follow(loop, start(run_dir, bank=bank, rules=rules, probes=(pushes,)), windows)
                how = "pushes of every step" if budget is None else f"pushes within {100 * budget:g} %"
                figures += live.figures(f"everything live, {how}, {what}", LIMIT)
                n_read, n_steps = _read(run_dir)
                figures.append(Figure(f"steps read, {how}, {what}", 100 * n_read / n_steps, "%", n=n_steps))
    return figures


def _read(run_dir: Path) -> tuple[int, int]:
    """How many steps after the first window have pushes, and how many there were."""
    journal = PushJournal.read(run_dir)
    steps, last = journal.visits(journal.queries[0], since=WINDOW + 1).step, journal.last_step()
    return len(np.unique(steps)), last - WINDOW


def _bank(folder: Path, windows: int) -> Path:
    """Nineteen benign runs: the one with probes alone, each time a little larger."""
    run = RunSeries.from_run(folder / "probes")
    runs = []
    for place in range(19):
        series = {
            name: tuple(replace(one, value=one.value * (1 + place / 19)) for one in points)
            for name, points in run.series.items()
        }
        runs.append(replace(run, series=series, last_step=windows * WINDOW))
    NullBank.of(runs).save(folder / "bank")
    return folder / "bank"


def _tracker(folder: Path, *, vectors: Sequence[PersonaVector], **more: Any) -> Tracker:
    return Tracker(
        folder,
        personas=vectors,
        probe_prompts=neutral_probes()[:N_PROMPTS],
        canaries=canaries()[:16],
        schedule=f"every {WINDOW}",
        sinks=(),
        on_alert=(),
        derived_from="0" * 64,
        **more,
    )


if __name__ == "__main__":
    for one in run():
        print(one)
