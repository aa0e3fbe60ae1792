"""How far has the model moved towards a persona when it is about to answer neutral questions?"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffing.errors import InputError, PromptError
from diffing.persona import PersonaVector
from diffing.persona.project import mean_interval
from diffing.prompts import PromptSet, TokenBatch, TokenizedPrompts
from diffing.tap import Tap
from tracker.probes.axes import SiteAxes, axes_digest, group_axes
from tracker.probes.base import RunningProbe, Subject
from tracker.probes.drift_direction import drift_reference, drift_signals, mean_shifts
from tracker.probes.reference import Reference
from tracker.schedule import Schedule
from tracker.signals import Alert, DriftSignal
from tracker.specificity import measure_specificity


@dataclass(frozen=True)
class PersonaPrompts:
    """Projection of the last prompt token on every persona, prompt by prompt against the start of the run.

    No token is generated: the activations at the place where the answer would begin are read, for all personas and
    layers in one forward pass that stops after the deepest one. Prompts are fixed, so each is its own control: the
    value is the mean over prompts of (now minus reference), in gaps of the vector, with a paired 95 % t interval.
    Positive: towards the trait.

    Attributes:
        vectors: the personas.
        prompts: neutral prompts; 64 or more make the interval narrow.
        schedule: when, None for the tracker's schedule.
        max_length: tokens a prompt may have.
        batch_tokens: tokens a forward pass, padding included.
        direction: also measure length and direction of the whole shift (`drift_signals`), in the same pass.
    """

    vectors: tuple[PersonaVector, ...]
    prompts: PromptSet
    schedule: Schedule | None = None
    max_length: int = 512
    batch_tokens: int = 8192
    direction: bool = False

    @property
    def name(self) -> str:
        """Fixed: a run has one."""
        return "persona_prompts"

    def start(self, subject: Subject) -> RunningPersonaPrompts:
        """Tokenises the prompts and measures the reference.

        Raises:
            PersonaError: a vector does not fit the model.
            PromptError: a prompt is longer than `max_length`, or cannot be rendered.
            InputError: the run has no tokenizer.
        """
        axes = group_axes(subject.model, self.vectors)
        tokens = tokenize_probes(subject, self.prompts, self.max_length)
        batches = tuple(tokens.batches(max_tokens=self.batch_tokens, device=device_of(subject.model)))
        digest = hashlib.sha256(f"{tokens.digest} {axes_digest(axes)}".encode()).hexdigest()
        tap = Tap(subject.model, [one.site.site for one in axes], early_exit=True)
        read = _Reader(tap, axes, batches, len(self.prompts.prompts))
        last = functools.cache(read.last)  # one pass serves both references
        reference = subject.reference(self.name, digest, lambda: {"gaps": read.gaps(last())})
        shifts = subject.reference("prompt_shifts", digest, lambda: drift_reference(last()))
        return RunningPersonaPrompts(read, reference, shifts, self.direction)


@dataclass(frozen=True, eq=False)
class _Reader:
    tap: Tap
    axes: tuple[SiteAxes, ...]
    batches: tuple[TokenBatch, ...]
    n_prompts: int

    def last(self) -> list[Float[Tensor, "prompt d_model"]]:
        """Activations of the last prompt token of every prompt, one tensor a site, on the site's device."""
        parts: list[list[Tensor]] = []
        order: list[int] = []
        with self.tap as tap:
            for batch in self.batches:
                last = torch.tensor(batch.lengths) - 1
                parts.append([last_activations(site, last).float() for site in tap.read(**batch.inputs())])
                order += batch.prompt_index
        places = torch.tensor(order).argsort()
        return [torch.cat(site)[places.to(site[0].device)] for site in zip(*parts, strict=True)]

    def gaps(self, sites: Sequence[Float[Tensor, "prompt d_model"]]) -> Float[Tensor, "prompt axis"]:
        """Projections in gaps; the origin is the model's own, so that only differences mean something."""
        columns = [(rows @ one.directions).cpu() for one, rows in zip(self.axes, sites, strict=True)]
        return torch.cat(columns, dim=1)


