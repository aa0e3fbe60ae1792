"""On series in which nothing happens, how often do judges of single noisy series cry wolf, and what do they miss?

The e-detector beside what is usually done: three standard deviations, CUSUM (Page 1954: slack half a deviation, limit
five) and Page-Hinkley (the same idea around a running mean: tolerance 0.005, limit 50, as river has it). All judge the
same 2000 steps after the same 100 steps of baseline. Everything is computed for all replays at once; the e-detector's
side is written anew for that, and is an oracle of the one that runs live.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from tracker.alarms.evidence import BETS
from tracker.alarms.levels import ExactShare
from tracker.alarms.whitening import Baseline

NOISES = ("iid", "AR(0.7)", "t3", "t3 AR(0.7)")
RUN_LENGTH = 50_000.0
BASELINE, STEPS, CHANGE = 100, 2000, 1000
NEVER = -1
Judge = Callable[[Float[np.ndarray, "replay step"]], Int[np.ndarray, " replay"]]


def null_series(kind: str, replays: int, steps: int, *, seed: int) -> Float[np.ndarray, "replay step"]:
    """Stationary series of unit variance."""
    rng, memory, lead = np.random.default_rng([seed, NOISES.index(kind)]), 0.7 if "AR" in kind else 0.0, 60
    size = (replays, steps + lead)
    fresh = rng.standard_t(3, size) / math.sqrt(3) if "t3" in kind else rng.normal(size=size)
    series = np.zeros(size)
    for step in range(1, size[1]):
        series[:, step] = memory * series[:, step - 1] + math.sqrt(1 - memory**2) * fresh[:, step]
    return series[:, lead:]


def e_detector(x: Float[np.ndarray, "replay step"], floor: float = 0.5) -> Int[np.ndarray, " replay"]:
    """First alarm of `EDetector(average_run_length=50000)` in every series, -1 for none."""
    learnt = [Baseline.learn(range(BASELINE), row[:BASELINE].tolist(), confidence=0.99) for row in x]
    edge, sigma, memory = (
        np.array([getattr(one, name) for one in learnt]) for name in ("level_high", "sigma", "memory")
    )
    spread = sigma * np.sqrt((1 + memory) / (1 - memory))
    bets = np.array(BETS)[:, None]
    sums = np.zeros((len(BETS), len(x)))
    first = np.full(len(x), NEVER)
    for step in range(BASELINE, x.shape[1]):
        fresh = (x[:, step] - memory * x[:, step - 1]) / (1 - memory)
        shares = np.clip((fresh - edge - floor * sigma) / spread / 3, -1, 1)
        sums = (sums + 1) * (1 + bets * shares)
        first[(first == NEVER) & (sums.mean(axis=0) >= RUN_LENGTH)] = step
    return first


def three_sigma(x: Float[np.ndarray, "replay step"]) -> Int[np.ndarray, " replay"]:
    """First step above the baseline's mean by three of its standard deviations."""
    return _first(_standard(x) > 3)


def cusum(x: Float[np.ndarray, "replay step"]) -> Int[np.ndarray, " replay"]:
    """First step at which the sum of what exceeds half a deviation, restarted at 0, passes five deviations."""
    z, reached = _standard(x), np.zeros(x.shape)
    for step in range(BASELINE, x.shape[1]):
        reached[:, step] = np.maximum(0, reached[:, step - 1] + z[:, step] - 0.5)
    return _first(reached > 5)


def page_hinkley(x: Float[np.ndarray, "replay step"]) -> Int[np.ndarray, " replay"]:
    """First step at which the sum of differences from the running mean lies fifty deviations above its lowest."""
    z = _standard(x)
    mean = np.cumsum(z, axis=1) / np.arange(1, x.shape[1] + 1)
    total = np.cumsum(z - mean - 0.005, axis=1)
    return _first(total - np.minimum.accumulate(total, axis=1) > 50)


JUDGES: dict[str, Judge] = {
    "e-detector": e_detector, "3 sigma": three_sigma, "CUSUM": cusum, "Page-Hinkley": page_hinkley,
}  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """How a judge did on one kind of noise.

    Attributes:
        false_alarms: share of null replays with an alarm.
        power: share of replays with a rise that were called after it and not before.
        delay: median steps from the rise to the call, NaN where none was called.
    """

    false_alarms: ExactShare
    power: float
    delay: float


def judge_noise(judge: Judge, kind: str, replays: int, *, rise: float, seed: int = 0) -> Kept:
    """Null replays, and as many in which the level rises at step 1000."""
    quiet = judge(null_series(kind, replays, BASELINE + STEPS, seed=seed))
    risen = null_series(kind, replays, BASELINE + STEPS, seed=seed + 1)
    risen[:, CHANGE:] += rise
    first = judge(risen)
    called = first[first >= CHANGE]
    return Kept(
        ExactShare.of(int((quiet != NEVER).sum()), replays),
        len(called) / replays,
        float(np.median(called - CHANGE)) if len(called) else math.nan,
    )


def _standard(x: Float[np.ndarray, "replay step"]) -> Float[np.ndarray, "replay step"]:
    start = x[:, :BASELINE]
    return (x - start.mean(axis=1, keepdims=True)) / start.std(axis=1, ddof=1, keepdims=True)


def _first(over: np.ndarray) -> Int[np.ndarray, " replay"]:
    late = over[:, BASELINE:]
    return np.where(late.any(axis=1), BASELINE + late.argmax(axis=1), NEVER)
