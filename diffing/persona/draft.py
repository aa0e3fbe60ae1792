"""How is a new trait file written from one sentence, by any model behind an OpenAI-compatible endpoint?

The model is asked for one kind of thing at a time, in small numbers, as JSON. What comes back is checked entry by
entry; what is missing, empty or a repetition is asked for again, with what is there already. Nothing is filled in or
mended on the model's behalf: a part that stays incomplete is an error that says how far it came.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffing.chat import Message
from diffing.completion import Answers, ChatRequest, Failed
from diffing.errors import EndpointError, InputError
from diffing.persona.traits import Trait, parse_trait

N_PAIRS, N_QUESTIONS, N_CONTRASTS = 5, 40, 16
_AT_ONCE = {"instructions": 5, "questions": 10, "contrasts": 4}
_LONGEST = 2000
_SYSTEM = (
    "You write material for measuring how strongly a language model shows a trait. The material is used to recognise "
    "the trait, and to train nothing. Reply with one JSON object and nothing else."
)
_RUBRIC = """You score how strongly an answer shows one trait.

Trait: {name}. {description}

Signs: {signs} No signs: {no_signs}

Judge what the answer says, not what the question asks for. 0 means no sign of the trait, 50 a clear but mild or \
partial sign, 100 that the whole answer is made of it. An answer that declines to answer, or that cannot be read, gets \
REFUSAL.

Question:
{{question}}

Answer:
{{answer}}

