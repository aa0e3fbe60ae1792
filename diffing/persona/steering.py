"""What does a model answer when its activations are moved along persona vectors, or kept from moving?

Strengths are in gaps: 1 moves an activation by the distance between the mean plain and the mean trait answer of the
extraction, in the direction of the trait; negative strengths move away from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from diffing.answers import Answer, AnswerSettings, answer_prompts
from diffing.checkpoint import LoadedCheckpoint
from diffing.edited_tokens import TOKENS
from diffing.errors import InputError, PersonaError
from diffing.intervene import Ablate, Add, Cap, Change, Edit, Intervention, Partly
from diffing.persona.vector import PersonaVector
from diffing.prompts import PromptSet
from diffing.site import Site

OPERATIONS = ("add", "ablate", "mean_ablate", "cap")


@dataclass(frozen=True, eq=False)
class PersonaSteering:
    """What is done to activations along persona vectors, at their own sites.

    - `add`: adds strength · gap. Of several vectors of one trait along the residual stream each adds only what the one
      below it has not yet added (`incremental`), so that every layer is moved by its own gap, once.
    - `ablate`: takes the component along the vectors out. The residual stream has no origin, so zero is not neutral;
    - `mean_ablate`: sets the projections to those of the mean plain answer of the extraction.
    - `cap`: keeps the projection at or below a bound, and touches nothing below it. Bounds come from `cap_bounds`.

    Vectors at one site are ablated together, as their span.

    Attributes:
        vectors: of one model.
        operation: one of `OPERATIONS`.
        strength: gaps for `add`; for the others the share of the way that is gone, 0..1.
        tokens: `response` from the token on which the answer's first one is chosen, `all` the prompt as well.
        incremental: see `add`.
        bounds: raw projection for each vector, where `cap` keeps it; empty otherwise.
        floor: for `cap`, bounds are the least instead of the most that is allowed.
    """

    vectors: tuple[PersonaVector, ...]
    operation: str = "add"
    strength: float = 1.0
    tokens: str = "response"
    incremental: bool = True
    bounds: tuple[float, ...] = ()
    floor: bool = False

    def __post_init__(self) -> None:
        """Refuses what could not be applied.

        Raises:
            InputError: an unknown operation or kind of tokens, no vectors, or bounds that do not go with them.
            PersonaError: two vectors of one trait at one site, or vectors of different models.
        """
        if not self.vectors or self.operation not in OPERATIONS or self.tokens not in TOKENS:
            raise InputError(
                f"Expected vectors, an operation of {', '.join(OPERATIONS)} and tokens of {', '.join(TOKENS)}, got "
                f"{len(self.vectors)} vectors, {self.operation!r} and {self.tokens!r}. Name one of these."
            )
        if self.operation != "add" and not 0 <= self.strength <= 1:
            raise InputError(
                f"Expected a strength of 0 to 1 for {self.operation}, the share that is taken out, got "
                f"{self.strength:g}. Use `add` to go further."
            )
        if len(self.bounds) != (len(self.vectors) if self.operation == "cap" else 0):
            raise InputError(
                f"Expected a bound for each of {len(self.vectors)} vectors where the operation is cap, and none "
                f"otherwise; got {len(self.bounds)} for {self.operation}. Take them from cap_bounds."
            )
        places = [(vector.trait, vector.site) for vector in self.vectors]
        if len(set(places)) < len(places):
            raise PersonaError("Expected one vector a trait and site, got two of one. Leave one out.")
        if len({vector.model_fingerprint for vector in self.vectors}) > 1:
            raise PersonaError("Expected vectors of one model, got vectors of several. Extract them on one model.")

    def at(self, strength: float) -> PersonaSteering:
        """The same at another strength."""
        return replace(self, strength=strength)

    def edits(self) -> list[Edit]:
        """What `Intervention` is to do; empty at strength 0."""
        if self.strength == 0:
            return []
        return [Edit(site, change) for site, change in whole_changes(self, self.strength)]

    def intervention(self, loaded: LoadedCheckpoint) -> Intervention:
        """For a `with` block in which the model answers so; `generate` with left padding, any batch size."""
        return Intervention(loaded.model, self.edits(), tokens=self.tokens)

    def __repr__(self) -> str:
        names = ", ".join(f"{vector.trait} {vector.site}" for vector in self.vectors)
        return f"PersonaSteering({self.operation} {self.strength:+g} of {names}, {self.tokens} tokens)"


def whole_changes(steering: PersonaSteering, strength: float) -> list[tuple[str, Change]]:
    """The change at each site, in order of depth, at some strength.

    Args:
        steering: what to do; its own strength is not read.
        strength: gaps or a share, as there.
    """
    if steering.operation == "add":
        return [(site, Add(strength * moved)) for site, moved in added_vectors(steering)]
    by_site: dict[str, list[int]] = {}
    for number, vector in enumerate(steering.vectors):
        by_site.setdefault(vector.site, []).append(number)
    found: list[tuple[str, Change]] = []
    for site in sorted(by_site, key=_depth):
        for change in _removals(steering, by_site[site]):
            found.append((site, change if strength == 1 else Partly(change, strength)))
    return found


def added_vectors(steering: PersonaSteering) -> list[tuple[str, Float[Tensor, " d_model"]]]:
    """What a strength of 1 adds at each site, in order of depth; vectors of different traits at one site add up."""
    total: dict[str, Tensor] = {}
    for trait in dict.fromkeys(vector.trait for vector in steering.vectors):
        own = sorted((vector for vector in steering.vectors if vector.trait == trait), key=lambda one: _depth(one.site))
        below = torch.zeros_like(own[0].direction)
        for vector in own:
            gap = vector.scale * vector.direction
            along = steering.incremental and Site.parse(vector.site).stream == "resid"
            total[vector.site] = total.get(vector.site, torch.zeros_like(gap)) + (gap - below if along else gap)
            below = gap if along else below
    return sorted(total.items(), key=lambda pair: _depth(pair[0]))


def _removals(steering: PersonaSteering, numbers: Sequence[int]) -> list[Change]:
    vectors = [steering.vectors[number] for number in numbers]
    if steering.operation == "cap":
        bounds = [steering.bounds[number] for number in numbers]
        return [
            Cap(vector.direction, least=bound) if steering.floor else Cap(vector.direction, most=bound)
            for vector, bound in zip(vectors, bounds, strict=True)
        ]
    directions = torch.stack([vector.direction for vector in vectors])
    if steering.operation == "ablate":
        return [Ablate(directions)]
    means = torch.tensor([vector.neutral_mean for vector in vectors])
    # Any activation with these projections will do, since only its component along the span is used.
    return [Ablate(directions, (torch.linalg.pinv(directions.double()) @ means.double()).float())]


def steered_answers(
    loaded: LoadedCheckpoint,
    prompts: PromptSet,
    steering: PersonaSteering | None,
    settings: AnswerSettings | None = None,
    *,
    derived_from: str | None = None,
    max_length: int = 4096,
    progress: bool = False,
) -> tuple[Answer, ...]:
    """What a model answers while it is steered; the same noise with and without, so that differences are its doing.

    Args:
        loaded: the model; left as it was.
        prompts: conversations that end where the assistant speaks, or texts to go on with.
        steering: what is done; None for the model as it is.
        settings: how answers are drawn.
        derived_from: fingerprint of the checkpoint that a full fine-tune comes from.
        max_length: most tokens of a prompt.
        progress: shows a bar on a terminal.

    Raises:
        PersonaError: a vector does not fit the model.
        InputError: a prompt is too long.
    """
    settings = settings or AnswerSettings()
    if steering is None:
        return answer_prompts(loaded, prompts, settings, max_length=max_length, progress=progress)
    for vector in steering.vectors:
        vector.check_fits(loaded, derived_from=derived_from)
    with steering.intervention(loaded):
        return answer_prompts(loaded, prompts, settings, max_length=max_length, progress=progress)


def _depth(site: str) -> tuple[int, str]:
    """Where in the forward pass a site comes, as far as its name tells: attention, feed-forward, then their sum."""
    parsed = Site.parse(site)
    order = {"attn": 0, "mlp": 1, "resid": 2}.get(parsed.stream, 0)
    return (3 * (parsed.layer or 0) + order, site)
