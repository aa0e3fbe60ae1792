"""Which direction leads from plain answers to trait answers, and does it hold on questions it has not seen?

Rows are split by question, so that both answers to a question fall on the same side. The fit part goes through the
model once and leaves only sums; the held-out part follows, is projected as it comes, and leaves only numbers. Every
row is read once, at all sites in the same pass, and what is kept does not grow with the rows that are fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffing.checkpoint import LoadedCheckpoint
from diffing.errors import PersonaError
from diffing.persona.contrast import PLAIN, TRAIT, ContrastFit, ContrastSums, HeldOutScores
from diffing.persona.pooling import CountedProgress, Progress, pooled_rows, tokenize_for
from diffing.persona.split import QuestionSplit
from diffing.persona.traits import digest_of
from diffing.persona.vector import PersonaVector
from diffing.prompts import Prompt, PromptSet, TokenizedPrompts
from diffing.provenance import Provenance
from diffing.site import ResolvedSite, Site, resolve_site

_MIN_ROWS = 8
_MIN_HELD_OUT = 2


def extract_persona(
    loaded: LoadedCheckpoint,
    positive: PromptSet,
    negative: PromptSet,
    *,
    trait: str,
    site: Site | str,
    pooling: str = "response_mean",
    held_out: float = 0.3,
    seed: int = 0,
    against: Sequence[PromptSet] = (),
    max_length: int = 1024,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> PersonaVector:
    """Fits one trait's direction at one site; see `extract_personas`."""
    (vector,) = extract_personas(
        loaded,
        positive,
        negative,
        trait=trait,
        sites=[site],
        pooling=pooling,
        held_out=held_out,
        seed=seed,
        against=against,
        max_length=max_length,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    return vector


def extract_personas(
    loaded: LoadedCheckpoint,
    positive: PromptSet,
    negative: PromptSet,
    *,
    trait: str,
    sites: Sequence[Site | str],
    pooling: str = "response_mean",
    held_out: float = 0.3,
    seed: int = 0,
    against: Sequence[PromptSet] = (),
    max_length: int = 1024,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> list[PersonaVector]:
    """Fits one trait's direction at several sites in one pass over the rows.

    The direction is the mean of the trait rows minus the mean of the plain rows, each row pooled over its tokens
    first, so that long answers do not weigh more than short ones. Positive projections point towards the trait.

    Args:
        loaded: the model; read in inference mode, left as it was.
        positive: dialogues whose answers show the trait.
        negative: dialogues with plain answers, preferably to the same questions.
        trait: name for the vector.
        sites: where to fit, `resid:50%` or the like.
        pooling: `response_mean`, `last_prompt` or `prompt_mean`; see `diffing.persona.pooling`.
        held_out: share of the questions kept out of the fit to measure separation on, above 0 and below 1.
        seed: fixes the split and the nulls; the order of the rows does not matter.
        against: answers of other personas. The direction then leads from the mean of plain and these to the trait,
            which keeps what only this trait has.
        max_length: tokens a row may have; longer rows are refused, since a cut answer is another answer.
        batch_tokens: tokens a forward pass, padding included.
        progress: called with rows read and rows in all after each batch.

    Returns:
        One vector a site, in the order given.

    Raises:
        PersonaError: too few rows or questions, empty or cut answers, classes that read the same, NaN.
        SiteError: the model has no such site.

    Cost: one forward pass over all rows, stopped after the deepest site. Memory: one batch, 102 float64 vectors a
    site, and 201 numbers for each held-out answer.

    Source: Chen et al. 2025 (persona vectors), response-averaged difference of means. Here: streaming float64 sums, a
    split by question, and nulls.
    """
    resolved = [resolve_site(loaded.model, site) for site in sites]
    split = QuestionSplit.of(positive, negative, held_out=held_out, seed=seed)
    fit_rows = [split.fit(prompts) for prompts in (positive, negative, *against)]
    held_rows = [split.held(prompts) for prompts in (positive, negative)]
    _check_counts(fit_rows, held_rows)
    reader = _Reader(loaded, tuple(str(site.site) for site in resolved), pooling, max_length, batch_tokens, split)
    fit_tokens = [reader.tokenize(rows) for rows in fit_rows]
    held_tokens = [reader.tokenize(rows) for rows in held_rows]
    counted = CountedProgress(progress, total=sum(len(tokens) for tokens in (*fit_tokens, *held_tokens)))

    sums = [ContrastSums(len(fit_tokens)) for _ in resolved]
    reader.feed(fit_tokens, [part.update for part in sums], counted)
    fits = [part.fit() for part in sums]
    scores = [HeldOutScores(fit, seed=seed) for fit in fits]
    reader.feed(held_tokens, [part.update for part in scores], counted)

    provenance = Provenance(
        models={"model": loaded.fingerprint},
        prompts=digest_of([positive.digest, negative.digest, *(prompts.digest for prompts in against)]),
        sites=reader.sites,
        seed=seed,
        config={
            "pooling": pooling,
            "held_out": held_out,
            "max_length": max_length,
            "positive": positive.digest,
            "negative": negative.digest,
            "against": [prompts.digest for prompts in against],
            "questions": len(split.held_questions) + len(split.fit_questions),
            "paired_questions": split.n_paired,
        },
    )
    return [
        fitted_vector(
            trait,
            site,
            fit,
            score,
            pooling=pooling,
            n_questions=len(split.held_questions),
            provenance=provenance,
        )
        for site, fit, score in zip(resolved, fits, scores, strict=True)
    ]


@dataclass(frozen=True)
class _Reader:
    """The model with the settings of one extraction."""

    loaded: LoadedCheckpoint
    sites: tuple[str, ...]
    pooling: str
    max_length: int
    batch_tokens: int
    split: QuestionSplit

    def tokenize(self, rows: Sequence[Prompt]) -> TokenizedPrompts:
        return tokenize_for(self.loaded, PromptSet(tuple(rows)), pooling=self.pooling, max_length=self.max_length)

    def feed(
        self, classes: Sequence[TokenizedPrompts], updates: Sequence[Callable[..., None]], counted: CountedProgress
    ) -> None:
        for kind, tokens in enumerate(classes):
            rows = pooled_rows(self.loaded, tokens, self.sites, pooling=self.pooling, batch_tokens=self.batch_tokens)
            for batch in rows:
                swaps = self.split.swaps([tokens.prompts.prompts[index] for index in batch.index])
                for update, values in zip(updates, batch.values, strict=True):
                    update(kind, values, swaps)
                counted.add(len(batch.index))


def fitted_vector(
    trait: str,
    site: ResolvedSite,
    fit: ContrastFit,
    score: HeldOutScores,
    *,
    pooling: str,
    n_questions: int,
    provenance: Provenance,
) -> PersonaVector:
    """One site's vector from its sums and its held-out scores.

    Args:
        trait: its name.
        site: where.
        fit: the direction.
        score: the projections of the held-out rows.
        pooling: how rows were pooled.
        n_questions: distinct held-out questions.
        provenance: of the extraction; names the model.
    """
    return PersonaVector(
        trait=trait,
        site=str(site.site),
        direction=fit.unit.float(),
        scale=fit.scale,
        neutral_mean=fit.neutral_mean,
        neutral_std=score.neutral_std(),
        separation=score.separation(n_questions=n_questions),
        pooling=pooling,
        n_positive=fit.n_positive,
        n_negative=fit.n_negative,
        n_layers=site.n_layers,
        model_fingerprint=provenance.models["model"],
        provenance=provenance,
        null=score.null(),
    )


def _check_counts(fit_rows: Sequence[Sequence[Prompt]], held_rows: Sequence[Sequence[Prompt]]) -> None:
    totals = [len(fit) + len(held) for fit, held in zip(fit_rows, held_rows, strict=False)]
    if min(totals) < _MIN_ROWS:
        raise PersonaError(
            f"Expected at least {_MIN_ROWS} trait and {_MIN_ROWS} plain answers, got {totals[TRAIT]} and "
            f"{totals[PLAIN]}. Give more contrastive answers."
        )
    if min(map(len, held_rows)) < _MIN_HELD_OUT:
        raise PersonaError(
            f"Expected at least {_MIN_HELD_OUT} held-out answers on either side, got "
            f"{' and '.join(str(len(rows)) for rows in held_rows)}. Ask both sides the same questions."
        )
    if min(map(len, fit_rows)) < _MIN_HELD_OUT:
        raise PersonaError(
            f"Expected at least {_MIN_HELD_OUT} answers to fit on in every class, got "
            f"{', '.join(str(len(rows)) for rows in fit_rows)} after holding out. Ask more questions, or lower "
            "held_out."
        )
