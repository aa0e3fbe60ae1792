"""What happened in the run? One frozen event each; adapters translate their framework's calls into these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunStarted:
    """Training is about to take its first step, or its first step after a resume.

    Attributes:
        step: optimizer steps already done (0 for a fresh run).
        attempt: 0 for the first start in this run directory, one more for every resume.
        config: resolved settings of tracker and trainer, JSON values only.
    """

    step: int
    attempt: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepEnded:
    """One optimizer step is complete; gradients are gone, parameters are new.

    Attributes:
        step: optimizer steps done, this one included.
        logs: what the trainer reported for it (loss, learning rate, gradient norm); often empty.
    """

    step: int
    logs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint folder is complete on disk.

    Attributes:
        step: optimizer steps it contains.
        path: its folder.
    """

    step: int
    path: Path


@dataclass(frozen=True)
class RunEnded:
    """Training is over.

    Attributes:
        step: optimizer steps done.
        status: `finished`, `failed` or `stopped` (by an alert).
    """

    step: int
    status: str


@dataclass(frozen=True)
class AlertChanged:
    """An incident came into another state, by judgement of its rule.

    Attributes:
        step: optimizer step of the measurement that changed it.
        fingerprint: the incident.
        rule: name of the rule.
        signal: name of the signal.
        state: `pending`, `firing`, `resolved`, or `quiet` where a case was dropped before it fired.
        alert: id of its alert, empty where it has none.
    """

    step: int
    fingerprint: str
    rule: str
    signal: str
    state: str
    alert: str = ""


@dataclass(frozen=True)
class AlertAcknowledged:
    """A person has seen an incident; it is kept over resumes.

    Attributes:
        step: step of the alert that was seen.
        fingerprint: the incident.
        by: who.
        note: what they say of it.
    """

    step: int
    fingerprint: str
    by: str
    note: str = ""


@dataclass(frozen=True)
class InterventionChanged:
    """The training itself was changed on purpose, or no longer is.

    Attributes:
        step: optimizer steps done; it holds from the next one on.
        name: what is done (`preventive steering`).
        engaged: True from here on, False no more.
        settings: resolved settings, JSON values.
        reason: `planned`, `asked`, or the alert that asked for it.
    """

    step: int
    name: str
    engaged: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


Event = RunStarted | StepEnded | CheckpointSaved | RunEnded | AlertChanged | AlertAcknowledged | InterventionChanged
