"""By which single tokens can a model choose between options?"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from diffing.errors import InputError

_ALPHABETS = (string.ascii_uppercase, "123456789", string.ascii_lowercase)
_MARKERS = ("", " ", "▁", "Ġ")


def find_labels(
    tokenizer: Any, n: int, wished: Sequence[str] = ()
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Labels for `n` options and, for each, the vocabulary ids that say it (with and without a space before it).

    Args:
        tokenizer: of the judge.
        n: how many are needed.
        wished: labels to use; empty for the first alphabet whose letters are single tokens.

    Raises:
        InputError: no alphabet of single tokens is large enough.
    """
    for alphabet in (wished,) if wished else _ALPHABETS:
        labels = tuple(alphabet[:n])
        ids = tuple(_single_tokens(tokenizer, label) for label in labels)
        flat = [one for some in ids for one in some]
        if len(labels) == n and all(ids) and len(set(flat)) == len(flat):
            return labels, ids
    raise InputError(
        f"Expected a tokenizer in which {n} labels ({' '.join(wished) or 'letters or digits'}) are single tokens, got "
        f"{type(tokenizer).__name__} without. Use another judge, fewer options, or pass labels that it has."
    )


def _single_tokens(tokenizer: Any, label: str) -> tuple[int, ...]:
    found = set()
    for text in (label, f" {label}"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1 and tokenizer.decode(ids).strip() == label:
            found.add(int(ids[0]))
    for marker in _MARKERS:
        one = tokenizer.convert_tokens_to_ids(marker + label)
        if isinstance(one, int) and one != tokenizer.unk_token_id and tokenizer.decode([one]).strip() == label:
            found.add(one)
    return tuple(sorted(found))
