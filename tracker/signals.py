"""What was measured, and what does it mean? A drift signal is one number with its interval; an alert is a judgement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DriftSignal:
    """One measurement at one optimizer step.

    Attributes:
        name: path-like and stable, e.g. `persona/evil/L2/prompt`; also the metric's name in MLflow.
        value: the measurement, in `unit`. For drifts, positive means towards the trait.
        step: optimizer steps done when it was measured.
        unit: `gap` (1.0 is the distance between trait and plain answers at extraction), `nats/token`,
            `relative`, or `raw`.
        low: lower end of the 95 % interval, None where the value has no sampling error or n is too small.
        high: upper end of the same interval.
        n: how many prompts, rows or parameters stand behind the value.
        reference: what the value is measured against: `step 0`, `base`, `neutral mean` or `` for none.
    """

    name: str
    value: float
    step: int
    unit: str = "raw"
    low: float | None = None
    high: float | None = None
    n: int = 1
    reference: str = ""


@dataclass(frozen=True)
class Alert:
    """A detector's statement that someone should know.

    Attributes:
        rule: the detector that fired, with its settings (`effect_floor(0.25 gap, 2 in a row)`).
        signal: name of the signal that crossed.
        step: optimizer step at which it fired.
        value: the signal's value then.
        low: lower end of its interval then, None where it had none.
        threshold: what it had to exceed.
        unit: unit of value and threshold.
        since: first step of the unbroken stretch above the threshold; `since`..`step` is the window to explain.
        severity: `warning` or `critical`.
        evidence: further facts, JSON values only.
    """

    rule: str
    signal: str
    step: int
    value: float
    low: float | None
    threshold: float
    unit: str
    since: int
    severity: str = "warning"
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Stable name, equal after a resume: the same signal firing at the same step is the same alert.

        Where a named rule raised it, the rule's name follows, since several rules may watch one signal.
        """
        rule = self.evidence.get("rule_name")
        return f"{self.signal.replace('/', '.')}@{self.step}" + (f"~{rule}" if rule else "")
