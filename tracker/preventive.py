"""How is a training kept from taking up a persona: steered towards it while it trains, or with it taken out?

Steering towards a persona in the forward passes of training makes the training rows easy to say in its voice, so that
the weights need not learn the voice to fit them. It is left off in every other pass and in what is saved.

    CheckpointTracker("runs/tracked", intervention=PreventiveSteering(vectors, strength=1.5))

Source: preventative steering, Chen et al. 2025; ablation in training, Casademunt et al. 2025, here to the mean. Added:
all layers at once without counting a layer twice, schedules, answers only, a record, and a resume.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from diffing.edited_tokens import TOKENS
from diffing.errors import InputError
from diffing.persona import PersonaVector
from diffing.persona.steering import PersonaSteering, whole_changes
from tracker.events import InterventionChanged
from tracker.interventions import InterventionSpan
from tracker.training_edits import TrainingEdits

OPERATIONS = ("add", "ablate", "mean_ablate")
Strength = float | Sequence[tuple[int, float]]


@dataclass(frozen=True, eq=False)
class PreventiveSteering:
    """What is done to the activations of training passes, how strongly, and from when to when.

    Attributes:
        vectors: persona vectors or their files, of one model; several layers of one trait are not counted twice.
        operation: `add`, `mean_ablate` or `ablate`, as `PersonaSteering` says.
        strength: gaps for `add`, a share of 0..1 otherwise; or points (steps since it was switched on, strength),
            with straight lines between them and the ends held.
        tokens: `all` but padding, or `response`: what is learned and the token before it.
        incremental: whether a layer adds only what the layer below has not yet added.
        from_step: first optimizer step it acts on, counted in steps done before; None waits for `engage`.
        until_step: steps done at which it is switched off; None never.
    """

    vectors: tuple[PersonaVector | Path | str, ...]
    operation: str = "add"
    strength: Strength = 1.0
    tokens: str = "all"
    incremental: bool = True
    from_step: int | None = 0
    until_step: int | None = None

    def __post_init__(self) -> None:
        """Refuses what could not be done, whatever the model.

        Raises:
            InputError: an unknown operation or kind of tokens, no vectors, or a strength or steps out of range.
        """
        if not self.vectors or self.operation not in OPERATIONS or self.tokens not in TOKENS:
            raise InputError(
                f"Expected vectors, an operation of {', '.join(OPERATIONS)} and tokens of {', '.join(TOKENS)}, got "
                f"{len(self.vectors)} vectors, {self.operation!r} and {self.tokens!r}. Name one of these."
            )
        points = _points(self.strength)
        if [step for step, _ in points] != sorted({step for step, _ in points}) or not all(
            math.isfinite(value) for _, value in points
        ):
            raise InputError(
                f"Expected a finite strength, or points (step, strength) of ascending steps, got {self.strength!r}. "
                "Write for instance ((0, 2.0), (100, 1.0))."
            )
        if self.operation != "add" and not all(0 <= value <= 1 for _, value in points):
            raise InputError(
                f"Expected a strength of 0 to 1 for {self.operation}, the share that is taken out, got "
                f"{self.strength!r}. Use 1."
            )
        start = 0 if self.from_step is None else self.from_step
        if start < 0 or (self.until_step is not None and self.until_step <= start):
            raise InputError(
                f"Expected from_step of at least 0 and until_step above it, got {self.from_step} and "
                f"{self.until_step}. Mend one of them."
            )

    @property
    def name(self) -> str:
        """How the record calls it."""
        return "preventive steering" if self.operation == "add" else f"{self.operation.replace('_', '-')} in training"

    def loaded(self) -> PreventiveSteering:
        """The same with its vectors read from their files.

        Raises:
            PathMissingError: a file does not exist.
            PersonaError: a file is no persona vector, or two are of one trait and site or of different models.
        """
        vectors = tuple(one if isinstance(one, PersonaVector) else PersonaVector.load(one) for one in self.vectors)
        _steering(vectors, self)
        return replace(self, vectors=vectors)

    def at(self, steps: int) -> float:
        """The strength so many steps after it was switched on."""
        points = _points(self.strength)
        if steps <= points[0][0]:
            return points[0][1]
        for (left, low), (right, high) in itertools.pairwise(points):
            if steps < right:
                return low + (high - low) * (steps - left) / (right - left)
        return points[-1][1]

    def settings(self) -> dict[str, Any]:
        """JSON values for the record."""
        vectors = [one for one in self.vectors if isinstance(one, PersonaVector)]
        return {
            "operation": self.operation,
            "strength": self.strength if isinstance(self.strength, int | float) else [list(p) for p in self.strength],
            "tokens": self.tokens,
            "incremental": self.incremental,
            "vectors": [f"{vector.trait} {vector.site} {vector.digest[:12]}" for vector in vectors],
        }

    def start(
        self,
        model: nn.Module,
        *,
        record: Callable[[InterventionChanged], None] | None = None,
        earlier: Sequence[InterventionSpan] = (),
    ) -> RunningSteering:
        """Binds it to a model; nothing is changed until it is engaged and a step begins.

        Args:
            model: the module that is trained, unwrapped.
            record: told whenever it is switched on or off.
            earlier: what was done to the run before it was resumed here; it goes on as it was left.

        Raises:
            PersonaError: a vector does not fit the model.
        """
        settings = self.loaded()
        for vector in settings.vectors:
            assert isinstance(vector, PersonaVector)
            vector.check_fits(model)
        return RunningSteering(settings, model, record, earlier)


class RunningSteering:
    """Preventive steering bound to a model under training.

    Attributes:
        settings: what is done.
        engaged: whether the next training pass is steered.
        since: steps done when it was last engaged; None where it is off.
    """

    def __init__(
        self,
        settings: PreventiveSteering,
        model: nn.Module,
        record: Callable[[InterventionChanged], None] | None = None,
        earlier: Sequence[InterventionSpan] = (),
    ) -> None:
        self.settings = settings
        self.since = earlier[-1].start if earlier and earlier[-1].stop is None else None
        self._begun = bool(earlier)
        self._record = record or (lambda event: None)
        self._in_step = False
        vectors = tuple(one for one in settings.vectors if isinstance(one, PersonaVector))
        self._steering = _steering(vectors, settings)
        sites = [site for site, _ in whole_changes(self._steering, 1.0)]
        self._edits = TrainingEdits(model, sites, tokens=settings.tokens)

    @property
    def engaged(self) -> bool:  # noqa: D102  documented with the attributes
        return self.since is not None

    def engage(self, step: int, reason: str = "asked") -> None:
        """Steers from the next training pass on; `step` optimizer steps are done. Harmless when it is on."""
        if self.since is not None:
            return
        self.since, self._begun = step, True
        self._tell(step, reason)
        if self._in_step:
            self._open(step)

    def release(self, step: int, reason: str = "asked") -> None:
        """Steers no more; `step` optimizer steps are done. Harmless when it is off."""
        if self.since is None:
            return
        self.since = None
        self._edits.shut()
        self._tell(step, reason)

    def begin_step(self, step: int) -> None:
        """The passes of a training step follow; `step` optimizer steps are done. Does what is planned for it."""
        first, last = self.settings.from_step, self.settings.until_step
        if last is not None and step == last:
            self.release(step, "planned")
        elif not self._begun and first is not None and first <= step < (math.inf if last is None else last):
            self.engage(step, "planned")
        self._in_step = True
        self._open(step)

    def end_step(self) -> None:
        """The passes of the training step are over."""
        self._in_step = False
        self._edits.shut()

    def _open(self, step: int) -> None:
        strength = 0.0 if self.since is None else self.settings.at(step - self.since)
        if strength:
            self._edits.open([change for _, change in whole_changes(self._steering, strength)])

    def _tell(self, step: int, reason: str) -> None:
        settings = self.settings.settings()
        self._record(InterventionChanged(step, self.settings.name, self.engaged, settings, reason))

    def close(self) -> None:
        """Leaves no trace on the model. Harmless when repeated."""
        self.since = None
        self._edits.close()


def _points(strength: Strength) -> tuple[tuple[int, float], ...]:
    if isinstance(strength, int | float):
        return ((0, float(strength)),)
    return tuple((int(step), float(value)) for step, value in strength) or ((0, float("nan")),)


def _steering(vectors: tuple[PersonaVector, ...], settings: PreventiveSteering) -> PersonaSteering:
    return PersonaSteering(vectors, settings.operation, 1.0, settings.tokens, settings.incremental)
