"""What was asked of a run on the command line, and is it one thing?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracker.run_queries import Question


@dataclass(frozen=True)
class Asked:
    """The options of `palimpsest attribute` that say what is asked; exactly one of them but for `diff`, `prompts`.

    Attributes:
        persona: a tracked trait, or a vector file.
        query: a file of answers.
        latent: a latent's number, with `diff` and `prompts`.
        alert: an alert's id.
        canaries: whether the run's canaries are asked about.
        diff: with `latent`: folder of a diff; None for the run's own.
        prompts: with `latent`: a file of texts; None for the run's probe prompts.
    """

    persona: str | None = None
    query: Path | None = None
    latent: int | None = None
    alert: str | None = None
    canaries: bool = False
    diff: Path | None = None
    prompts: Path | None = None

    def check(self) -> None:
        """Refuses none or two things at once.

        Raises:
            InputError: likewise, or a latent's options without a latent.
        """
        from diffing.errors import InputError

        asked: dict[str, Any] = {
            "--persona": self.persona,
            "--query": self.query,
            "--latent": self.latent,
            "--alert": self.alert,
            "--canaries": self.canaries or None,
        }
        given = [name for name, value in asked.items() if value is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise InputError(f"Expected exactly one of {', '.join(asked)}, got {got}. Ask one thing at a time.")
        alone = [name for name, value in (("--diff", self.diff), ("--prompts", self.prompts)) if value is not None]
        if alone and self.latent is None:
            raise InputError(f"Expected {alone[0]} together with --latent, got it with {given[0]}. Leave it out.")

    def question(self, run_dir: Path, tokenizer: Any, *, base: str | None, max_length: int, device: str) -> Question:
        """What is asked, as a query.

        Raises:
            InputError: the run or the file cannot be asked this; says why.
        """
        from tracker import run_queries
        from tracker.training_rows import read_query

        if self.persona is not None:
            vector = run_queries.persona_of(run_dir, self.persona)
            return run_queries.persona_question(run_dir, vector, device=device)
        if self.query is not None:
            query, answers = read_query(self.query, tokenizer, max_length=max_length)
            return run_queries.Question(query, answers)
        if self.alert is not None:
            return run_queries.alert_question(run_dir, self.alert, tokenizer, device=device)
        if self.latent is not None:
            return self._latent_question(run_dir, self.latent, tokenizer, base, max_length, device)
        return run_queries.canary_question(run_dir, tokenizer)

    def _latent_question(
        self, run_dir: Path, latent: int, tokenizer: Any, base: str | None, max_length: int, device: str
    ) -> Question:
        from tracker.explain import saved_checkpoints
        from tracker.latent_question import latent_question, read_latent_texts

        texts = read_latent_texts(run_dir, self.prompts, tokenizer, max_length=max_length)
        diff = run_dir / "diff" if self.diff is None else self.diff
        return latent_question(saved_checkpoints(run_dir), diff, latent, texts, base=base, device=device)
