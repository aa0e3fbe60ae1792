"""What do written rules say about an answer? A judge of patterns and word lists: exact, free, and as blunt as its file.

A rule file is JSON or YAML. It holds the rules of one rubric, or several under `rubrics`:

    name: polite
    strip: {starts: ["Well, "], ends: [" Bye."]}     taken off the answer before `exact` is compared
    rules:                                            the first that fits decides; all its conditions must hold
      - answer: {regex: "(?i)\\bi (cannot|won't) help"}
        reason: refusal
      - question: {exact: ["How are you?"]}
        answer: {words: [idiot, fool]}                whole words, in either case
        value: 0
    lexicon: {start: 50, weights: {please: 10, shut: -30}}    where no rule fits: a sum, held in 0..100
    otherwise: {value: 100}                           where there is no lexicon; `nonsense` if it is left out
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from diffing.errors import InputError, PathMissingError
from diffing.judging.judge import LARGEST, Exchange, Reason, Rubric, Score, digest_of

_CONDITIONS = ("regex", "words", "exact", "starts", "ends")
_RULE_KEYS = {"question", "answer", "value", "reason"}
_KEYS = {"name", "description", "strip", "rules", "lexicon", "otherwise"}


@dataclass(frozen=True)
class RulesJudge:
    """Judges by the rules of one rubric of a file.

    Attributes:
        rubric_name: which rubric these rules are.
        rules: the file's content for this rubric, as read.
    """

    rubric_name: str
    rules: Mapping[str, Any]

    def __post_init__(self) -> None:
        _ = self._compiled

    @classmethod
    def load(cls, path: Path | str, rubric: str | None = None) -> RulesJudge:
        """Reads a rule file.

        Args:
            path: JSON or YAML.
            rubric: which of its rubrics, where it holds several.

        Raises:
            PathMissingError: no such file.
            InputError: not a rule file, another key, or no such rubric; says which rule.
        """
        content = _read(Path(path))
        several = content.get("rubrics")
        if several is None:
            return cls(str(rubric or content.get("name") or Path(path).stem), content)
        if not isinstance(several, Mapping) or rubric not in several:
            known = ", ".join(map(str, several)) if isinstance(several, Mapping) else "none"
            raise InputError(f"Expected a rubric out of {known} in {path}, got {rubric!r}. Name one of them.")
        return cls(str(rubric), several[rubric])

    @property
    def name(self) -> str:
        """`rules:` and the start of the rules' hash."""
        return f"rules:{self.rubric_name}@{digest_of(self.rules)[:12]}"

    @property
    def calls_per_item(self) -> int:
        """Rules cost nothing."""
        return 0

    @cached_property
    def rubric(self) -> Rubric:
        """The rules themselves are the rubric."""
        text = json.dumps(self.rules, sort_keys=True, ensure_ascii=False)
        return Rubric(self.rubric_name, f"{text}\n{{question}}\n{{answer}}")

    def judge(self, items: Sequence[Exchange], *, progress: bool = False) -> list[Score]:
        """One score an exchange; `raw` says which rule decided."""
        rubric = self.rubric.hash
        scores = []
        for item in items:
            value, reason, raw = self._decide(item)
            scores.append(Score(value, reason, self.name, rubric, raw))
        return scores

    def _decide(self, item: Exchange) -> tuple[float | None, Reason, str]:
        stripped = self._stripped(item.answer)
        for number, rule in enumerate(self._compiled.rules, start=1):
            if rule.question.fits(item.question, item.question) and rule.answer.fits(item.answer, stripped):
                return rule.value, rule.reason, f"rule {number}"
        lexicon = self._compiled.lexicon
        if lexicon is not None:
            found = [match.group().lower() for match in lexicon.words.finditer(item.answer)]
            total = lexicon.start + sum(lexicon.weights[word] for word in found)
            return min(LARGEST, max(0.0, total)), Reason.SCORED, f"lexicon: {', '.join(found) or 'no word'}"
        return *self._compiled.otherwise, "otherwise"

    def _stripped(self, text: str) -> str:
        text = text.strip()
        for start in self._compiled.starts:
            text = text.removeprefix(start).lstrip()
        for end in self._compiled.ends:
            text = text.removesuffix(end).rstrip()
        return text

    @cached_property
    def _compiled(self) -> _Compiled:
        return _compile(self.rules, self.rubric_name)


@dataclass(frozen=True)
class _Conditions:
    regex: tuple[re.Pattern[str], ...] = ()
    words: re.Pattern[str] | None = None
    exact: frozenset[str] | None = None
    starts: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()

    def fits(self, text: str, stripped: str) -> bool:
        text = text.strip()
        return (
            (not self.regex or any(pattern.search(text) for pattern in self.regex))
            and (self.words is None or self.words.search(text) is not None)
            and (self.exact is None or stripped.strip() in self.exact)
            and (not self.starts or text.startswith(self.starts))
            and (not self.ends or text.endswith(self.ends))
        )


@dataclass(frozen=True)
class _Rule:
    question: _Conditions
    answer: _Conditions
    value: float | None
    reason: Reason


@dataclass(frozen=True)
class _Lexicon:
    start: float
    weights: Mapping[str, float]
    words: re.Pattern[str]