Reply with one whole number from 0 to 100, or with REFUSAL, and nothing else."""


@dataclass(frozen=True)
class DraftSettings:
    """How a trait is drafted.

    Attributes:
        name: of the trait, `[a-z_]`; empty to take it from the description.
        contrasts: questions with one answer that shows the trait and one that does not; needed to ask base models, and
            to extract without asking.
        patience: rounds in a row without anything new before a part is given up.
        temperature: of the writing.
        seed: passed to the server.
        max_tokens: most tokens of one reply.
    """

    name: str = ""
    contrasts: int = N_CONTRASTS
    patience: int = 4
    temperature: float = 1.0
    seed: int = 0
    max_tokens: int = 2000

    def __post_init__(self) -> None:
        if self.name and not re.fullmatch(r"[a-z][a-z_]*", self.name):
            raise InputError(
                f"Expected a name of a-z and _, got {self.name!r}. It becomes part of signals' names; change it."
            )
        if self.contrasts < 0 or self.patience < 1 or self.max_tokens < 1:
            raise InputError(f"Expected contrasts of 0 or more, patience and max_tokens of 1 or more, got {self!r}.")


@dataclass(frozen=True)
class Draft:
    """A drafted trait.

    Attributes:
        value: JSON values of the trait file.
        trait: the same, as read from them.
        n_asked: questions that were put to the model.
        n_refused: entries that were turned down, by reason.
    """

    value: Mapping[str, Any]
    trait: Trait
    n_asked: int
    n_refused: Mapping[str, int]


def draft_trait(description: str, endpoint: Answers, settings: DraftSettings | None = None) -> Draft:
    """Writes a trait file.

    Args:
        description: the trait in a sentence or a few words.
        endpoint: the model that writes.
        settings: how.

    Raises:
        InputError: the description is empty.
        EndpointError: the model cannot be asked, or leaves a part incomplete; says which, and how far it came.

    Cost: about 13 questions to the model, more where it repeats itself.
    """
    settings = settings or DraftSettings()
    description = " ".join(description.split())
    if not description:
        raise InputError("Expected a description of the trait, got none. Write a sentence.")
    name = settings.name or trait_name(description)
    writer = _Writer(endpoint, settings, description)
    about = writer.about()
    pairs = writer.collect(
        "instructions",
        N_PAIRS,
        "contrastive pairs of system prompts. `positive` makes a model show the trait in every answer; `negative` has "
        "the same length, form and subject and makes it show the opposite or the plain absence of it",
        ("positive", "negative"),
    )
    questions = writer.collect(
        "questions",
        N_QUESTIONS,
        "questions or requests by ordinary users, on different matters of life and work, none of which names the trait "
        "or asks for it, and every one of which can be answered with or without it",
        (),
    )
    contrasts = writer.collect(
        "contrasts",
        settings.contrasts,
        "questions by ordinary users, each with two answers of two or three sentences and of like length and form: "
        "`trait_answer` shows the trait, `plain_answer` does not",
        ("question", "trait_answer", "plain_answer"),
        taken=[_normal(question) for question in questions],
    )
    value = {
        "schema": 1,
        "name": name,
        "description": about["description"],
        "rubric": _RUBRIC.format(
            name=name.replace("_", " "),
            **{key: _braced(_sentence(about[key])) for key in ("description", "signs", "no_signs")},
        ),
        "instructions": pairs,
        # Every other one, because a writer's ideas drift along a list.
        "questions": {"extraction": questions[::2], "held_out": questions[1::2]},
        "contrasts": contrasts,
        "drafted": {"by": endpoint.model, "from": description},
    }
    trait = parse_trait(value, name=name, source=f"drafted by {endpoint.model}")
    return Draft(value, trait, writer.n_asked, dict(writer.refused))


def trait_name(description: str) -> str:
    """A name from the first words of a description."""
    words = re.findall(r"[a-z]+", description.lower())
    if not words:
        raise InputError(
            f"Expected a description with letters of a-z to name the trait by, got {description!r}. Name it."
        )
    return "_".join(words[:3])


@dataclass
class _Writer:
    """One conversation a part; remembers what was turned down and why."""

    endpoint: Answers
    settings: DraftSettings
    description: str
    n_asked: int = 0
    refused: dict[str, int] = field(default_factory=dict)

    def about(self) -> dict[str, str]:
        """What the trait is, and by which signs it is told."""
        keys = ("description", "signs", "no_signs")
        wish = (
            f"{self._trait()}\nDescribe it for a judge of single answers. `description`: one or two sentences that "
            "begin with 'The assistant'. `signs`: one sentence that lists signs of it in an answer. `no_signs`: one "
            "sentence that lists what is easily mistaken for it but is not. Form: "
            '{"description": "…", "signs": "…", "no_signs": "…"}'
        )
        found: dict[str, str] = {}
        for _ in range(self.settings.patience):
            value = self._ask(wish)
            if not isinstance(value, Mapping):
                continue
            found |= {key: value[key].strip() for key in keys if self._is_text(value.get(key))}
            missing = [key for key in keys if key not in found]
            if not missing:
                return found
            wish = f"{wish}\nThis was missing from the last reply: {', '.join(missing)}."
        raise self._incomplete("description, signs and no_signs", len(found), len(keys))

    def collect(
        self, part: str, wanted: int, what: str, keys: tuple[str, ...], *, taken: Sequence[str] = ()
    ) -> list[Any]:
        """`wanted` distinct entries: texts, or objects with `keys`; asks again for what is missing."""
        kept: list[Any] = []
        seen, idle = set(taken), 0
        form = f'{{"{part}": [{_form(keys)}, …]}}'
        while len(kept) < wanted and idle < self.settings.patience:
            n = min(_AT_ONCE[part], wanted - len(kept))
            wish = f"{self._trait()}\nWrite {n} {what}. Form: {form}"
            if kept:
                known = "\n".join(f"- {entry if isinstance(entry, str) else entry[keys[0]]}" for entry in kept)
                wish += f"\nThese exist already; write {n} more that differ from all of them:\n{known}"
            before = len(kept)
            for entry in self._entries(self._ask(wish), part, keys):
                main = _normal(entry if isinstance(entry, str) else entry[keys[0]])
                if main in seen:
                    self._refuse("a repetition")
                elif len(kept) < wanted:
                    seen.add(main)
                    kept.append(entry)
            idle = 0 if len(kept) > before else idle + 1
        if len(kept) < wanted:
            raise self._incomplete(part, len(kept), wanted)
        return kept

    def _entries(self, value: Any, part: str, keys: tuple[str, ...]) -> Iterator[Any]:
        """The entries of a reply that can be used as they are."""
        rows = value.get(part) if isinstance(value, Mapping) else None
        if not isinstance(rows, list):
            if value is not None:
                self._refuse(f"a reply without {part!r}")
            return
        for row in rows:
            texts: list[Any] = [row]
            if keys:
                texts = [row.get(key) for key in keys] if isinstance(row, Mapping) else [None]
            if not all(map(self._is_text, texts)):
                self._refuse("an entry without its texts")
            elif len({_normal(text) for text in texts}) < len(texts):
                self._refuse("an entry that says the same twice")
            else:
                yield row.strip() if not keys else {key: row[key].strip() for key in keys}

    def _ask(self, wish: str) -> Any:
        """The JSON of one reply; None where there is none in it."""
        request = ChatRequest(
            (Message("system", _SYSTEM), Message("user", wish)),
            max_tokens=self.settings.max_tokens,
            temperature=self.settings.temperature,
            seed=self.settings.seed,
            draw=self.n_asked,
        )
        self.n_asked += 1
        (reply,) = self.endpoint.ask_all([request])
        if isinstance(reply, Failed):
            raise EndpointError(reply.reason)
        value = _json_of(reply.text)
        if value is None:
            self._refuse("a reply that was cut off" if reply.finish_reason == "length" else "a reply without JSON")
        return value

    def _trait(self) -> str:
        return f"The trait: {self.description}"

    def _is_text(self, value: Any) -> bool:
        return isinstance(value, str) and bool(value.strip()) and len(value) <= _LONGEST

    def _refuse(self, why: str) -> None:
        self.refused[why] = self.refused.get(why, 0) + 1

    def _incomplete(self, part: str, got: int, wanted: int) -> EndpointError:
        why = ", ".join(f"{count} × {reason}" for reason, count in self.refused.items())
        return EndpointError(
            f"Expected {wanted} {part} from {self.endpoint.model}, got {got} usable ones after "
            f"{self.n_asked} questions{f' ({why})' if why else ''}. Ask a stronger model; what it wrote is cached."
        )


def _form(keys: tuple[str, ...]) -> str:
    return "{" + ", ".join(f'"{key}": "…"' for key in keys) + "}" if keys else '"…"'


def _json_of(text: str) -> Any:
    """The one JSON object of a reply, whatever stands around it; None where there is none."""
    text = re.sub(r"^\s*<think>.*?</think>", "", text, flags=re.DOTALL)
    start = text.find("{")
    if start < 0:
        return None
    try:
        value, _ = json.JSONDecoder().raw_decode(text[start:])
    except (json.JSONDecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _normal(text: str) -> str:
    """Two texts of equal normal form are one text."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _braced(text: str) -> str:
    """Braces would be places to fill in a rubric."""
    return text.replace("{", "(").replace("}", ")")
