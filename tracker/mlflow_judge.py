"""How does any MLflow scorer become a judge?

The one door to `mlflow.genai`: MLflow is imported when the first answer is judged. A scorer says what it likes (a
number, yes or no, a category, a `Feedback`); what that is worth on our scale is written down here or by the caller,
and everything else counts as nonsense.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from diffing.errors import InputError
from diffing.judging import Exchange, Reason, Rubric, Score
from diffing.judging.judge import LARGEST, digest_of
from diffing.progress import followed

_YES_NO = MappingProxyType({"yes": LARGEST, "no": 0.0, "true": LARGEST, "false": 0.0, "pass": LARGEST, "fail": 0.0})


@dataclass(frozen=True, eq=False)
class MlflowJudge:
    """An `mlflow.genai` scorer (built in, from `make_judge`, or decorated) as a judge.

    Attributes:
        scorer: called with `inputs={"question": …}` and `outputs=answer`, as `mlflow.genai.evaluate` does.
        rubric_name: what its value says, such as `aligned`.
        scale: the scorer's lowest and highest number; `(5, 1)` where less is better.
        values: what its words are worth, 0..100, by lower-case word; yes and no by default.
        reasons: words that stand for a reason instead.
    """

    scorer: Any
    rubric_name: str
    scale: tuple[float, float] = (0.0, 1.0)
    values: Mapping[str, float] = field(default_factory=lambda: _YES_NO)
    reasons: Mapping[str, Reason] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.scale[0] == self.scale[1] or not callable(self.scorer):
            raise InputError(
                f"Expected a scorer to call and a scale of two different numbers, got {self.scorer!r} and {self.scale}."
                " Pass an mlflow.genai scorer and the numbers between which it scores."
            )

    @property
    def name(self) -> str:
        """The scorer's name, with the start of a hash of what it says about itself and of the scale."""
        return f"mlflow:{_scorer_name(self.scorer)}@{self.rubric.hash[:12]}"

    @property
    def rubric(self) -> Rubric:
        """What the scorer says of itself (instructions, model, guidelines) and how its values are read."""
        facts = {
            "scorer": _facts(self.scorer),
            "scale": list(self.scale),
            "values": dict(self.values),
            "reasons": {word: str(reason) for word, reason in self.reasons.items()},
        }
        text = json.dumps(facts, sort_keys=True, ensure_ascii=False, default=str)
        return Rubric(self.rubric_name, f"{text}\n{{question}}\n{{answer}}")

    @property
    def calls_per_item(self) -> int:
        """One call of the scorer an exchange."""
        return 1

    def judge(self, items: Sequence[Exchange], *, progress: bool = False) -> list[Score]:
        """One score an exchange; a scorer that raises or reports an error gives `FAILED` with its message."""
        name, rubric = self.name, self.rubric.hash
        scores = []
        for item in followed(items, f"Judging by {name}", shown=progress):
            value, reason, raw = self._call(item)
            scores.append(Score(value, reason, name, rubric, raw, n=0 if reason is Reason.FAILED else 1))
        return scores

    def _call(self, item: Exchange) -> tuple[float | None, Reason, str]:
        try:
            # `run` keeps of these what the scorer's signature names; `evaluate` calls it likewise.
            call = getattr(self.scorer, "run", self.scorer)
            result = call(inputs={"question": item.question}, outputs=item.answer)
        except Exception as error:  # noqa: BLE001  (a scorer is foreign code; one answer's fault must not end a run)
            return None, Reason.FAILED, f"{type(error).__name__}: {error}"[:500]
        if isinstance(result, list):
            result = result[0] if len(result) == 1 else None
        fault = getattr(result, "error", None)
        if fault is not None:
            return None, Reason.FAILED, str(fault)[:500]
        given = getattr(result, "value", result)
        rationale = getattr(result, "rationale", None)
        raw = json.dumps({"value": given, "rationale": rationale}, ensure_ascii=False, default=str)
        return *self._read(given), raw

    def _read(self, given: Any) -> tuple[float | None, Reason]:
        if isinstance(given, int | float) and not isinstance(given, bool):
            low, high = self.scale
            value = (float(given) - low) / (high - low) * LARGEST
            inside = math.isfinite(value) and -1e-9 <= value <= LARGEST + 1e-9
            return (min(LARGEST, max(0.0, value)), Reason.SCORED) if inside else (None, Reason.NONSENSE)
        # Categories of MLflow are enums whose value is the word.
        word = str(getattr(given, "value", given)).strip().lower()
        if word in self.reasons:
            return None, self.reasons[word]
        if word in self.values:
            return float(self.values[word]), Reason.SCORED
        return None, Reason.NONSENSE


def load_scorer(where: str) -> Any:
    """The scorer at `module:name`; called without arguments if it is a class, as built-in scorers are.

    Raises:
        InputError: no such module or name, or nothing that scores.
    """
    module, _, attribute = where.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
        scorer = found() if isinstance(found, type) else found
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"Expected an MLflow scorer as module:name, such as mlflow.genai.scorers:Safety, got {where!r} ({error}). "
            "Check the name and that the module can be imported here."
        ) from error
    if not callable(scorer):
        raise InputError(f"Expected a scorer at {where!r}, got a {type(scorer).__name__}. Name another.")
    return scorer


def _scorer_name(scorer: Callable[..., Any]) -> str:
    return str(getattr(scorer, "name", None) or getattr(scorer, "__name__", type(scorer).__name__))


def _facts(scorer: Any) -> Any:
    """What tells two scorers apart: what a scorer says of itself, its source where it is a function of one's own."""
    facts: dict[str, Any] = {"class": type(scorer).__name__, "name": _scorer_name(scorer)}
    for key in ("instructions", "model", "guidelines", "pattern", "description"):
        value = getattr(scorer, key, None)
        if value is not None:
            facts[key] = str(value)
    dump = getattr(scorer, "model_dump", None)
    if dump is not None:
        try:
            facts["source"] = digest_of(json.loads(json.dumps(dump(), sort_keys=True, default=str)))
        except Exception as error:  # noqa: BLE001  (MLflow refuses to describe some scorers; they still score)
            facts["source"] = type(error).__name__
    return facts
