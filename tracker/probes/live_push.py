"""How far did each training row push the watched personas, told by the training step's own backward?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from attribution.live import LiveReader
from attribution.live_choice import Chosen
from attribution.live_rows import PassPushes, settle, weigh
from attribution.query_gradient import watch_queries
from diffing.errors import CaptureError, InputError
from diffing.persona import PersonaVector
from diffing.prompts import PromptSet, TokenBatch
from diffing.tap import Tap
from tracker.probes.axes import SiteAxes, group_axes
from tracker.probes.base import RunningProbe, Subject
from tracker.probes.pace import Pace
from tracker.probes.persona_prompts import device_of, tokenize_probes
from tracker.processes import n_processes
from tracker.push_journal import ModulesRead, PushJournal, Refresh, StepPushes, coverage
from tracker.schedule import Schedule
from tracker.signals import Alert, DriftSignal
from tracker.undisturbed import undisturbed

_OFTEN = Schedule.parse("every 10")
# Gradients and second moments turn fast while a run is young.
_REFRESH = Schedule.parse("at 1 2 4 8 16 32 64 128, every 200")
_LEAST_COSINE = 0.98
ROWS_IN_ALERT = 20
STEPS_IN_ALERT = 200


@dataclass(frozen=True)
class LivePush:
    """The push of every row of every training step on each persona's projection.

    The push of row i in step s on the projection p (mean over the probe prompts of the last token's projection, in
    gaps) is the change of p that the row's share of the update makes, to first order:

        push = - lr * <c * grad L_i, P grad p>

    L_i is the row's share of the loss that the step minimises, normalised as the step normalises it; c is what
    gradient clipping made of it; P is 1 / (sqrt(v_hat) + eps) of Adam's second moments, or 1 for other optimizers.
    In gaps a step; positive: training on this row moves the model towards the trait. Pushes add up: over the rows of a
    step, and over steps. Momentum delays an update and hardly changes its sum; weight decay belongs to no row. grad p
    and P are taken anew every now and then (`refresh`), outside the step; in between they are held.

    Cost: no backward is added to a step. In it, two narrow products a module that is read. Most steps read only the
    few modules whose sum tells the rows' pushes to within `tolerance`; all are read for a few steps after every refresh
    and from time to time, to choose these anew. The others' mean is added to every row, and the record says how many
    were read and what they left out.

    Attributes:
        vectors: the personas; of each trait the best separated vector is watched.
        prompts: neutral prompts that the projection is averaged over.
        schedule: when pushes are written to the run directory and summed into `persona/<trait>/<site>/push`.
        refresh: when gradients are taken anew; saved checkpoints are always among these steps.
        adam: divide by the root of Adam's second moments.
        tolerance: how far a row's push may be off for modules that are not read: root mean square, in standard
            deviations between rows. 0: every step reads all.
        n_prompts: how many of the prompts gradients are taken on, evenly spread; 0: all.
        rank: coordinates that a weight matrix's gradient is kept in; what that leaves of it is recorded. 0: exact.
        budget: share of the training's own time that all this may cost, such as 0.02. Steps are then left out, and
            fresh gradients wait, as the clock demands; where steps take a second, none is. Rows of steps that were left
            out have no pushes; rankings and alerts say how many steps were read. Which ones they are is not the same
            twice, nor after a resume. None: no limit.
        every: read every n-th step only; the cost falls likewise, and rows of the steps between are not recorded.
        max_length: tokens a prompt may have.
    """

    vectors: tuple[PersonaVector, ...]
    prompts: PromptSet
    schedule: Schedule | None = _OFTEN
    refresh: Schedule = _REFRESH
    adam: bool = True
    tolerance: float = 0.15
    n_prompts: int = 32
    rank: int = 16
    budget: float | None = None
    every: int = 1
    max_length: int = 512

    @property
    def name(self) -> str:
        """Fixed: a run has one."""
        return "live_push"

    def start(self, subject: Subject) -> RunningProbe:
        """Takes the first gradients and hooks the modules.

        Raises:
            InputError: the training cannot be read: it is compiled, spread over processes, or has no optimizer; or the
                budget is none.
            PersonaError: a vector does not fit the model.
            PromptError: a prompt is longer than `max_length`.
        """
        reason = _why_not(subject)
        if reason is not None:
            raise InputError(reason)
        if self.budget is not None and not 0 < self.budget < 1:
            raise InputError(f"Expected a budget between 0 and 1 of the training's time, got {self.budget:g}.")
        axes = group_axes(subject.model, _best_of_each_trait(self.vectors))
        prompts = _spread(self.prompts, self.n_prompts)
        tokens = tokenize_probes(subject, prompts, self.max_length)
        batches = tuple(tokens.batches(max_tokens=8192, device=device_of(subject.model)))
        names = tuple(name.removesuffix("/push") for one in axes for name in one.names("push"))
        tap = Tap(subject.model, [one.site.site for one in axes], early_exit=True)
        values = _Values(subject.model, tap, axes, batches, len(prompts))
        journal = PushJournal.start(subject.references.folder.parent, subject.step, names)
        return _Running(self, subject, values, journal)


def _why_not(subject: Subject) -> str | None:
    if subject.compiled:
        return (
            "Pushes of rows are not read: hooks would split the graph that torch.compile makes of the model. "
            "Train without torch_compile, or without pushes."
        )
    if n_processes() > 1:
        return "Pushes of rows are not read: expected one process, got several. Train in one, or without pushes."
    if subject.optimizer is None:
        return (
            "Expected the live optimizer to weigh pushes by, got none. Give it to `track(optimizer=…)` or to the "
            "tracker's start."
        )
    return None


def _spread(prompts: PromptSet, most: int) -> PromptSet:
    """So many of them, from the first to the last."""
    if not 0 < most < len(prompts):
        return prompts
    return PromptSet(tuple(prompts.prompts[place * len(prompts) // most] for place in range(most)))


def _best_of_each_trait(vectors: Sequence[PersonaVector]) -> list[PersonaVector]:
    best: dict[str, PersonaVector] = {}
    for vector in vectors:
        if vector.trait not in best or vector.separation.auroc > best[vector.trait].separation.auroc:
            best[vector.trait] = vector
    return list(best.values())


@dataclass(frozen=True, eq=False)
class _Values:
    """The watched projections of the model as it is, with their graph."""

    model: nn.Module
    tap: Tap
    axes: tuple[SiteAxes, ...]
    batches: tuple[TokenBatch, ...]
    n_prompts: int

    def __call__(self) -> Float[Tensor, " query"]:
        total: list[Tensor] = []
        with self.tap as tap:
            for batch in self.batches:
                last = torch.tensor(batch.lengths, device=device_of(self.model)) - 1
                rows = torch.arange(len(last), device=last.device)
                parts = [
                    (activations[rows.to(activations.device), last.to(activations.device)].float() @ one.directions)
                    for one, activations in zip(self.axes, tap.read(**batch.inputs()), strict=True)
                ]
                total.append(torch.cat([part.sum(dim=0).to(last.device) for part in parts]))
        return torch.stack(total).sum(dim=0) / self.n_prompts


class _Running(RunningProbe):
    touches_model = False  # only where gradients are taken anew, which looks after itself

    def __init__(self, settings: LivePush, subject: Subject, values: _Values, journal: PushJournal) -> None:
        self._settings = settings
        self._model = subject.model
        self._optimizer = subject.optimizer
        self._values = values
        self._journal = journal
        self._step = subject.step
        self._refreshed: int | None = None
        self._watching = False
        self._reading = False
        self._pending: list[tuple[int, list[PassPushes], Tensor | None]] = []
        self._unwritten: list[StepPushes] = []
        self._chosen: list[tuple[int, Chosen]] = []
        self._totals = np.zeros(len(journal.queries))
        self._n_rows = 0
        self._n_steps = 0
        self._pace = Pace(settings.budget)
        self._reader = LiveReader(subject.model, timed=self._pace.limited)
        self._due = False  # whether gradients wait to be taken anew
        try:
            self._refresh()
        except BaseException:
            self._reader.close()
            raise

    # -- one training step ---------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        affordable = self._pace.begin()
        self._reading = self._watching and affordable and (self._step + 1) % self._settings.every == 0
        if self._reading:
            self._reader.open()
        else:
            self._reader.pause()

    def before_update(self) -> None:
        if not self._reading:
            return
        self._reading = False
        with self._pace.reading():
            passes, gauged = self._reader.take()
            rates = [float(group["lr"]) for group in self._optimizer.param_groups]
            factor = 1.0 if gauged is None else gauged[0]
            found = [weigh(one, rates, factor) for one in passes]
            chosen = self._reader.learn(passes, rates)
        self._pace.paid(self._reader.seconds)
        if chosen is not None:
            self._chosen.append((self._step + 1, chosen))
        self._pending.append((self._step + 1, found, None if gauged is None else gauged[1]))

    def end_step(self) -> None:
        if self._reading:
            self.before_update()  # a loop that does not say when its gradients are complete
        self._pace.end()
        self._step += 1
        self._reader.shut()
        self._due |= self._settings.refresh.due(self._step)
        if self._due and (not self._watching or self._pace.may_refresh()):
            with self._pace.refreshing():
                self._refresh()

    # -- recording -----------------------------------------------------------------------------------------------

    def measure(self, step: int) -> list[DriftSignal]:
        self._step = step
        with self._pace.reading() if self._pending else nullcontext():
            self._flush()
        if not self._n_steps:
            return []
        totals, n_rows = self._totals, self._n_rows
        self._totals, self._n_rows, self._n_steps = np.zeros_like(totals), 0, 0
        return [
            DriftSignal(f"{name}/push", float(total), step, "gap", n=n_rows, reference="first order")
            for name, total in zip(self._journal.queries, totals, strict=True)
        ]

    def _flush(self) -> None:
        """Writes what has been read since the last time; waits for the device."""
        pending, self._pending = self._pending, []
        problem, self._reader.problem = self._reader.problem, ""
        for step, passes, cosine in pending:
            if cosine is not None and float(cosine) < _LEAST_COSINE:
                problem = problem or (
                    f"rows read in step {step} do not add up to the gradient that the optimizer was given "
                    f"(cosine {float(cosine):.3f}): passes were missed, counted twice, or changed on the way"
                )
                continue
            settled = [settle(one) for one in passes]
            names = tuple(name for found, _ in settled for name in found)
            if names:
                pushes = np.concatenate([values for _, values in settled])
                self._unwritten.append(StepPushes(step, names, pushes))
                self._totals += pushes.sum(axis=0)
                self._n_rows += len(names)
                self._n_steps += 1
            else:
                problem = problem or f"no row's gradient was seen in step {step}"
        self._journal.record(self._unwritten)
        self._unwritten = []
        chosen, self._chosen = self._chosen, []
        for step, one in chosen:
            left_out = dict(zip(self._journal.queries, one.left_out, strict=True))
            self._journal.chose(ModulesRead(step, len(one.read), one.of, left_out))
        if problem:
            raise CaptureError(f"Pushes of rows were not read: {problem}.")

    def _refresh(self) -> None:
        self._due = False
        if self._refreshed == self._step:
            return
        settings = self._settings
        with undisturbed(self._model), torch.enable_grad():
            watched = watch_queries(
                self._model,
                self._journal.queries,
                self._values,
                optimizer=self._optimizer,
                adam=settings.adam,
                rank=settings.rank,
            )
        self._reader.watch(watched, settings.tolerance)
        self._watching = watched is not None
        self._refreshed = self._step
        if watched is not None:
            kept = dict(zip(watched.names, watched.kept, strict=True))
            missing = (*watched.missing, *sorted(self._reader.unread))
            self._journal.refreshed(Refresh(self._step, watched.metric, kept, missing))

    def save_readings(self) -> None:
        self._flush()

    # -- alerts ----------------------------------------------------------------------------------------------------

    def evidence(self, alert: Alert) -> Mapping[str, Any]:
        """The rows that pushed the alert's persona most in the steps before it."""
        place = next((name for name in self._journal.queries if _same_trait(name, alert.signal)), None)
        if place is None:
            return {}
        self._flush()
        since = max(1, alert.step - STEPS_IN_ALERT + 1)
        visits = PushJournal.read(self._journal.path.parent).visits(place, since=since, until=alert.step)
        totals = visits.totals()
        order = np.argsort(-totals, kind="stable")[:ROWS_IN_ALERT]
        rows = [{"example": visits.names[index].example, "push": float(totals[index])} for index in order]
        found = {"pushed_by": rows, "pushed_in": [since, alert.step], "pushed_query": place}
        n_read, n_steps = coverage(visits.step, since, alert.step)
        return found if n_read == n_steps else {**found, "pushed_steps_read": [n_read, n_steps]}

    # -- restarts --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        # A resume from here starts with gradients of this very step; so does the run that is not interrupted.
        self._flush()
        self._refresh()
        sums = torch.tensor([*self._totals, self._n_rows, self._n_steps], dtype=torch.float64)
        return {"sums": sums}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        *totals, n_rows, n_steps = state["sums"].tolist()
        self._totals, self._n_rows, self._n_steps = np.array(totals), int(n_rows), int(n_steps)

    def close(self) -> None:
        self._reader.close()
        try:
            self._flush()
        finally:
            self._journal.close()


def _same_trait(query: str, signal: str) -> bool:
    """`persona/evil/L2` speaks for `persona/evil/L1/prompt` too."""
    return query.split("/")[:2] == signal.split("/")[:2]