@dataclass(frozen=True, eq=False)
class RunningPersonaPrompts(RunningProbe):
    """The probe bound to a model.

    Attributes:
        reader: reads the prompts.
        reference: projections at the start of the run.
        shifts: mean activations at the start of the run.
        direction: whether length and direction of the whole shift are signals.
        held: the activations measured last, for an alert that they may raise.
    """

    reader: _Reader
    reference: Reference
    shifts: Reference
    direction: bool = False
    held: list[Float[Tensor, "prompt d_model"]] = field(default_factory=list)

    def measure(self, step: int) -> list[DriftSignal]:
        """Mean drift of every persona over prompts, and where it was asked for the shift's length and direction."""
        self.held[:] = self.reader.last()
        return self.signals(self.held, step)

    def evidence(self, alert: Alert) -> Mapping[str, Any]:
        """How the alert's drift compares with random directions and with other traits at the same place.

        Read from the activations that were measured last: no forward pass. Nothing for an alert on something else.
        """
        if not self.held:
            return {}
        moved = mean_shifts(self.held, self.shifts.tensors)
        for one, rows, shift in zip(self.reader.axes, self.held, moved, strict=True):
            places = [name.rpartition("/")[0] for name in one.names("prompt")]
            if alert.signal.rpartition("/")[0] in places:
                vector = one.vectors[places.index(alert.signal.rpartition("/")[0])]
                others = [other for other in one.vectors if other is not vector]
                return {"specificity": measure_specificity(shift, rows, vector, others).to_evidence()}
        return {}

    def signals(self, sites: Sequence[Float[Tensor, "prompt d_model"]], step: int) -> list[DriftSignal]:
        """What activations of the last prompt token, one tensor a site, say."""
        drift = (self.reader.gaps(sites).double() - self.reference.tensors["gaps"].double()).numpy()
        names = [name for one in self.reader.axes for name in one.names("prompt")]
        found = [
            paired_signal(name, drift[:, column], step, "gap", self.reference.label)
            for column, name in enumerate(names)
        ]
        if not self.direction:
            return found
        rows = [site.cpu() for site in sites]
        return found + drift_signals(self.reader.axes, rows, self.shifts.tensors, step, self.shifts.label)


def paired_signal(name: str, drift: object, step: int, unit: str, reference: str) -> DriftSignal:
    """One signal from paired differences: their mean with its 95 % t interval."""
    mean, low, high = mean_interval(drift)  # type: ignore[arg-type]
    return DriftSignal(name, mean, step, unit, low, high, len(drift), reference)  # type: ignore[arg-type]


def tokenize_probes(subject: Subject, prompts: PromptSet, max_length: int) -> TokenizedPrompts:
    """Renders probe prompts up to where the answer would begin.

    Raises:
        InputError: the run has no tokenizer.
        PromptError: a prompt would be cut: what comes last decides, and it would be lost.
    """
    if subject.tokenizer is None:
        raise InputError(
            "Expected a tokenizer for the probe prompts, got none. Give it to the Trainer as processing_class."
        )
    tokens = prompts.tokenize(subject.tokenizer, max_length=max_length, add_generation_prompt=True)
    if tokens.n_truncated:
        raise PromptError(
            f"Expected probe prompts of at most {max_length} tokens, got {tokens.n_truncated} longer. Shorten them."
        )
    return tokens


def device_of(model: nn.Module) -> torch.device:
    """Where token ids go: the device of the first parameter."""
    return next(model.parameters()).device


def last_activations(activations: Float[Tensor, "batch token d_model"], last: Tensor) -> Float[Tensor, "batch d_model"]:
    """Each row's activation at its own position `last`, `[batch]`."""
    rows = torch.arange(len(last), device=activations.device)
    return activations[rows, last.to(activations.device)]


def as_prompt_set(prompts: PromptSet | Sequence[str]) -> PromptSet:
    """Texts become one user turn each, so that they are rendered as the model meets questions."""
    if isinstance(prompts, PromptSet):
        return prompts
    return PromptSet.from_messages([[{"role": "user", "content": text}] for text in prompts])
