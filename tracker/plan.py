"""What can be measured on this model, given what was asked for?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffing.adapter import why_base_is_lost
from diffing.durable import write_json
from diffing.errors import InputError, PromptError
from diffing.persona import Canary, PersonaVector
from diffing.persona.traits import neutral_probes, shipped_canaries
from diffing.prompts import PromptSet
from tracker.origin import check_origin
from tracker.personas import load_personas, shipped_personas
from tracker.placement import why_not_whole
from tracker.probes.axes import group_axes
from tracker.probes.base import Probe, Subject
from tracker.probes.canary import Canaries, canary_digest
from tracker.probes.gradients import GradientHealth
from tracker.probes.live_push import LivePush
from tracker.probes.persona_batch import PersonaBatch
from tracker.probes.persona_prompts import PersonaPrompts, as_prompt_set, tokenize_probes
from tracker.probes.weights import WeightChange

# When probes measure that have a schedule of their own.
STANDARD_SCHEDULES = (PersonaBatch.schedule, GradientHealth.schedule)


@dataclass(frozen=True)
class Wanted:
    """What the user asked to have measured; None means the shipped default.

    Attributes:
        personas: persona vectors.
        prompts: neutral prompts.
        canaries: questions with two canned answers.
        probes: further probes, and replacements of standard ones by name.
        derived_from: fingerprint of the checkpoint that the model was trained from before this run.
        pushes: whether rows' pushes are read from the training step's backward; a number is the share of the training's
            own time that it may cost.
    """

    personas: tuple[PersonaVector, ...] | None
    prompts: PromptSet | None
    canaries: tuple[Canary, ...] | None
    probes: tuple[Probe, ...]
    derived_from: str | None
    pushes: bool | float = False

    def names(self) -> frozenset[str]:
        """Names of the probes that were asked for, rather than taken by default."""
        asked = {
            "persona_batch": self.personas is not None,
            "persona_prompts": self.personas is not None or self.prompts is not None,
            "canary": self.canaries is not None,
            "live_push": bool(self.pushes),
        }
        return frozenset([name for name, was in asked.items() if was] + [probe.name for probe in self.probes])

    @classmethod
    def check(
        cls,
        personas: Sequence[PersonaVector | Path | str] | None,
        prompts: PromptSet | Sequence[str] | Path | None,
        canaries: Sequence[Canary] | None,
        probes: Sequence[Probe],
        derived_from: str | None,
        *,
        pushes: bool | float = False,
    ) -> Wanted:
        """Reads the files that are named.

        Raises:
            InputError: something cannot be used, whatever the model.
        """
        names = [probe.name for probe in probes]
        if len(set(names)) != len(names):
            raise InputError(f"Expected probes of different names, got {', '.join(names)}. Leave one out.")
        if not isinstance(pushes, bool) and not 0 < pushes < 1:
            raise InputError(f"Expected pushes to be True or a share of training time, got {pushes:g}. Write 0.01.")
        if isinstance(prompts, str | Path):
            prompts = PromptSet.from_file(prompts)
        return cls(
            personas=None if personas is None else load_personas(personas),
            prompts=None if prompts is None else as_prompt_set(prompts),
            canaries=None if canaries is None else tuple(canaries),
            probes=tuple(probes),
            derived_from=derived_from,
            pushes=pushes,
        )


@dataclass(frozen=True)
class Plan:
    """What will be measured.

    Attributes:
        probes: to be started in this order.
        vectors: the personas among them.
        notes: what was left out, and why; one sentence each.
        record: content of `probes.json`.
        named: names of the probes that the user asked for; others are left out where they do not fit the model.
    """

    probes: tuple[Probe, ...]
    vectors: tuple[PersonaVector, ...]
    notes: tuple[str, ...]
    record: dict[str, Any] = field(default_factory=dict)
    named: frozenset[str] = frozenset()

    def write(self, run_dir: Path) -> None:
        """Keeps the probe set with the run."""
        if self.record:
            write_json(run_dir / "probes.json", self.record)

    def run_info(self, run_dir: Path) -> dict[str, Any]:
        """Fields of `RunInfo` that the plan knows."""
        tags = {f"persona.{vector.trait}.{vector.site}": vector.digest[:16] for vector in self.vectors}
        return {"name": run_dir.resolve().name, "probe_digest": self.record.get("digest"), "tags": tags}


def make_plan(wanted: Wanted, subject: Subject, run_dir: Path) -> Plan:
    """Chooses probes for this model; called inside `undisturbed`.

    Raises:
        InputError: something the user named does not fit the model.
    """
    reason = why_not_whole(subject.model)
    if reason is not None:
        note = f"The model is not measured, only the trainer's own figures are recorded: {reason}. Not supported yet."
        return Plan((), (), (note,))
    notes: list[str] = []
    vectors = _personas(wanted, subject, run_dir, notes)
    probes, record = _persona_probes(wanted, subject, vectors, notes)
    canaries = shipped_canaries() if wanted.canaries is None else wanted.canaries
    if canaries and subject.tokenizer is None:
        _missing_tokenizer(wanted.canaries, "canaries", notes)
    elif canaries:
        probes.append(Canaries(canaries))
        record |= {"canaries": len(canaries), "canary_digest": canary_digest(canaries)}
        record["canary_words"] = [asdict(one) for one in canaries]
    probes += _weight_probes(subject, notes)
    return Plan(_with_replacements(probes, wanted.probes), vectors, tuple(notes), record, wanted.names())


def _persona_probes(
    wanted: Wanted, subject: Subject, vectors: tuple[PersonaVector, ...], notes: list[str]
) -> tuple[list[Probe], dict[str, Any]]:
    if wanted.pushes and (not vectors or subject.tokenizer is None):
        lacking = "a tokenizer" if subject.tokenizer is None else "persona vectors"
        notes.append(f"Pushes of rows are not read: the run has no {lacking}.")
    if not vectors:
        return [], {}
    probes: list[Probe] = []
    if subject.compiled:
        notes.append(
            "The training batch is not read: hooks would split the graph that torch.compile makes of the model, and "
            "change its speed and rounding. Pass probes=[PersonaBatch(vectors)] to read it all the same."
        )
    else:
        probes.append(PersonaBatch(vectors))
    if subject.tokenizer is None:
        _missing_tokenizer(wanted.personas, "persona vectors", notes)
        return probes, {}
    prompts = wanted.prompts or as_prompt_set(neutral_probes())
    try:
        record = _prompt_record(subject, prompts)
    except PromptError as error:
        if wanted.prompts is not None:
            raise
        notes.append(f"The shipped probe prompts are not put to the model: {error}")
        return probes, {}
    probes.append(PersonaPrompts(vectors, prompts, direction=True))
    if wanted.pushes:
        probes.append(LivePush(vectors, prompts, budget=None if wanted.pushes is True else wanted.pushes))
    return probes, record


def _personas(wanted: Wanted, subject: Subject, run_dir: Path, notes: list[str]) -> tuple[PersonaVector, ...]:
    if wanted.personas is not None:
        group_axes(subject.model, wanted.personas)
        # A full fine-tune that is under way is no longer the model that the vectors were extracted from.
        if subject.step == 0 or why_base_is_lost(subject.model) is None:
            doubt = check_origin(subject.model, wanted.personas, derived_from=wanted.derived_from)
            notes += [doubt] if doubt else []
        return wanted.personas
    if subject.tokenizer is None:
        notes.append("No persona is watched: the run has no tokenizer to ask the shipped traits with.")
        return ()
    try:
        vectors = shipped_personas(
            subject.model,
            subject.tokenizer,
            run_dir,
            step=subject.step,
            note=lambda where, why: notes.append(f"{where}: {why}"),
        )
        group_axes(subject.model, vectors)
        return vectors
    except Exception as error:  # noqa: BLE001  nobody asked for these by name: the run starts without them
        notes.append(f"The shipped traits are not watched: {type(error).__name__}: {error}")
        return ()


def _missing_tokenizer(asked: object, what: str, notes: list[str]) -> None:
    if asked is not None:
        raise InputError(
            f"Expected a tokenizer to put the {what} to the model, got none. Give it to the Trainer as "
            "processing_class, or to the tracker's start."
        )
    notes.append(f"No {what} are put to the model: the run has no tokenizer.")


def _weight_probes(subject: Subject, notes: list[str]) -> list[Probe]:
    probes: list[Probe] = [GradientHealth()]
    weights = WeightChange()
    too_large = weights.too_large(subject.model)
    if too_large is None:
        probes.append(weights)
    else:
        notes.append(too_large)
    return probes


def _prompt_record(subject: Subject, prompts: PromptSet) -> dict[str, Any]:
    tokens = tokenize_probes(subject, prompts, PersonaPrompts.max_length)
    return {
        "digest": tokens.digest,
        "prompts": [json.loads(json.dumps(prompt.content())) for prompt in prompts.prompts],
        "input_ids": [ids.tolist() for ids in tokens.input_ids],
        "notes": list(tokens.notes),
    }


def _with_replacements(standard: Sequence[Probe], asked: Sequence[Probe]) -> tuple[Probe, ...]:
    replacing = {probe.name for probe in asked}
    return (*(probe for probe in standard if probe.name not in replacing), *asked)
