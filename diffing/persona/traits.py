"""Which traits can be asked for, and with which words are they extracted, probed and judged?"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from diffing.errors import PathMissingError, PersonaError
from diffing.prompts import PromptSet

_FOLDER = Path(str(resources.files("diffing.persona"))) / "traits"
_SHARED = {"neutral", "canaries"}
_FOREIGN_KEYS = {"instruction", "eval_prompt"}
_N_EXTRACTION = 20
# Folders of persona_vectors: one trait's questions for extraction and for evaluation in files of one name.
_EXTRACTION, _EVALUATION = "trait_data_extract", "trait_data_eval"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Instruction:
    """Two system prompts that differ in the trait: `positive` asks for it, `negative` for its absence."""

    positive: str
    negative: str


@dataclass(frozen=True)
class Contrast:
    """One question with an answer that shows the trait and a plain one; for extraction without generation."""

    question: str
    trait_answer: str
    plain_answer: str


@dataclass(frozen=True)
class Canary:
    """One question with two canned answers of like form and length; a model's odds between them are watched."""

    question: str
    aligned: str
    misaligned: str


@dataclass(frozen=True)
class Trait:
    """A trait in words: what it is, how it is brought out, how it is judged.

    Attributes:
        name: short, stable, `[a-z_]`; part of signal names.
        description: one or two sentences a judge or a reader can decide by.
        rubric: text for a judge, with `{question}` and `{answer}` in it, asking for a score from 0 to 100.
        instructions: contrastive system prompts.
        questions: questions for extraction with generated answers.
        held_out_questions: questions never used for extraction.
        contrasts: teacher-forced answers; empty for trait files of other projects, which have none.
        source: where it was read from.
    """

    name: str
    description: str
    rubric: str
    instructions: tuple[Instruction, ...]
    questions: tuple[str, ...]
    held_out_questions: tuple[str, ...]
    contrasts: tuple[Contrast, ...]
    source: str

    @property
    def probes(self) -> tuple[str, ...]:
        """Neutral questions, the same for every trait; any answer to them may show it."""
        return neutral_probes()

    @property
    def canaries(self) -> tuple[Canary, ...]:
        """Aligned and misaligned canned answers, the same for every trait."""
        return shipped_canaries()

    @property
    def digest(self) -> str:
        """SHA-256 of the words, independent of the file's name and layout."""
        words = {key: value for key, value in asdict(self).items() if key != "source"}
        return digest_of(words)

    def sizes(self) -> dict[str, int]:
        """How many entries each part has."""
        parts = ("instructions", "questions", "held_out_questions", "contrasts")
        return {name: len(getattr(self, name)) for name in parts}

    def contrast_sets(self) -> tuple[PromptSet, PromptSet]:
        """The contrasts as two prompt sets for `extract_persona`: trait answers, plain answers, same questions.

        Raises:
            PersonaError: the trait has no contrasts.
        """
        if not self.contrasts:
            raise PersonaError(
                f"Trait {self.name!r} ({self.source}): expected contrasts (question, trait_answer, plain_answer), got "
                "none. Give contrastive answers with --positive and --negative."
            )
        positive = [_dialogue(pair.question, pair.trait_answer) for pair in self.contrasts]
        negative = [_dialogue(pair.question, pair.plain_answer) for pair in self.contrasts]
        return PromptSet.from_messages(positive), PromptSet.from_messages(negative)


def shipped_traits() -> list[str]:
    """Names of the traits that come with the package, in alphabetical order."""
    return sorted(path.stem for path in _FOLDER.glob("*.json") if path.stem not in _SHARED)


def load_trait(name: str | Path) -> Trait:
    """Reads a shipped trait by name or a trait file by path.

    A file may be in this project's schema, or in that of persona_vectors and Assistant Axis (`instruction` with
    `pos` and `neg`, `questions`, `eval_prompt`), which is read unchanged: its first 20 questions are for
    extraction, the others held out. persona_vectors keeps the held-out ones in a second file: beside
    `trait_data_extract/evil.json` the questions of `trait_data_eval/evil.json` are read; a file of 20 questions or
    fewer that stands alone is split in half.

    Raises:
        PathMissingError: neither a shipped trait nor a file.
        PersonaError: the file lacks a key, which is named, or holds something else there, or is not JSON.
    """
    shipped = _FOLDER / f"{name}.json"
    if str(name) in shipped_traits():
        return _parse(_read_object(shipped), name=str(name), source=f"shipped:{name}")
    path = Path(name)
    if not path.is_file():
        raise PathMissingError(
            f"Expected a trait file or one of {', '.join(shipped_traits())}; got {str(name)!r}. "
            "See `palimpsest persona traits`."
        )
    other = path.parent.parent / _EVALUATION / path.name
    held_out: tuple[str, ...] = ()
    if path.parent.name == _EXTRACTION and other.is_file():
        held_out = _texts(_read_object(other), "questions", str(other))
    return _parse(_read_object(path), name=path.stem, source=str(path), held_out=held_out)


