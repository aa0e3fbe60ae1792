"""How is a linear probe trained on labelled texts, and what is it worth on questions that it has never seen?

Questions are never on both sides of a split; what the probe is worth is measured on questions that neither its weights
nor its penalty have seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float64
from sklearn.linear_model import LogisticRegression

from diffing.checkpoint import LoadedCheckpoint
from diffing.errors import PersonaError
from diffing.interval import Share
from diffing.persona.linear_probe import LinearProbe, ProbeWorth, pooled_features
from diffing.persona.separation import area_under_curve, auroc_interval
from diffing.persona.split import QuestionSplit, question_of
from diffing.prompts import Prompt, PromptSet
from diffing.provenance import Provenance
from diffing.site import Site, resolve_site

_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
_FOLDS = 4
_MIN_QUESTIONS = 8


def train_probe(
    loaded: LoadedCheckpoint,
    positive: PromptSet,
    negative: PromptSet,
    *,
    name: str,
    site: Site | str,
    pooling: str = "response_mean",
    held_out: float = 0.3,
    rate: float = 0.01,
    seed: int = 0,
    max_length: int = 1024,
    batch_tokens: int = 8192,
) -> LinearProbe:
    """Trains a probe on labelled texts and measures it on held-out questions.

    Args:
        loaded: the model that reads.
        positive: texts of the kind that is looked for.
        negative: texts of the other kind, preferably to the same questions.
        name: for the probe.
        site: where to read.
        pooling: `response_mean`, `last_prompt` or `prompt_mean`.
        held_out: share of the questions that measure.
        rate: false-positive rate at which recall is told.
        seed: fixes splits and folds; the order of the rows does not matter.
        max_length: most tokens of a row.
        batch_tokens: most tokens in one forward.

    Raises:
        PersonaError: too few questions, or only one kind on a side of the split.

    Cost: one forward pass over the texts; memory `[text, d_model]` in float64.
    """
    split = QuestionSplit.of(positive, negative, held_out=held_out, seed=seed)
    if len(split.fit_questions) < _MIN_QUESTIONS:
        raise PersonaError(
            f"Expected at least {_MIN_QUESTIONS} questions to train on, got {len(split.fit_questions)} after holding "
            f"out {len(split.held_questions)}. Give more labelled texts."
        )
    rows = [(row, kind) for kind, prompts in ((1, positive), (0, negative)) for row in prompts]
    # In an order of their own, so that sums do not depend on that of the files.
    rows.sort(key=lambda pair: (pair[1], pair[0].id))
    values = pooled_features(
        loaded, PromptSet(tuple(row for row, _ in rows)), site, pooling, max_length, batch_tokens
    ).numpy()
    kinds = np.array([kind for _, kind in rows])
    held = np.array([question_of(row) in split.held_questions for row, _ in rows])
    for part, which in (("fit", ~held), ("hold out", held)):
        if len(set(kinds[which].tolist())) < 2:
            raise PersonaError(f"Expected texts of both kinds to {part}, got one. Ask both the same questions.")
    folds = _folds([row for (row, _), out in zip(rows, held, strict=True) if not out], seed)
    penalty = _best_penalty(values[~held], kinds[~held], folds)
    mean, scale = _standards(values[~held])
    model = _fitted((values[~held] - mean) / scale, kinds[~held], penalty)
    weights, bias = model.coef_[0].astype(np.float64), float(model.intercept_[0])
    scores = ((values[held] - mean) / scale) @ weights + bias
    resolved = resolve_site(loaded.model, site)
    return LinearProbe(
        name=name,
        site=str(resolved.site),
        pooling=pooling,
        weights=torch.from_numpy(weights),
        bias=bias,
        mean=torch.from_numpy(mean),
        scale=torch.from_numpy(scale),
        penalty=penalty,
        worth=measure_worth(
            scores[kinds[held] == 1], scores[kinds[held] == 0], rate=rate, n_questions=len(split.held_questions)
        ),
        n_layers=resolved.n_layers,
        model_fingerprint=loaded.fingerprint,
        provenance=Provenance(
            models={"model": loaded.fingerprint},
            sites=(str(resolved.site),),
            seed=seed,
            config={
                "positive": positive.digest,
                "negative": negative.digest,
                "held_out": held_out,
                "pooling": pooling,
                "fit_texts": int((~held).sum()),
                "fit_questions": len(split.fit_questions),
            },
        ),
    )


def measure_worth(
    positive: Float64[np.ndarray, " positive"],
    negative: Float64[np.ndarray, " negative"],
    *,
    rate: float,
    n_questions: int,
) -> ProbeWorth:
    """AUROC, and recall at a false-positive rate, of scores of texts that were not fitted."""
    auroc = area_under_curve(positive, negative)
    low, high = auroc_interval(auroc, min(len(positive), n_questions), min(len(negative), n_questions))
    rank = math.ceil((len(negative) + 1) * (1 - rate) - 1e-9)
    threshold = recall = None
    share = Share(0.0, 0.0, 1.0, 0, 0)
    if rank <= len(negative):
        threshold = float(np.sort(negative)[rank - 1])
        recall = float((positive > threshold).mean())
        effective = min(len(positive), n_questions)
        share = _wilson(recall, effective)
    return ProbeWorth(
        auroc=auroc,
        low=low,
        high=high,
        recall=recall,
        recall_low=None if recall is None else share.low,
        recall_high=None if recall is None else share.high,
        threshold=threshold,
        rate=rate,
        n_positive=len(positive),
        n_negative=len(negative),
        n_questions=n_questions,
    )


def _wilson(value: float, n: int) -> Share:
    # The share itself may be of more texts than there are questions; it is as sure as n of them.
    return Share.of(round(value * n), n)


def _standards(values: Float64[np.ndarray, "row d_model"]) -> tuple[np.ndarray, np.ndarray]:
    spread = values.std(axis=0)
    return values.mean(axis=0), np.where(spread > 1e-12, spread, 1.0)


def _fitted(values: Float64[np.ndarray, "row d_model"], kinds: np.ndarray, penalty: float) -> LogisticRegression:
    return LogisticRegression(C=penalty, class_weight="balanced", max_iter=5000, tol=1e-5).fit(values, kinds)


def _folds(rows: Sequence[Prompt], seed: int) -> np.ndarray:
    """Number of the fold of each row; a question is in one only."""
    questions = sorted({question_of(row) for row in rows})
    order = np.random.default_rng(seed).permutation(len(questions))
    place = {question: int(order[at]) % _FOLDS for at, question in enumerate(questions)}
    return np.array([place[question_of(row)] for row in rows])


def _best_penalty(values: Float64[np.ndarray, "row d_model"], kinds: np.ndarray, folds: np.ndarray) -> float:
    """The strongest penalty whose AUROC over left-out questions is within a thousandth of the best one."""
    reached: dict[float, float] = {}
    for penalty in _PENALTIES:
        found = []
        for fold in range(_FOLDS):
            out = folds == fold
            if len(set(kinds[out].tolist())) < 2 or len(set(kinds[~out].tolist())) < 2:
                continue
            mean, scale = _standards(values[~out])
            scores = _fitted((values[~out] - mean) / scale, kinds[~out], penalty).decision_function(
                (values[out] - mean) / scale
            )
            found.append(area_under_curve(scores[kinds[out] == 1], scores[kinds[out] == 0]))
        reached[penalty] = float(np.mean(found)) if found else 0.5
    best = max(reached.values())
    return next(penalty for penalty in _PENALTIES if reached[penalty] >= best - 1e-3)
