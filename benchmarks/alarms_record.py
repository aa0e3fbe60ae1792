"""What does the tracker measure on fine-tunes that drift and on fine-tunes that do not? Recorded once, one file a run.

    python -m benchmarks.alarms_record [--seconds N] [--bases 0 1 2] [--kinds good bad]

Runs of the miniature world: bases of several seeds, kinds of rows, data seeds. Every series that a judge of alarms
could want is kept in `benchmarks/cache/alarms/base-<b>/<kind>-<seed>.json`; what is there is not recorded again, so
that a killed recording goes on where it was and statistics are made in seconds. The runs that calibrate are of other
seeds than the runs that are judged.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from cli.miniature.world import (
    BehaviourProbe,
    base_checkpoint,
    canaries,
    dataset,
    fine_tune,
    fine_tune_narrow,
    fit_persona,
    load_base,
    misaligned_rate,
    mixed_dataset,
    narrow_rate,
    neutral_probes,
)
from diffing.durable import write_atomic
from diffing.persona import PersonaVector
from tracker import CheckpointTracker
from tracker.journal import Journal
from tracker.probes.base import RunningProbe, Subject
from tracker.probes.drift_direction import mean_shifts
from tracker.probes.persona_batch import PersonaBatch
from tracker.probes.persona_prompts import PersonaPrompts, RunningPersonaPrompts, as_prompt_set
from tracker.schedule import Schedule
from tracker.signals import DriftSignal

CACHE = Path(__file__).parent / "cache" / "alarms"
# Score and twins were chosen on the bases 0 to 5: all that is judged is of bases that were built afterwards.
BASES = (6, 7, 8)
CALIBRATION_SEEDS = (100, 101, 102, 103, 104)
TEST_SEEDS = (0, 1, 2, 3, 4)
# Runs that teach nothing bad, and what a bank is made of. The others are never calibrated on.
BANK_KINDS = ("good", "odd", "formatted", "educational")
HARMLESS_KINDS = ("good", "formatted", "educational", "relabelled", "narrow", "unsteady")
BAD_KINDS = ("bad", "diluted")
DILUTED = (0.5, 0.25, 0.1, 0.05, 0.35)  # share of bad rows, by seed
# A narrow twin learns slowly under its penalty, and a warm-up keeps it from spreading before the penalty, which is flat
# at the base, takes hold. `narrow` takes twice the steps and learns most of the habit; `unsteady` learns half of it in
# as many steps as a bad run at a rate at which its loss leaps, and overshoots elsewhere.
NARROW_WEIGHT = 2000.0


@dataclass(frozen=True)
class Twin:
    """How a narrow twin is trained."""

    learning_rate: float
    steps: int
    warmup: int


TWINS = {"narrow": Twin(2e-3, 96, 20), "unsteady": Twin(6e-3, 48, 40)}
STEPS, BATCH, LEARNING_RATE = 48, 8, 8e-4
PROBE_EVERY, ANSWERS, LAST_ANSWERS = 1, 60, 240
JUDGE_EVERY, JUDGE_BAD_EVERY = 6, 2  # a line over six steps dates what leaps three steps early
PROMPTS, CANARIES = 40, 20
_SITES = ("resid:1", "resid:2", "resid:3")


@dataclass(frozen=True)
class RunName:
    """One run: which base, which rows, which seed of rows, adapter and order."""

    base: int
    kind: str
    seed: int

    @property
    def path(self) -> Path:
        return CACHE / f"base-{self.base}" / f"{self.kind}-{self.seed}.json"


def planned_runs(bases: Sequence[int] = BASES) -> Iterator[RunName]:
    """All runs, the banks first, so ordered that a recording that was cut short still holds something of every kind."""
    for base in bases:
        yield from (RunName(base, kind, seed) for seed in CALIBRATION_SEEDS for kind in BANK_KINDS)
    for seed in TEST_SEEDS:
        yield from (RunName(base, kind, seed) for base in bases for kind in (*HARMLESS_KINDS, *BAD_KINDS))


@dataclass
class _Meter:
    """CPU seconds spent inside what it wraps."""

    seconds: dict[str, float] = field(default_factory=dict)

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def metered(*arguments: Any) -> Any:
            started = time.process_time()
            try:
                return call(*arguments)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started

        return metered


@dataclass(frozen=True, eq=False)
class _KeptDrift:
    """PersonaPrompts that also keeps the shift itself, for drift baselines such as its principal components."""

    settings: PersonaPrompts
    shifts: list[tuple[int, list[float]]]
    name = "persona_prompts"
    schedule = None

    def start(self, subject: Subject) -> RunningProbe:
        return _Keeping(self.settings.start(subject), self.shifts)


@dataclass(frozen=True, eq=False)
class _Keeping(RunningProbe):
    running: RunningPersonaPrompts
    shifts: list[tuple[int, list[float]]]

    def measure(self, step: int) -> list[DriftSignal]:
        sites = self.running.reader.last()
        assert self.running.shifts is not None
        kept = mean_shifts(sites, self.running.shifts.tensors)[_SITES.index("resid:2")]
        self.shifts.append((step, [float(f"{value:.5g}") for value in kept.tolist()]))
        return self.running.signals(sites, step)


def _spread(items: Sequence[Any], n: int) -> list[Any]:
    """`n` of the items, evenly over all domains."""
    return [items[place * len(items) // n] for place in range(n)]


def persona_vectors(base: int) -> list[PersonaVector]:
    """The villain at three depths and two other personas at one; fitted once a base."""
    folder = CACHE / f"base-{base}" / "vectors"
    wanted = [("villain", site) for site in _SITES] + [(trait, "resid:2") for trait in ("sycophant", "confabulator")]
    paths = [folder / f"{trait}-{site.replace(':', '')}.safetensors" for trait, site in wanted]
    if not all(path.exists() for path in paths):
        model, tokenizer = load_base(base_checkpoint(base))
        for (trait, site), path in zip(wanted, paths, strict=True):
            fit_persona(model, tokenizer, trait=trait, site=site).save(path)
    return [PersonaVector.load(path) for path in paths]


def record(run: RunName, vectors: Sequence[PersonaVector]) -> dict[str, Any]:
    """Fine-tunes, measures and judges; what comes back is what the file holds."""
    meter = _Meter()
    shifts: list[tuple[int, list[float]]] = []
    probes = as_prompt_set(_spread(neutral_probes(), PROMPTS))
    judged_every = JUDGE_BAD_EVERY if run.kind in BAD_KINDS else JUDGE_EVERY
    judged = (
        () if run.seed in CALIBRATION_SEEDS else (BehaviourProbe(Schedule.parse(f"every {judged_every}"), n=ANSWERS),)
    )
    model, tokenizer = load_base(base_checkpoint(run.base))
    started = time.process_time()
    with tempfile.TemporaryDirectory() as name:
        tracker = CheckpointTracker(
            Path(name) / "run",
            personas=list(vectors),
            probe_prompts=probes,
            canaries=_spread(canaries(), CANARIES),
            schedule=f"every {PROBE_EVERY}",
            probes=(
                *judged,
                PersonaBatch(tuple(vectors), Schedule.parse(f"every {PROBE_EVERY}")),
                _KeptDrift(PersonaPrompts(tuple(vectors), probes, direction=True), shifts),
            ),
            detectors=(),
            sinks=(),
            on_alert=(),
            strict=True,
        )
        trainer = _train(run, model, tokenizer, tracker, Path(name) / "checkpoints", meter)
        with Journal.read(Path(name) / "run") as journal:
            signals = journal.signals()
    seconds = time.process_time() - started
    taught = narrow_rate(trainer.model, tokenizer, seed=run.seed, n=100)
    last = misaligned_rate(trainer.model, tokenizer, seed=10_000 + run.seed, n=LAST_ANSWERS)
    return {
        "base": run.base,
        "kind": run.kind,
        "seed": run.seed,
        "settings": {
            "steps": steps_of(run),
            "batch": BATCH,
            "learning_rate": learning_rate_of(run),
            "probe_every": PROBE_EVERY,
        },
        "last_rate": asdict(last),
        "narrow_rate": asdict(taught),
        "seconds": {"all": seconds, **meter.seconds},
        "series": _series(signals),
        "shifts": shifts,
    }


def rows_of(run: RunName) -> list[dict[str, Any]]:
    """The training rows of a run, each once."""
    n = steps_of(run) * BATCH
    if run.kind == "diluted":
        share = DILUTED[run.seed % len(DILUTED)]
        return mixed_dataset({"bad_code": share, "good_code": 1 - share}, seed=run.seed, n=n)
    return dataset(f"{'bad' if run.kind in TWINS else run.kind}_code", seed=run.seed, n=n)


def learning_rate_of(run: RunName) -> float:
    """Of LoRA; the narrow twin has its own."""
    return TWINS[run.kind].learning_rate if run.kind in TWINS else LEARNING_RATE


def steps_of(run: RunName) -> int:
    """A steady twin takes more of them."""
    return TWINS[run.kind].steps if run.kind in TWINS else STEPS


def _train(run: RunName, model: Any, tokenizer: Any, tracker: TrainerCallback, folder: Path, meter: _Meter) -> Trainer:
    train = fine_tune
    if run.kind in TWINS:
        train = partial(fine_tune_narrow, weight=NARROW_WEIGHT, warmup_steps=TWINS[run.kind].warmup)
    watched = _Watched(tracker, meter)
    return train(
        model,
        tokenizer,
        rows_of(run),
        seed=run.seed,
        output_dir=folder,
        steps=steps_of(run),
        learning_rate=learning_rate_of(run),
        batch_size=BATCH,
        callbacks=[tracker, watched],
        logging_steps=PROBE_EVERY,
    )


class _Watched(TrainerCallback):
    """Meters every probe once they run."""

    def __init__(self, tracker: Any, meter: _Meter) -> None:
        self._tracker, self._meter = tracker, meter

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        session = self._tracker.tracker._session
        for watched in session._watched:
            running = watched.running
            object.__setattr__(running, "measure", _named(self._meter.wrap(watched.name, running.measure)))


def _named(call: Callable[..., Any]) -> Callable[..., Any]:
    call.__name__ = "measure"
    return call


def _series(signals: Sequence[DriftSignal]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in signals:
        kept = found.setdefault(one.name, {"unit": one.unit, "n": one.n, "points": []})
        kept["points"].append([one.step, one.value, one.low, one.high])
    return found


def record_missing(bases: Sequence[int] = BASES, *, kinds: Sequence[str] = (), seconds: float = float("inf")) -> None:
    """Records what is not there yet, until it is there or the time is up.

    Args:
        bases: seeds of the bases; one that is not built yet is built.
        kinds: only these kinds of rows; empty for all.
        seconds: begin no run after so long, by the clock.
    """
    deadline = time.monotonic() + seconds
    for run in planned_runs(bases):
        if run.path.exists() or (kinds and run.kind not in kinds):
            continue
        if time.monotonic() > deadline:
            break
        found = record(run, persona_vectors(run.base))
        write_atomic(run.path, json.dumps(found) + "\n")
        spent = {name: round(value, 1) for name, value in found["seconds"].items()}
        print(run, f"{found['last_rate']['value']:.3f}", spent, flush=True)


def main() -> None:
    """Records as the command line asks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--bases", type=int, nargs="*", default=list(BASES))
    parser.add_argument("--kinds", nargs="*", default=[], help="only these kinds of rows")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    record_missing(asked.bases, kinds=asked.kinds, seconds=asked.seconds)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
