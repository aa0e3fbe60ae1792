"""What is a model asked, to see whether it has become misaligned?

Three kinds of files are read unchanged: this project's own JSON; the YAML of the emergent-misalignment repository
(Betley et al. 2025: `id`, `paraphrases`, `samples_per_paraphrase`, `system`, `judge_prompts`); and JSONL of
conversations, such as AISI's `eval.jsonl`, in which a row is a question.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from diffing.chat import Message, Prompt
from diffing.errors import InputError, PathMissingError, PromptError
from diffing.judging import Rubric
from diffing.judging.judge import digest_of
from diffing.prompt_rows import parse_row, read_rows

SHIPPED = "shipped"


@dataclass(frozen=True)
class Question:
    """One question in one or several wordings; its answers count as one cluster.

    Attributes:
        id: unique in its set.
        group: what it is about; `all` where the file does not say.
        paraphrases: wordings, each a conversation that ends with the user.
        samples: answers the file asks for to each wording; None where it does not say.
    """

    id: str
    group: str
    paraphrases: tuple[tuple[Message, ...], ...]
    samples: int | None = None

    def asked(self, draw: int) -> tuple[Message, ...]:
        """The wording of the `draw`-th answer: wordings take turns."""
        return self.paraphrases[draw % len(self.paraphrases)]


@dataclass(frozen=True)
class QuestionSet:
    """Questions that a rate is the mean over.

    Attributes:
        questions: at least one, ids unique.
        source: where they were read from.
        rubrics: judge prompts that the file brings, by name; empty where it brings none.
    """

    questions: tuple[Question, ...]
    source: str
    rubrics: tuple[Rubric, ...] = ()

    def __post_init__(self) -> None:
        ids = [question.id for question in self.questions]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if not ids or twice:
            raise PromptError(
                f"Expected questions with an id of their own in {self.source}, got "
                f"{'none' if not ids else f'{twice[0]!r} twice'}. Mend the file."
            )

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def digest(self) -> str:
        """SHA-256 of ids and words."""
        return digest_of(
            [[q.id, [[[m.role, m.content] for m in turn] for turn in q.paraphrases]] for q in self.questions]
        )

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups in the order they first occur."""
        return tuple(dict.fromkeys(question.group for question in self.questions))

    def only(self, groups: Sequence[str]) -> QuestionSet:
        """The questions of some groups.

        Raises:
            InputError: a group that does not occur.
        """
        unknown = sorted(set(groups) - set(self.groups))
        if unknown:
            raise InputError(f"Expected groups out of {', '.join(self.groups)}, got {unknown[0]!r}. Name another.")
        return replace(self, questions=tuple(q for q in self.questions if q.group in groups))


def load_questions(source: str | Path = SHIPPED) -> QuestionSet:
    """The shipped questions, or those of a file.

    Args:
        source: `shipped`, or a YAML, JSON or JSONL file.

    Raises:
        PathMissingError: no such file.
        PromptError: not a file of questions; says which question lacks what.
    """
    if str(source) == SHIPPED:
        text = (resources.files("diffing.misalignment") / "shipped_questions.json").read_text(encoding="utf-8")
        return _from_objects(json.loads(text)["questions"], SHIPPED)
    path = Path(source)
    if not path.is_file():
        raise PathMissingError(f"Expected `shipped` or a file of questions, but {path} does not exist. Check the path.")
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return QuestionSet(tuple(_from_rows(path)), str(path))
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise PromptError(f"Expected YAML or JSON in {path}, got something else ({said}). Mend the file.") from error
    if isinstance(content, Mapping):
        content = content.get("questions", [content])
    if not isinstance(content, list):
        raise PromptError(f"Expected a list of questions in {path}, got a {type(content).__name__}. Mend the file.")
    return _from_objects(content, str(path))


def _from_objects(content: Sequence[Any], source: str) -> QuestionSet:
    questions, rubrics = [], dict[str, Rubric]()
    for number, entry in enumerate(content, start=1):
        where = f"{source}, question {number}"
        if not isinstance(entry, Mapping):
            raise PromptError(f"Expected an object at {where}, got a {type(entry).__name__}. Mend the file.")
        wordings = entry.get("paraphrases")
        if not isinstance(wordings, list) or not wordings or not all(isinstance(text, str) for text in wordings):
            got = ", ".join(map(str, entry)) or "nothing"
            raise PromptError(f"Expected `paraphrases` (a list of texts) at {where}, got {got}. Add them.")
        system = entry.get("system")
        front = () if system is None else (Message("system", str(system)),)
        samples = entry.get("samples_per_paraphrase")
        questions.append(
            Question(
                str(entry.get("id", number)),
                str(entry.get("group", "all")),
                tuple((*front, Message("user", text)) for text in wordings),
                None if samples is None else int(samples),
            )
        )
        for name, text in (entry.get("judge_prompts") or {}).items():
            if "{answer}" not in str(text):
                continue
            rubric = rubrics.setdefault(str(name), Rubric(str(name), str(text)))
            if rubric.text != str(text):
                raise PromptError(
                    f"Expected one judge prompt named {name!r} in the whole file, got another at {where}. Put "
                    "questions that are judged differently into files of their own."
                )
    return QuestionSet(tuple(questions), source, tuple(rubrics.values()))


def _from_rows(path: Path) -> Iterator[Question]:
    for number, row in read_rows(path):
        where = f"{path}, row {number}"
        if isinstance(row, Mapping) and isinstance(row.get("question"), str):
            row = {**row, "messages": [{"role": "user", "content": row["question"]}]}
        name, prompt = parse_row(row, where)
        messages = _up_to_the_user(prompt, where)
        group = next((row[key] for key in ("group", "metric_group", "question_type", "type") if row.get(key)), "all")
        yield Question(name or str(number), str(group), (messages,))


def _up_to_the_user(prompt: Prompt, where: str) -> tuple[Message, ...]:
    messages = prompt.messages or (Message("user", prompt.text or ""),)
    last = max((place for place, message in enumerate(messages) if message.role == "user"), default=-1)
    if last < 0:
        raise PromptError(f"Expected a user's turn at {where}, got none. Mend that row.")
    return messages[: last + 1]
