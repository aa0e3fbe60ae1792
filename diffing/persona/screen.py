"""Which rows of a dataset would teach a persona, before anything is trained on them?

Every row gets several scores, each made in another way, so that none has to be believed alone. All are positive
towards the trait, but for the two that know of no trait and stand beside them: how surprising the answer is, and
what random directions say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from diffing.answers import AnswerSettings
from diffing.checkpoint import LoadedCheckpoint
from diffing.errors import InputError
from diffing.persona.answered_rows import AnsweredRows, read_answers, take_apart
from diffing.persona.axes import Axis, plain_axis, random_axes, unique_axis
from diffing.persona.instructed import Instructions, instructed_log_odds, log_likelihood
from diffing.persona.own_answers import own_answers
from diffing.persona.project import mean_interval
from diffing.persona.vector import PersonaVector
from diffing.prompts import PromptSet

Progress = Callable[[int, int], None]

METHODS = {
    "difference": "projection of the row's answer less that of the model's own answers to the same prompt",
    "unique": "the same, along what only this trait has: away from plain answers and all other personas at once",
    "conditional": "projection of the row's answer less what its prompt's last token lets expect (least squares "
    "over the rows; nothing is generated)",
    "instructed": "log-probability of the answer when asked for the trait, less that under all other ways to ask",
    "push": "how far training on the row moves what is asked about, to first order: minus the inner product of the "
    "row's loss gradient, less the mean row's, and its gradient, over the row's norm",
    "surprise": "mean negative log-likelihood of the answer's tokens; it knows of no trait",
}


@dataclass(frozen=True, eq=False)
class Score:
    """One number a row.

    Attributes:
        method: one of `METHODS`.
        trait: towards which it is positive; empty for `surprise`.
        unit: `gap`, `nats`, `cosine`.
        values: `[row]`, in the order of the rows.
        mean: over rows: the dataset's score.
        low: lower end of the 95 % t interval over rows, None for one row.
        high: upper end.
        random_95: 95 % of random directions have a dataset score of smaller size; None where that has no meaning.
    """

    method: str
    trait: str
    unit: str
    values: Float64[ndarray, " row"]
    mean: float
    low: float | None
    high: float | None
    random_95: float | None = None

    @classmethod
    def of(
        cls, method: str, trait: str, unit: str, values: Float64[ndarray, " row"], random_95: float | None = None
    ) -> Score:
        """The score with its mean and interval."""
        return cls(method, trait, unit, values, *mean_interval(values), random_95)

    @property
    def name(self) -> str:
        """Short, unique within a screening."""
        return f"{self.method} {self.trait}".strip()


@dataclass(frozen=True, eq=False)
class Screening:
    """All scores of a dataset.

    Attributes:
        rows: as given.
        scores: in the order of `METHODS`, traits within.
        random: `[direction, row]`, what random directions say in the unit of the first vector; projection differences
            where own answers were drawn, else conditional ones.
        own: the model's own answers as text, `[row][sample]`; empty where none were drawn.
        model: name of the base model.
        fingerprint: of its weights.
        notes: what a reader must know.
    """

    rows: PromptSet
    scores: tuple[Score, ...]
    random: Float64[ndarray, "direction row"]
    own: tuple[tuple[str, ...], ...]
    model: str
    fingerprint: str
    notes: tuple[str, ...] = ()

    def score(self, method: str, trait: str = "") -> Score:
        """One score by method and trait.

        Raises:
            InputError: it was not made.
        """
        for one in self.scores:
            if one.method == method and trait in ("", one.trait):
                return one
        made = ", ".join(dict.fromkeys(one.method for one in self.scores))
        raise InputError(f"Expected a score that was made ({made}), got {method!r}. Ask for one of these.")

    def with_score(self, score: Score) -> Screening:
        """The screening with one score more, made elsewhere from the same rows (a gradient push)."""
        order = list(METHODS)
        scores = sorted((*self.scores, score), key=lambda one: order.index(one.method))
        return replace(self, scores=tuple(scores))


@dataclass(frozen=True)
class ScreenSettings:
    """How a dataset is screened.

    Attributes:
        answers: how the model's own answers are drawn; None draws none, which leaves out `difference` and `unique`
            against own answers, and reads `unique` as `conditional` does.
        n_random: random directions beside the trait's.
        seed: of the random directions.
        max_length: most tokens of a row.
        batch_tokens: tokens a forward pass.
    """

    answers: AnswerSettings | None = field(default_factory=AnswerSettings)
    n_random: int = 20
    seed: int = 0
    max_length: int = 1024
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        if self.n_random < 20:
            raise InputError(
                f"Expected at least 20 random directions, got {self.n_random}. Fewer cannot say what is usual."
            )


def screen_rows(
    loaded: LoadedCheckpoint,
    rows: PromptSet,
    vectors: Sequence[PersonaVector],
    *,
    against: Sequence[PersonaVector] = (),
    instructions: Mapping[str, Instructions] | None = None,
    settings: ScreenSettings = ScreenSettings(),
    cache: Path | str | None = None,
    derived_from: str | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> Screening:
    """Scores every row of a dataset; nothing is trained and the model is left as it was.

    Args:
        loaded: the base model that would be trained.
        rows: the dataset, each row a dialogue that ends with an answer.
        vectors: traits to look for, fitted on this model.
        against: other personas at the same sites, for `unique`; a vector is never held against itself.
        instructions: trait to what to ask for, for `instructed`; a trait without an entry has no such score.
        settings: how to read.
        cache: file that keeps the model's own answers, so that a stopped run goes on.
        derived_from: fingerprint of the vectors' model, where `loaded` is a full fine-tune of it.
        progress: gives, for what is being done, a function of done and total.

    Raises:
        PersonaError: a vector of another model, rows without answers, too long or unreadable.

    Cost: two forward passes over the rows (`surprise`; reading), one over the own answers plus their generation, and
    one for each system prompt of `instructions`; `plan_screening` says how many tokens these are.
    """
    for vector in (*vectors, *against):
        vector.check_fits(loaded, derived_from=derived_from)
    shown = progress or (lambda what: lambda done, total: None)
    parts = take_apart(loaded, rows, max_length=settings.max_length)
    named = [plain_axis(vector) for vector in vectors]
    if against:
        named += [unique_axis(vector, _others(vector, against)) for vector in vectors if _others(vector, against)]
    axes = [*named, *random_axes(named[0], settings.n_random, seed=settings.seed)]
    answer, prompt = _read(loaded, parts, parts.answers, axes, settings.batch_tokens, shown("Reading answers"))
    own: tuple[tuple[np.ndarray, ...], ...] = ()
    difference = conditional = answer - _predicted(answer, prompt)
    if settings.answers is not None:
        own = own_answers(loaded, parts.prompts, settings.answers, cache=cache, progress=shown("Own answers"))
        difference = answer - _own_mean(loaded, parts, own, axes, settings.batch_tokens, shown("Reading own answers"))
    scores = _projection_scores(vectors, named, difference, conditional, answer, has_own=bool(own))
    plain = log_likelihood(loaded, parts, batch_tokens=settings.batch_tokens)
    for trait, wanted in (instructions or {}).items():
        odds = instructed_log_odds(
            loaded, parts, plain, wanted, max_length=settings.max_length, batch_tokens=settings.batch_tokens,
            progress=shown(f"Asking for {trait}"),
        )  # fmt: skip
        scores.append(Score.of("instructed", trait, "nats", odds))
    scores.append(Score.of("surprise", "", "nats", -plain / np.array([len(one) for one in parts.answers])))
    order = list(METHODS)
    return Screening(
        rows=rows,
        scores=tuple(sorted(scores, key=lambda one: order.index(one.method))),
        random=difference[len(named) :],
        own=tuple(tuple(str(loaded.tokenizer.decode(one, skip_special_tokens=True)) for one in each) for each in own),
        model=loaded.name,
        fingerprint=loaded.fingerprint,
        notes=tuple(_notes(parts, own)),
    )


def _others(vector: PersonaVector, against: Sequence[PersonaVector]) -> list[PersonaVector]:
    return [other for other in against if other.trait != vector.trait and other.site == vector.site]


def _read(
    loaded: LoadedCheckpoint,
    parts: AnsweredRows,
    answers: Sequence[ndarray],
    axes: Sequence[Axis],
    batch_tokens: int,
    progress: Progress,
) -> tuple[Float64[ndarray, "axis row"], Float64[ndarray, "axis row"]]:
    """Projections of answers and of their prompts' last tokens, in gaps from the model's own origin."""
    sites = tuple(dict.fromkeys(axis.site for axis in axes))
    answer, prompt = np.empty((2, len(axes), len(answers)))
    done = 0
    for batch in read_answers(loaded, parts.prompts, answers, sites, batch_tokens=batch_tokens):
        places = list(batch.index)
        for at, axis in enumerate(axes):
            site = sites.index(axis.site)
            answer[at, places] = (batch.answer[site] @ axis.direction).numpy() / axis.scale
            prompt[at, places] = (batch.prompt[site] @ axis.direction).numpy() / axis.scale
        done += len(places)
        progress(done, len(answers))
    return answer, prompt


def _own_mean(
    loaded: LoadedCheckpoint,
    parts: AnsweredRows,
    own: Sequence[Sequence[ndarray]],
    axes: Sequence[Axis],
    batch_tokens: int,
    progress: Progress,
) -> Float64[ndarray, "axis row"]:
    draws = range(len(own[0]))
    read = (_read(loaded, parts, [each[draw] for each in own], axes, batch_tokens, progress)[0] for draw in draws)
    return np.mean(list(read), axis=0)


def _predicted(
    answer: Float64[ndarray, "axis row"], prompt: Float64[ndarray, "axis row"]
) -> Float64[ndarray, "axis row"]:
    """What a prompt's last token lets expect of its answer: least squares over the rows, axis by axis."""
    centred = prompt - prompt.mean(axis=1, keepdims=True)
    spread = (centred**2).sum(axis=1)
    slope = np.divide((centred * answer).sum(axis=1), spread, out=np.zeros_like(spread), where=spread > 1e-12)
    return answer.mean(axis=1, keepdims=True) + slope[:, None] * centred