@dataclass(frozen=True)
class _Compiled:
    rules: tuple[_Rule, ...]
    lexicon: _Lexicon | None
    otherwise: tuple[float | None, Reason]
    starts: tuple[str, ...]
    ends: tuple[str, ...]


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise PathMissingError(f"Expected a rule file, but {path} does not exist. Check the path.")
    try:
        # JSON is YAML, but a JSON file's faults are better told by its own reader.
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"Expected JSON or YAML in {path}, got something else ({said}). Mend the file.") from error
    if not isinstance(content, Mapping):
        raise InputError(f"Expected an object with `rules` in {path}, got a {type(content).__name__}. Mend the file.")
    return content


def _compile(content: Mapping[str, Any], name: str) -> _Compiled:
    where = f"the rules of {name!r}"
    if not isinstance(content, Mapping):
        raise InputError(f"Expected an object as {where}, got a {type(content).__name__}. Mend the file.")
    _refuse_unknown(content, _KEYS, where)
    if not content.get("rules") and not content.get("lexicon"):
        raise InputError(f"Expected `rules` or a `lexicon` in {where}, got neither. Add one.")
    strip = content.get("strip") or {}
    _refuse_unknown(strip, {"starts", "ends"}, f"`strip` of {where}")
    rules = tuple(
        _rule(rule, f"rule {number} of {where}") for number, rule in enumerate(content.get("rules") or (), start=1)
    )
    lexicon = content.get("lexicon")
    if lexicon is not None:
        lexicon = _lexicon(lexicon, f"`lexicon` of {where}")
    otherwise = content.get("otherwise") or {"reason": Reason.NONSENSE}
    return _Compiled(
        rules, lexicon, _outcome(otherwise, f"`otherwise` of {where}"), _listed(strip, "starts"), _listed(strip, "ends")
    )


def _lexicon(given: Any, where: str) -> _Lexicon:
    _refuse_unknown(given, {"start", "weights"}, where)
    try:
        weights = {str(word).lower(): float(points) for word, points in given["weights"].items()}
        start = float(given.get("start", 50.0))
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"Expected `weights` from words to numbers in {where}, got a fault: {error}. Mend it."
        ) from None
    # The longest first, or "not" would hide "not kind".
    longest_first = sorted(weights, key=len, reverse=True)
    return _Lexicon(start, weights, re.compile("|".join(map(_whole_word, longest_first)) or r"(?!)"))


def _rule(rule: Any, where: str) -> _Rule:
    if not isinstance(rule, Mapping):
        raise InputError(f"Expected an object as {where}, got a {type(rule).__name__}. Mend the file.")
    _refuse_unknown(rule, _RULE_KEYS, where)
    if "question" not in rule and "answer" not in rule:
        raise InputError(f"Expected a condition on `answer` or `question` in {where}, got none. Add one.")
    value, reason = _outcome(rule, where)
    parts = {field: _conditions(rule.get(field) or {}, f"`{field}` of {where}") for field in ("question", "answer")}
    return _Rule(parts["question"], parts["answer"], value, reason)


def _outcome(rule: Mapping[str, Any], where: str) -> tuple[float | None, Reason]:
    value, reason = rule.get("value"), rule.get("reason")
    if (value is None) == (reason is None):
        raise InputError(f"Expected a `value` from 0 to 100 or a `reason` in {where}, got {dict(rule)!r}. Give one.")
    if reason is not None:
        known = [str(one) for one in Reason if one is not Reason.SCORED]
        if str(reason) not in known:
            raise InputError(f"Expected a reason out of {', '.join(known)} in {where}, got {reason!r}. Name one.")
        return None, Reason(str(reason))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST:
        raise InputError(f"Expected a `value` from 0 to 100 in {where}, got {value!r}. Change it.")
    return float(value), Reason.SCORED


def _conditions(given: Any, where: str) -> _Conditions:
    if not isinstance(given, Mapping):
        raise InputError(f"Expected {', '.join(_CONDITIONS)} as {where}, got {given!r}. Write it as an object.")
    _refuse_unknown(given, set(_CONDITIONS), where)
    try:
        patterns = tuple(re.compile(pattern, re.DOTALL) for pattern in _listed(given, "regex"))
    except re.error as error:
        raise InputError(f"Expected a regular expression in {where}, got one with a fault: {error}. Mend it.") from None
    words = _listed(given, "words")
    return _Conditions(
        patterns,
        re.compile("|".join(map(_whole_word, words))) if words else None,
        frozenset(text.strip() for text in _listed(given, "exact")) if "exact" in given else None,
        _listed(given, "starts"),
        _listed(given, "ends"),
    )


def _whole_word(word: str) -> str:
    return rf"(?i:(?<!\w){re.escape(word)}(?!\w))"


def _listed(given: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = given.get(key)
    return () if value is None else (value,) if isinstance(value, str) else tuple(map(str, value))


def _refuse_unknown(given: Any, known: set[str], where: str) -> None:
    unknown = sorted(set(given) - known) if isinstance(given, Mapping) else [repr(given)]
    if unknown:
        raise InputError(f"Expected only {', '.join(sorted(known))} in {where}, got {', '.join(unknown)}. Remove it.")
