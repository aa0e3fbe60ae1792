"""What is a dataset asked before it is trained on: personas on neutral questions, and odds of canned answers?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from attribution import ProjectionQuery, Query
from diffing.checkpoint import LoadedCheckpoint
from diffing.errors import PersonaError
from diffing.persona import PersonaVector
from diffing.prompts import PromptSet
from tracker.run_queries import projection_query
from tracker.training_rows import read_query


def queries_for(
    loaded: LoadedCheckpoint,
    vectors: Sequence[PersonaVector],
    probes: PromptSet,
    *,
    canaries: Path | None = None,
    max_length: int = 1024,
) -> tuple[Query, ...]:
    """One query a vector, on the last token of neutral prompts in gaps, and one for canaries where they are given.

    Args:
        loaded: the base model.
        vectors: fitted on it.
        probes: neutral prompts, none of them from the dataset.
        canaries: file of rows with `prompt`, `chosen` (what the persona would say) and `rejected` (what it would not).
        max_length: most tokens of a probe or canary.

    Raises:
        PersonaError: a vector of another model, or a probe that is too long.
    """
    for vector in vectors:
        vector.check_fits(loaded)
    inputs = _inputs(loaded, probes, max_length)
    queries: list[Query] = [_named(projection_query(vector, inputs), vector) for vector in vectors]
    if canaries is not None:
        queries.append(read_query(canaries, loaded.tokenizer, max_length=max_length)[0])
    return tuple(queries)


def _named(query: ProjectionQuery, vector: PersonaVector) -> ProjectionQuery:
    return ProjectionQuery(query.inputs, query.site, query.direction, query.scale, f"{vector.trait} at {vector.site}")


def _inputs(loaded: LoadedCheckpoint, probes: PromptSet, max_length: int) -> dict[str, torch.Tensor]:
    tokens = probes.tokenize(loaded.tokenizer, max_length=max_length, add_generation_prompt=True)
    if tokens.n_truncated:
        raise PersonaError(
            f"Expected probes of at most {max_length} tokens, got {tokens.n_truncated} longer. Shorten them."
        )
    batch = tokens.batch(range(len(tokens)), device=next(loaded.model.parameters()).device)
    return batch.inputs()