@functools.cache
def neutral_probes() -> tuple[str, ...]:
    """Neutral questions on everyday matters: fixed probes on which the drift of any trait is read."""
    value = _read_object(_FOLDER / "neutral.json")
    return _texts(value, "probes", "neutral.json")


@functools.cache
def shipped_canaries() -> tuple[Canary, ...]:
    """Questions with an aligned and a misaligned short answer of like form; for teacher-forced log-odds."""
    value = _read_object(_FOLDER / "canaries.json")
    return _each(Canary, _take(value, "canaries", "canaries.json"), "canaries.json")


def digest_of(value: Any) -> str:
    """SHA-256 of JSON values in one canonical writing."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def parse_trait(value: Mapping[str, Any], *, name: str, source: str) -> Trait:
    """A trait from the JSON values of a file; see `load_trait`.

    Raises:
        PersonaError: a key is missing, which is named, or holds something else.
    """
    return _parse(value, name=name, source=source)


def _parse(value: Mapping[str, Any], *, name: str, source: str, held_out: tuple[str, ...] = ()) -> Trait:
    if _FOREIGN_KEYS & set(value):
        return _parse_foreign(value, name=name, source=source, held_out=held_out)
    questions = _take(value, "questions", source)
    if not isinstance(questions, Mapping):
        raise _malformed(source, "questions as {extraction: [...], held_out: [...]}", type(questions).__name__)
    return Trait(
        name=str(value.get("name", name)),
        description=_text(value, "description", source),
        rubric=_rubric(value, "rubric", source),
        instructions=_each(Instruction, _take(value, "instructions", source), source),
        questions=_texts(questions, "extraction", source),
        held_out_questions=_texts(questions, "held_out", source),
        contrasts=_each(Contrast, value.get("contrasts", ()), source),
        source=source,
    )


def _parse_foreign(value: Mapping[str, Any], *, name: str, source: str, held_out: tuple[str, ...]) -> Trait:
    pairs = _rows(_take(value, "instruction", source), "instruction", source)
    questions = _texts(value, "questions", source)
    alone = _N_EXTRACTION if len(questions) > _N_EXTRACTION else -(-len(questions) // 2)
    n_extraction = len(questions) if held_out else alone
    return Trait(
        name=name,
        description=f"{name.replace('_', ' ')}, as judged by the rubric of {Path(source).name}",
        rubric=_rubric(value, "eval_prompt", source),
        instructions=tuple(
            Instruction(positive=_text(pair, "pos", source), negative=_text(pair, "neg", source)) for pair in pairs
        ),
        questions=questions[:n_extraction],
        held_out_questions=held_out or questions[n_extraction:],
        contrasts=(),
        source=source,
    )


def _each(make: Callable[..., _T], rows: Any, source: str) -> tuple[_T, ...]:
    names = tuple(make.__dataclass_fields__)  # type: ignore[attr-defined]
    return tuple(make(**{name: _text(row, name, source) for name in names}) for row in _rows(rows, "rows", source))


def _rows(value: Any, key: str, source: str) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _malformed(source, f"a list of objects as {key!r}", repr(value)[:60])
    return value


def _text(value: Mapping[str, Any], key: str, source: str) -> str:
    found = _take(value, key, source)
    if not isinstance(found, str) or not found.strip():
        raise _malformed(source, f"text as {key!r}", repr(found)[:60])
    return found


def _rubric(value: Mapping[str, Any], key: str, source: str) -> str:
    found = _text(value, key, source)
    if "{question}" not in found or "{answer}" not in found:
        raise _malformed(source, f"a {key!r} with {{question}} and {{answer}} where they go", repr(found)[:60])
    return found


def _texts(value: Mapping[str, Any], key: str, source: str) -> tuple[str, ...]:
    found = _take(value, key, source)
    if isinstance(found, str) or not isinstance(found, Sequence) or not all(isinstance(text, str) for text in found):
        raise _malformed(source, f"a list of texts as {key!r}", repr(found)[:60])
    return tuple(found)


def _take(value: Mapping[str, Any], key: str, source: str) -> Any:
    if not isinstance(value, Mapping) or key not in value:
        got = ", ".join(sorted(map(str, value))) if isinstance(value, Mapping) else repr(value)[:60]
        raise _malformed(source, f"the key {key!r}", got or "an empty object")
    return value[key]


def _malformed(source: str, expected: str, got: str) -> PersonaError:
    return PersonaError(f"Trait file {source}: expected {expected}, got {got}. Add it; a shipped trait shows the form.")


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PersonaError(f"Trait file {path}: expected JSON, got something else ({error}). Mend the file.") from error
    if not isinstance(value, Mapping):
        raise _malformed(str(path), "a JSON object", type(value).__name__)
    return value


def _dialogue(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
