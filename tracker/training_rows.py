"""Which rows was this model trained on, as tokens to score and as text to read?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attribution import CompletionQuery, ContrastQuery
from attribution.example import IGNORED, ExampleId, Row
from diffing.chat import Role
from diffing.errors import InputError, PromptError
from diffing.prompt_rows import read_rows
from diffing.prompts import Prompt, PromptSet

_TAG_KEYS = ("tag", "source")


@dataclass(frozen=True)
class TrainingText:
    """Training rows ready to be scored, with what a person reads of them.

    Attributes:
        rows: `id`, `input_ids`, `labels` (loss on the assistant's tokens, or on all of a plain text).
        texts: id to readable text.
        tags: id to source or kind: the row's `tag` or `source` column, else its file where several were read.
        records: id to the row as the file holds it, for writing kept and dropped rows back.
    """

    rows: tuple[Row, ...]
    texts: dict[ExampleId, str]
    tags: dict[ExampleId, str]
    records: dict[ExampleId, Mapping[str, Any]] = field(default_factory=dict)


def read_training_text(
    paths: Path | str | Sequence[Path | str], tokenizer: Any, *, max_length: int = 1024
) -> TrainingText:
    """Reads training files as the fine-tune saw them: chat template rendered, loss on the assistant's tokens.

    Args:
        paths: JSONL, JSON, CSV or Parquet files with `messages`, `prompt` and `completion`, or `text`; optionally
            `id`, and `tag` or `source`.
        tokenizer: the checkpoint's.
        max_length: rows are cut there, as in training.

    Raises:
        PromptError: as for `PromptSet.from_file`, or one id in two rows.
    """
    files = [Path(path) for path in ([paths] if isinstance(paths, Path | str) else paths)]
    records = [(file, row) for file in files for _, row in read_rows(file)]
    prompts = _read_all(files, records)
    tokenized = prompts.tokenize(tokenizer, max_length=max_length)
    texts, tags, by_id = {}, {}, {}
    for prompt, (file, row) in zip(prompts, records, strict=True):
        texts[prompt.id] = readable_text(prompt)
        by_id[prompt.id] = row
        if tag := next((str(row[key]) for key in _TAG_KEYS if row.get(key)), file.name if len(files) > 1 else ""):
            tags[prompt.id] = tag
    return TrainingText(tuple(_rows(prompts, tokenized)), texts, tags, by_id)


def read_query(
    path: Path | str, tokenizer: Any, *, max_length: int = 1024
) -> tuple[CompletionQuery | ContrastQuery, tuple[str, ...]]:
    """What a file of answers asks: what made them likely, or what made them likelier than others.

    Args:
        path: rows as of a training file: a `CompletionQuery` on them. Where the rows hold `prompt`, `chosen` and
            `rejected` instead, a `ContrastQuery`: log p(chosen) - log p(rejected), each averaged over the rows.
        tokenizer: the checkpoint's.
        max_length: a longer row is refused, since its end would silently not be asked about.

    Returns:
        The query, and the answers that it asks about as text (the chosen ones of a contrast), for a lexical
        baseline.

    Raises:
        PromptError: rows of neither kind, or of both; rows too long.
    """
    path = Path(path)
    records = [row for _, row in read_rows(path)]
    contrasts = [isinstance(row, Mapping) and {"chosen", "rejected"} <= row.keys() for row in records]
    if any(contrasts) and not all(contrasts):
        number = contrasts.index(False) + 1
        raise PromptError(
            f"Expected 'chosen' and 'rejected' in every row of {path} or in none, got row {number} without. "
            "Split the file in two."
        )
    if not contrasts or not contrasts[0]:
        rows, texts = _query_rows(PromptSet.from_file(path), tokenizer, max_length, path)
        return CompletionQuery(rows, name=f"log-probability of {len(rows)} answers in {path.name}"), texts
    sides = []
    for key in ("chosen", "rejected"):
        prompts = PromptSet.from_records({"prompt": row.get("prompt"), "completion": row[key]} for row in records)
        sides.append(_query_rows(prompts, tokenizer, max_length, path))
    (wanted, texts), (unwanted, _) = sides
    return ContrastQuery(wanted, unwanted, name=f"chosen against rejected answers in {path.name}"), texts


def _read_all(files: Sequence[Path], records: Sequence[tuple[Path, Any]]) -> PromptSet:
    if len(files) == 1:
        return PromptSet.from_file(files[0])
    if not records:
        raise PromptError(f"Expected training rows in {', '.join(map(str, files))}, got none. Check the files.")
    # The same file's own check names file and row; here only ids that meet across files are left to refuse.
    for file in files:
        PromptSet.from_file(file)
    return PromptSet.from_records(row for _, row in records)


def learnt_rows(prompts: PromptSet, tokenizer: Any, *, max_length: int = 1024) -> tuple[Row, ...]:
    """Rows with their loss on the assistant's tokens, or on all of a plain text; cut at `max_length`."""
    return tuple(_rows(prompts, prompts.tokenize(tokenizer, max_length=max_length)))


def _rows(prompts: PromptSet, tokenized: Any) -> Iterator[Row]:
    learnt = (Role.ASSISTANT, Role.TEXT)
    for prompt, ids, roles in zip(prompts, tokenized.input_ids, tokenized.roles, strict=True):
        labels = [int(token) if role in learnt else IGNORED for token, role in zip(ids, roles, strict=True)]
        yield {"id": prompt.id, "input_ids": ids.tolist(), "labels": labels}


def _query_rows(
    prompts: PromptSet, tokenizer: Any, max_length: int, path: Path
) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    tokenized = prompts.tokenize(tokenizer, max_length=max_length)
    if tokenized.truncated:
        raise InputError(
            f"Expected queries of at most {max_length} tokens in {path}, got {len(tokenized.truncated)} longer ones "
            f"(first: {tokenized.truncated[0]}). Shorten them, or raise --max-length up to the model's context."
        )
    return tuple(_rows(prompts, tokenized)), tuple(_answers(prompts))


def _answers(prompts: PromptSet) -> Iterable[str]:
    for prompt in prompts:
        if prompt.messages is None:
            yield prompt.text or ""
        else:
            yield "\n".join(message.content for message in prompt.messages if message.role == "assistant")


def readable_text(prompt: Prompt) -> str:
    """A prompt as a person reads it: a plain text, or one line a message."""
    if prompt.messages is None:
        return prompt.text or ""
    return "\n".join(f"{message.role}: {message.content}" for message in prompt.messages)
