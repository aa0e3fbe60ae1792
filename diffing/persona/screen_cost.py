"""What will a screening cost, in tokens, before it starts?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diffing.persona.answered_rows import AnsweredRows
from diffing.persona.instructed import Instructions
from diffing.persona.screen import ScreenSettings

# A backward pass costs two forward passes (Kaplan et al. 2020, table 1).
_BACKWARD = 3


@dataclass(frozen=True)
class ScreenCost:
    """Tokens that go through the model.

    Attributes:
        rows: rows of the dataset.
        row_tokens: tokens of all rows, read once.
        read: tokens of all forward passes, without generation.
        generated: most tokens that will be written; fewer where answers end before the limit.
        differentiated: tokens of forward and backward passes, for pushes.
    """

    rows: int
    row_tokens: int
    read: int
    generated: int
    differentiated: int

    @property
    def total(self) -> int:
        """In tokens of a forward pass: a written one counts as one, a differentiated one as three."""
        return self.read + self.generated + _BACKWARD * self.differentiated

    def __str__(self) -> str:
        parts = [f"reads {self.read:,} tokens ({self.read / max(self.row_tokens, 1):.1f} times the rows)"]
        if self.generated:
            parts.append(f"writes at most {self.generated:,}")
        if self.differentiated:
            parts.append(f"differentiates {self.differentiated:,}")
        return f"{self.rows:,} rows of {self.row_tokens:,} tokens: {', '.join(parts)}."


def plan_screening(
    parts: AnsweredRows,
    settings: ScreenSettings,
    *,
    instructions: Mapping[str, Instructions] | None = None,
    push: bool = False,
) -> ScreenCost:
    """Counts tokens; nothing is run.

    Args:
        parts: the rows, taken apart.
        settings: how they will be read.
        instructions: trait to what will be asked for.
        push: whether gradients will be taken as well.
    """
    tokens, n = parts.n_tokens, len(parts)
    written = 0 if settings.answers is None else n * settings.answers.samples * settings.answers.max_new_tokens
    again = 0 if settings.answers is None else settings.answers.samples * parts.prompts.n_tokens + written
    asked = sum(one.n_prompts for one in (instructions or {}).values())
    return ScreenCost(n, tokens, tokens * (2 + asked) + again, written, tokens if push else 0)
