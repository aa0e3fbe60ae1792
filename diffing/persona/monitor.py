"""Does a model slip into a persona while it is writing, and what is done about it at that very token?

with PersonaMonitor(loaded, vectors, threshold, action="stop") as monitor:
    model.generate(**inputs, stopping_criteria=monitor.stopping())
print(monitor.readings)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import StoppingCriteria, StoppingCriteriaList

from diffing.checkpoint import LoadedCheckpoint
from diffing.edited_tokens import EditedTokens, backbone_of
from diffing.errors import ComparabilityError, InputError
from diffing.intervene import Intervention
from diffing.persona.monitor_threshold import MonitorThreshold, check_spread
from diffing.persona.steering import PersonaSteering
from diffing.persona.vector import PersonaVector
from diffing.site import resolve_site

ACTIONS = ("flag", "stop", "cap")


@dataclass(frozen=True)
class Reading:
    """What the monitor saw of one answer.

    Attributes:
        score: largest trailing mean so far, in standard deviations of plain answers; minus infinity before a token.
        flagged_at: number of the answer's token, from 0, at which the score first passed the threshold, or None.
        trait: the vector that gave the score.
        site: where.
        n_tokens: tokens of the answer that were read; its end mark, and a last token that nothing followed, are not.
    """

    score: float
    flagged_at: int | None
    trait: str
    site: str
    n_tokens: int


class PersonaMonitor:
    """Reads every token that `generate` writes on persona vectors, from the forward pass that is made anyway.

    Batches, left padding, sampling or greedy, with and without a cache; not beams, whose rows change places. Each
    generation inside the block starts anew; `readings` tells of the last one.

    Actions: `flag` only tells; `stop` ends a flagged row where `stopping()` is given to `generate`; `cap` keeps every
    answer token's projections at or below the threshold, so that a row may be flagged and still be held.

    Cost: a product [row, d_model] · [d_model, vectors at a site] a token and site. Nothing waits for the device unless
    rows are to be stopped.
    """

    def __init__(
        self,
        loaded: LoadedCheckpoint,
        vectors: Sequence[PersonaVector],
        threshold: MonitorThreshold,
        *,
        action: str = "flag",
        derived_from: str | None = None,
    ) -> None:
        """Checks that everything fits together.

        Args:
            loaded: the model.
            vectors: as they were calibrated, in that order.
            threshold: from `calibrate_monitor`.
            action: `flag`, `stop` or `cap`.
            derived_from: fingerprint of the checkpoint that a full fine-tune comes from.

        Raises:
            InputError: an unknown action.
            PersonaError: a vector does not fit the model.
            ComparabilityError: the threshold was calibrated for other vectors.
        """
        if action not in ACTIONS:
            raise InputError(f"Expected an action out of {', '.join(ACTIONS)}, got {action!r}. Use one of these.")
        if threshold.vectors != tuple(vector.digest for vector in vectors):
            raise ComparabilityError(
                f"Expected the {len(threshold.vectors)} vectors that the threshold was calibrated for, got "
                f"{len(vectors)} of which some differ. Calibrate with these, in this order."
            )
        check_spread(vectors)
        for vector in vectors:
            vector.check_fits(loaded, derived_from=derived_from)
        self.vectors, self.threshold, self.action = tuple(vectors), threshold, action
        self._model: nn.Module = loaded.model
        self._ends = torch.tensor(sorted(_end_marks(loaded)))
        self._silent = torch.tensor(sorted({*_end_marks(loaded), *loaded.tokenizer.all_special_ids}))
        self._tokens = EditedTokens(tokens="response")
        self._handles: list[RemovableHandle] = []
        self._cap: Intervention | None = None
        self._state: _State | None = None
        self._by_site = {site: [at for at, one in enumerate(vectors) if one.site == site] for site in _sites(vectors)}
        self._now: dict[str, Tensor] = {}
        self._asked = False

    def __enter__(self) -> PersonaMonitor:
        if self._handles:
            raise InputError("Expected a monitor to be opened once at a time, got it twice. Make a second one.")
        self._state, self._asked = None, False
        backbone = backbone_of(self._model)
        self._handles.append(self._tokens.attach(self._model))
        for site, numbers in self._by_site.items():
            module = resolve_site(self._model, site).module
            self._handles.append(module.register_forward_hook(self._reader(site, numbers)))
        self._handles.append(backbone.register_forward_hook(self._finish))
        if self.action == "cap":
            # After the readers, which then see what the model would have written.
            limit = self.threshold.value
            bounds = tuple(vector.neutral_mean + limit * vector.neutral_std for vector in self.vectors)
            capped = PersonaSteering(self.vectors, "cap", bounds=bounds, tokens="response")
            self._cap = Intervention(self._model, capped.edits(), tokens="response")
            self._cap.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._cap is not None:
            self._cap.__exit__(kind, error, trace)
            self._cap = None
        if kind is None and self.action == "stop" and not self._asked and any(self.flagged):
            raise InputError(
                "Expected generate to be given the monitor's stopping criteria, got an answer that should have been "
                "stopped and was not. Pass stopping_criteria=monitor.stopping()."
            )

    @property
    def readings(self) -> tuple[Reading, ...]:
        """What was seen of every row of the last generation; waits for the device."""
        return () if self._state is None else self._state.readings(self.vectors)

    @property
    def flagged(self) -> tuple[bool, ...]:
        """Which rows of the last generation passed the threshold."""
        return tuple(reading.flagged_at is not None for reading in self.readings)

    def stopping(self) -> StoppingCriteriaList:
        """For `generate(stopping_criteria=…)`: ends rows that are flagged, where the action is `stop`.

        `generate` pads ended rows only where it knows an end mark (`eos_token_id`); without one they write on until
        every row has ended.
        """
        return StoppingCriteriaList([_Stop(self)])

    def stopped(self, n_rows: int, device: torch.device) -> Bool[Tensor, " row"]:
        """Which rows `generate` is to end now."""
        self._asked = True
        if self._state is None or self.action != "stop" or len(self._state.flagged_at) != n_rows:
            return torch.zeros(n_rows, dtype=torch.bool, device=device)
        return (self._state.flagged_at >= 0).to(device)

    def _reader(self, site: str, numbers: Sequence[int]) -> Any:
        directions = torch.stack([self.vectors[number].direction for number in numbers], dim=1)
        means = torch.tensor([self.vectors[number].neutral_mean for number in numbers])
        spreads = torch.tensor([self.vectors[number].neutral_std for number in numbers])

        def read(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal directions, means, spreads
            value = output[0] if isinstance(output, tuple | list) else output
            if self._tokens.fresh:
                self._now = {}
                return
            if directions.device != value.device:
                directions, means, spreads = (one.to(value.device) for one in (directions, means, spreads))
            with torch.no_grad(), torch.autocast(value.device.type, enabled=False):
                self._now[site] = (value[:, -1].float() @ directions - means) / spreads

        return read

    def _finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        ids = self._tokens.input_ids
        if self._tokens.fresh or ids is None:
            self._state = None
            return
        if len(self._now) < len(self._by_site):
            return
        order = [number for numbers in self._by_site.values() for number in numbers]
        device = next(iter(self._now.values())).device
        values = torch.cat([one.to(device) for one in self._now.values()], dim=1)[:, torch.tensor(order).argsort()]
        self._now = {}
        if self._state is None:
            self._state = _State(len(values), values.shape[1], self.threshold, device)
        self._state.update(values, ids[:, -1].to(device), self._ends.to(device), self._silent.to(device))


class _State:
    """What is remembered of every row of one generation."""

    def __init__(self, n_rows: int, n_vectors: int, threshold: MonitorThreshold, device: torch.device) -> None:
        self._limit, self._window = threshold.value, threshold.window
        self._ring = torch.zeros(n_rows, self._window, n_vectors, device=device)
        self._best = torch.full((n_rows, n_vectors), -torch.inf, device=device)
        self._count = torch.zeros(n_rows, dtype=torch.long, device=device)
        self._ended = torch.zeros(n_rows, dtype=torch.bool, device=device)
        self.flagged_at = torch.full((n_rows,), -1, dtype=torch.long, device=device)

    @torch.no_grad()
    def update(
        self,
        values: Float[Tensor, "row vector"],
        token: Int[Tensor, " row"],
        ends: Int[Tensor, " mark"],
        silent: Int[Tensor, " special"],
    ) -> None:
        """Takes the projections of one more token of every row."""
        self._ended |= torch.isin(token, ends)
        counts = ~self._ended & ~torch.isin(token, silent)
        place = self._count % self._window
        rows = torch.arange(len(values), device=values.device)
        self._ring[rows, place] = torch.where(counts[:, None], values, self._ring[rows, place])
        self._count += counts
        mean = self._ring.sum(dim=1) / self._count.clamp(1, self._window)[:, None]
        self._best = torch.where(counts[:, None], torch.maximum(self._best, mean), self._best)
        first = (self._best.amax(dim=1) > self._limit) & (self.flagged_at < 0)
        self.flagged_at = torch.where(first, self._count - 1, self.flagged_at)

    def readings(self, vectors: Sequence[PersonaVector]) -> tuple[Reading, ...]:
        """In words."""
        scores, which = self._best.max(dim=1)
        return tuple(
            Reading(score, None if at < 0 else at, vectors[number].trait, vectors[number].site, n)
            for score, number, at, n in zip(
                scores.tolist(), which.tolist(), self.flagged_at.tolist(), self._count.tolist(), strict=True
            )
        )


class _Stop(StoppingCriteria):
    def __init__(self, monitor: PersonaMonitor) -> None:
        self._monitor = monitor

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        return self._monitor.stopped(len(input_ids), input_ids.device)


def _sites(vectors: Sequence[PersonaVector]) -> list[str]:
    return list(dict.fromkeys(vector.site for vector in vectors))


def _end_marks(loaded: LoadedCheckpoint) -> set[int]:
    own = getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)
    found = loaded.tokenizer.eos_token_id if own is None else own
    return set() if found is None else set(found if isinstance(found, list) else [found])