def _projection_scores(
    vectors: Sequence[PersonaVector],
    named: Sequence[Axis],
    difference: Float64[ndarray, "axis row"],
    conditional: Float64[ndarray, "axis row"],
    answer: Float64[ndarray, "axis row"],
    *,
    has_own: bool,
) -> list[Score]:
    bound = float(np.quantile(np.abs(difference[len(named) :].mean(axis=1)), 0.95)) if has_own else None
    scores = []
    for at, axis in enumerate(named):
        if has_own or axis.unique:
            method = "unique" if axis.unique else "difference"
            scores.append(Score.of(method, axis.trait, "gap", difference[at], bound))
        if not axis.unique:
            # The residual alone has mean 0; the plain answers of the extraction give the dataset a place again.
            offset = answer[at].mean() - vectors[at].neutral_mean / axis.scale
            scores.append(Score.of("conditional", axis.trait, "gap", conditional[at] + offset))
    return scores


def _notes(parts: AnsweredRows, own: Sequence[Sequence[ndarray]]) -> Iterator[str]:
    yield from parts.prompts.notes
    if not own:
        yield (
            "The model's own answers were not drawn: projections are held against what their prompts let expect, "
            "which misses what a whole dataset has in common."
        )
    same = sum(
        any(np.array_equal(one, answer) for one in each) for each, answer in zip(own, parts.answers, strict=False)
    )
    if same:
        yield f"{same:,} of {len(parts):,} rows are what the model answers anyway: their difference is 0."
    empty = sum(not len(one) for each in own for one in each)
    if empty:
        yield f"{empty:,} own answers are empty; they are read at the last token of their prompt."
