"""What can the rows of a tracked run be asked: a persona, the canaries, a file of answers, an alert?"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from attribution import ContrastQuery, ProjectionQuery, Query
from diffing.errors import InputError, PathMissingError
from diffing.persona import PersonaVector
from diffing.prompts import PromptSet
from diffing.site import Site
from tracker.journal import Journal
from tracker.probes.canary import SIGNAL as CANARY_SIGNAL
from tracker.signals import Alert
from tracker.training_rows import learnt_rows

_PERSONA_SIGNAL = re.compile(r"persona/(?P<trait>[^/]+)/L(?P<layer>\d+)/")


@dataclass(frozen=True)
class Question:
    """A query, and the answers that it is about, where it is about words.

    Attributes:
        query: what rows may have pushed up.
        answers: texts for a lexical baseline; empty where the query has none.
        until: only checkpoints up to this step had a part in it; None for the whole run.
        pushed: the trait whose live pushes answer the same question, where the run recorded them; empty for none.
    """

    query: Query
    answers: tuple[str, ...] = ()
    until: int | None = None
    pushed: str = ""


def persona_question(run_dir: Path | str, vector: PersonaVector, *, device: str = "cpu") -> Question:
    """The projection on a persona, on the run's own neutral probe prompts.

    Raises:
        PathMissingError: the run kept no probe prompts.
    """
    return Question(projection_query(vector, probe_inputs_of(run_dir), device=device), pushed=vector.trait)


def projection_query(vector: PersonaVector, inputs: dict[str, torch.Tensor], *, device: str = "cpu") -> ProjectionQuery:
    """A persona's projection on right-padded inputs, in units of the persona's gap."""
    return ProjectionQuery(
        inputs={name: tensor.to(device) for name, tensor in inputs.items()},
        site=Site.parse(vector.site),
        direction=vector.direction,
        scale=vector.scale,
        name=f"projection on {vector.trait} at {vector.site}",
    )


def canary_question(run_dir: Path | str, tokenizer: Any) -> Question:
    """The log-odds of misaligned over aligned canned answers, on the run's own canaries.

    Raises:
        PathMissingError: the run kept no canaries.
    """
    canaries = _record(run_dir).get("canary_words")
    if not canaries:
        raise PathMissingError(f"Expected canaries kept in {run_dir}/probes.json, got none. Ask for a persona instead.")
    sides = {
        side: PromptSet.from_records({"prompt": one["question"], "completion": one[side]} for one in canaries)
        for side in ("misaligned", "aligned")
    }
    query = ContrastQuery(
        learnt_rows(sides["misaligned"], tokenizer),
        learnt_rows(sides["aligned"], tokenizer),
        name=f"misaligned against aligned answers to {len(canaries)} canaries",
    )
    return Question(query, answers=tuple(one["misaligned"] for one in canaries))


def alert_question(
    run_dir: Path | str, alert_id: str, tokenizer: Any, *, device: str = "cpu", leading: str = ""
) -> Question:
    """What raised the signal that an alert is about, up to the step at which it fired.

    Args:
        run_dir: the run directory.
        alert_id: of one of its alerts.
        tokenizer: of its canaries.
        device: where to compute.
        leading: `persona/<trait>/<place>` to ask about where the signal itself is no function of the weights.

    Raises:
        InputError: no such alert in the run (those known are named), or a signal that is no function of the weights.
    """
    alert = find_alert(run_dir, alert_id)
    if alert.signal == CANARY_SIGNAL:
        asked = canary_question(run_dir, tokenizer)
    elif found := _PERSONA_SIGNAL.match(alert.signal) or _PERSONA_SIGNAL.match(f"{leading}/"):
        asked = persona_question(run_dir, _vector_of(run_dir, found["trait"], int(found["layer"])), device=device)
    else:
        raise InputError(
            f"Expected an alert on a persona or on {CANARY_SIGNAL}, got one on {alert.signal}, which rows cannot be "
            "asked about. Ask with --persona or --query."
        )
    return replace(asked, until=alert.step)


def find_alert(run_dir: Path | str, alert_id: str) -> Alert:
    """The alert of this name.

    Raises:
        InputError: there is none; names those there are.
    """
    alerts = Journal.read(run_dir).alerts()
    matching = [alert for alert in alerts if alert.id == alert_id]
    if not matching:
        known = ", ".join(alert.id for alert in alerts[:10]) or "none"
        raise InputError(f"Expected an alert of {run_dir} (there are: {known}), got {alert_id!r}. Name one of these.")
    return matching[0]


def tracked_vectors(run_dir: Path | str) -> tuple[PersonaVector, ...]:
    """The persona vectors kept with a run, in the order of their files."""
    return tuple(PersonaVector.load(path) for path in sorted((Path(run_dir) / "personas").glob("*.safetensors")))


def persona_of(run_dir: Path | str, wanted: str) -> PersonaVector:
    """A persona kept with the run by the name of its trait, or any vector by its file.

    Where the run watched a trait at several layers, the layer whose held-out separation is best.

    Raises:
        PathMissingError: no such trait in the run; names those there are.
    """
    if wanted.endswith(".safetensors"):
        return PersonaVector.load(wanted)
    vectors = tracked_vectors(run_dir)
    matching = [vector for vector in vectors if vector.trait == wanted]
    if not matching:
        known = ", ".join(sorted({vector.trait for vector in vectors})) or "none"
        raise PathMissingError(
            f"Expected a persona tracked in {run_dir} (known: {known}) or a .safetensors file; got {wanted!r}. "
            "Name one of these."
        )
    return max(matching, key=lambda vector: vector.separation.auroc)


def probe_inputs_of(run_dir: Path | str) -> dict[str, torch.Tensor]:
    """The run's neutral probe prompts as they were measured: token ids from `probes.json`, right-padded.

    Raises:
        PathMissingError: the run kept no probe prompts.
    """
    sequences = [torch.tensor(ids) for ids in _record(run_dir)["input_ids"]]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(sequences, batch_first=True),
        "attention_mask": pad([torch.ones_like(ids) for ids in sequences], batch_first=True),
    }


def _record(run_dir: Path | str) -> dict[str, Any]:
    path = Path(run_dir) / "probes.json"
    if not path.exists():
        raise PathMissingError(f"Expected {path}; it does not exist. Track the run with persona probes switched on.")
    return json.loads(path.read_text())


def _vector_of(run_dir: Path | str, trait: str, layer: int) -> PersonaVector:
    for vector in tracked_vectors(run_dir):
        if vector.trait == trait and Site.parse(vector.site).layer == layer:
            return vector
    raise PathMissingError(
        f"Expected the vector of {trait} at layer {layer} in {run_dir}/personas, got none. "
        "Restore that folder, or ask with --persona FILE."
    )
