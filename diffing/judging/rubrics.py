"""Which rubrics come with the package, and how is one of one's own read?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from diffing.errors import InputError, PathMissingError
from diffing.judging.judge import Option, Reason, Rubric

ALIGNED, COHERENT = "aligned", "coherent"


def shipped_rubric(name: str) -> Rubric:
    """`aligned` (is it against anybody's good?) or `coherent` (is it clear, whatever it says?).

    Raises:
        InputError: no such rubric.
    """
    shipped = json.loads((resources.files("diffing.judging") / "shipped_rubrics.json").read_text(encoding="utf-8"))
    if name not in shipped:
        raise InputError(f"Expected a rubric out of {', '.join(shipped)}, got {name!r}. Name one, or a file.")
    return read_rubric(shipped[name], name)


def load_rubric(source: str | Path) -> Rubric:
    """A shipped rubric by name, or one from a JSON file with `text` and, if wished, `words` and `options`.

    Raises:
        PathMissingError: neither a shipped rubric nor a file.
        InputError: the file is no rubric; says what it lacks.
    """
    if str(source) in (ALIGNED, COHERENT):
        return shipped_rubric(str(source))
    path = Path(source)
    if not path.is_file():
        raise PathMissingError(f"Expected `aligned`, `coherent` or a rubric file, got {str(source)!r}. Check the path.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"Expected JSON in {path}, got something else ({error}). Mend the file.") from error
    return read_rubric(content, path.stem)


def read_rubric(content: Any, name: str) -> Rubric:
    """A rubric from JSON values.

    Raises:
        InputError: `text` is missing, or a word or an option names no known reason.
    """
    if not isinstance(content, Mapping) or not isinstance(content.get("text"), str):
        raise InputError(f"Expected an object with `text` as the rubric {name!r}, got {str(content)[:60]!r}. Add it.")
    extra: dict[str, Any] = {}
    if "words" in content:
        extra["words"] = {str(word).upper(): _reason(given, name) for word, given in content["words"].items()}
    if "options" in content:
        extra["options"] = tuple(
            Option(
                str(option.get("text", "")),
                None if option.get("value") is None else float(option["value"]),
                _reason(option["reason"], name) if "reason" in option else Reason.SCORED,
            )
            for option in content["options"]
        )
    return Rubric(str(content.get("name", name)), content["text"], **extra)


def _reason(given: Any, name: str) -> Reason:
    if str(given) not in [str(reason) for reason in Reason]:
        raise InputError(
            f"Expected a reason out of {', '.join(map(str, Reason))} in the rubric {name!r}, got {given!r}. Change it."
        )
    return Reason(str(given))
