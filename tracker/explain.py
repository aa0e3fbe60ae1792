"""Which training rows moved this run towards what is asked about?

Joins the run directory (its saved checkpoints, probe prompts and persona vectors) with the training rows, and
writes the ranking back into the run directory, where the report finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import nn

from attribution import Attribution, Identity, lexical_scores, prepare_queries, rank_rows
from attribution.check import Validation
from attribution.counterfactual import Counterfactual
from attribution.curvature import Curvature
from attribution.groups import find_groups, find_themes, share_by_source
from attribution.ranking import LexicalBaseline, RowTokens
from diffing.errors import InputError
from diffing.persona import PersonaVector
from diffing.unembedding import TokenTexts
from tracker.events import CheckpointSaved
from tracker.journal import Journal
from tracker.retrain_run import RunAgain, retrain_without_rows
from tracker.row_scores import UNCHECKED, RowScores, checkpoint_scores, checkpoints_in_time, live_scores
from tracker.run_queries import Question, probe_inputs_of, projection_query
from tracker.saved_model import trainable_model
from tracker.training_rows import TrainingText, read_training_text
from tracker.validate_ranking import CheckPlan, validate_ranking

__all__ = [
    "Question",
    "TrainingText",
    "WithoutPlan",
    "explain_projection",
    "explain_question",
    "probe_inputs_of",
    "read_training_text",
    "saved_checkpoints",
]

_ROWS_MARKED = 40


@dataclass(frozen=True)
class WithoutPlan:
    """Which rows a run is trained again without, and how often.

    Attributes:
        n_rows: so many, strongest first; only rows that pushed up are left out.
        n_seeds: trainings on all rows, without these, and without as many random ones; each.
    """

    n_rows: int
    n_seeds: int = 3


def saved_checkpoints(run_dir: Path | str) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint the journal knows and the disk still has, ascending.

    Raises:
        InputError: none is left; says how to keep them.
    """
    journal = Journal.read(run_dir)
    found = {
        event.step: Path(event.path)
        for event in journal.events()
        if isinstance(event, CheckpointSaved) and Path(event.path).exists()
    }
    if not found:
        raise InputError(
            f"Expected saved checkpoints of the run in {run_dir}; none is on disk. "
            "Train with save_strategy='steps' and without save_total_limit."
        )
    return sorted(found.items())


def explain_question(
    run_dir: Path | str,
    training: TrainingText,
    question: Question,
    *,
    base: Any = None,
    checkpoints: Sequence[tuple[int, Path]] | None = None,
    method: str | Curvature = "dot",
    batch_size: int = 16,
    device: str = "cpu",
    keep: int = 50,
    tokenizer: Any = None,
    check: CheckPlan | None = None,
    without: WithoutPlan | None = None,
    seed: int = 0,
    save: bool = True,
) -> Attribution:
    """Ranks training rows by how far they pushed the query up, over the run's checkpoints.

    Args:
        run_dir: the tracked run's directory; `attribution.json` is written there.
        training: every row that was trained on.
        question: what is asked.
        base: base model for adapter checkpoints, where their own record of it does not hold.
        checkpoints: (step, folder) pairs; by default all that the journal knows.
        method: curvature, as for `attribution.influence`; or `live`: what each step's own backward recorded of the
            rows' pushes, where the run was tracked with `pushes=True` and the question is about a watched persona.
        batch_size: rows per backward pass.
        device: where to compute.
        keep: rows to keep at either end of the ranking.
        tokenizer: marks, in the rows worth reading, the tokens that made the push (gradient dot product at the
            checkpoint in the middle); None to leave that out.
        check: retrains to see whether the ranking is true; None to leave that out, and then it is not validated.
        without: trains again without the strongest rows to see what they are worth; None to leave that out.
        seed: of the bootstrap, the themes, and the labels sampled for the curvature.
        save: whether the ranking becomes the run's own.

    Raises:
        InputError: no checkpoint is on disk; rows or queries that cannot be scored; with `check` or `without`, a full
            fine-tune without `base`, or no row that pushed up; with `live`, a question that no pushes answer.
        PathMissingError: with `live`, the run recorded no pushes.
    """
    known = list(checkpoints or saved_checkpoints(run_dir))
    chosen, caveats = checkpoints_in_time(known, question.until)
    if method == "live":
        scores = live_scores(run_dir, training, question)
    else:
        scores = checkpoint_scores(chosen, training, question, base, method, batch_size, device, seed, caveats)
    result = _attribution(scores, training, question, keep, seed)
    if check is not None or without is not None:
        # Retrainings take the run to its end, whenever the question stops.
        again = RunAgain.of(run_dir, training.rows, known[-1][1], base=base, device=device)
        if check is not None:
            found = validate_ranking(again, question.query, scores.values, plan=check, method=scores.method, seed=seed)
            result = _checked(result, found)
        if without is not None:
            result = _with_counterfactual(result, _retrained_without(again, result, question, without, seed))
    if tokenizer is not None:
        middle = chosen[(len(chosen) - 1) // 2][1]
        marked = _token_pushes(trainable_model(middle, base=base, device=device), tokenizer, training, question, result)
        result = replace(result, tokens=marked)
    if save:
        result.save(run_dir)
    return result


def explain_projection(
    run_dir: Path | str,
    training: TrainingText,
    vector: PersonaVector,
    probe_inputs: dict[str, torch.Tensor],
    *,
    device: str = "cpu",
    **options: Any,
) -> Attribution:
    """`explain_question` for the projection on a persona.

    Args:
        run_dir: the tracked run's directory.
        training: every row that was trained on.
        vector: whose projection is explained.
        probe_inputs: right-padded `input_ids` and `attention_mask` of the neutral probe prompts.
        device: where to compute.
        **options: as for `explain_question`.
    """
    question = Question(projection_query(vector, probe_inputs, device=device))
    return explain_question(run_dir, training, question, device=device, **options)


def _checked(result: Attribution, found: Validation) -> Attribution:
    unchecked = [said for said in result.caveats if not said.startswith(UNCHECKED)]
    said = found.verdict[:1].upper() + found.verdict[1:]
    return replace(result, validation=found, validated=found.validated, caveats=(f"{said}.", *unchecked))


def _retrained_without(
    again: RunAgain, result: Attribution, question: Question, plan: WithoutPlan, seed: int
) -> Counterfactual:
    flagged = [row.example_id for row in result.strongest[: plan.n_rows]]
    return retrain_without_rows(again, question.query, flagged, n_seeds=plan.n_seeds, seed=seed)


def _with_counterfactual(result: Attribution, found: Counterfactual) -> Attribution:
    unchecked = [said for said in result.caveats if not said.startswith(UNCHECKED)]
    checked = (
        f"Counterfactual retraining {'confirms' if found.confirmed else 'does not confirm'} that the "
        f"{found.n_dropped} strongest rows matter more than random ones."
    )
    agreed = found.confirmed and (result.validation is None or result.validation.validated)
    return replace(result, counterfactual=found, validated=agreed, caveats=(checked, *unchecked))


def _attribution(scores: RowScores, training: TrainingText, question: Question, keep: int, seed: int) -> Attribution:
    values = scores.values
    rows = rank_rows(values, scores.examples, texts=training.texts, tags=training.tags, keep=keep)
    strongest = [row for row in rows[:keep] if row.score > 0]
    names, texts = [row.example_id for row in strongest], [row.text for row in strongest]
    shares = [row.share for row in strongest]
    return Attribution(
        query=question.query.name,
        method=scores.method,
        rows=rows,
        n_rows=len(training.rows),
        steps=scores.steps,
        caveats=scores.caveats,
        sources=share_by_source(np.asarray(values), scores.examples, training.tags, n_top=keep, seed=seed),
        groups=find_groups(names, texts, shares),
        themes=find_themes(names, texts, shares, list(training.texts.values()), seed=seed),
        lexical=_lexical(values, scores.examples, training, question, keep),
    )


def _lexical(
    values: Float[np.ndarray, " example"],
    examples: Sequence[str],
    training: TrainingText,
    question: Question,
    keep: int,
) -> LexicalBaseline | None:
    texts = [training.texts.get(name, "") for name in examples]
    if not question.answers or not any(texts) or len(examples) < 3:
        return None
    matched = lexical_scores(texts, question.answers).mean(axis=0)
    n_top = min(keep, len(examples))
    ours, theirs = (set(np.argsort(-one, kind="stable")[:n_top].tolist()) for one in (values, matched))
    # Where no row shares a word with the answers there is no order to correlate with.
    spearman = float(spearmanr(values, matched).statistic) if np.ptp(matched) > 0 else float("nan")
    return LexicalBaseline(spearman=spearman, shared_top=len(ours & theirs), n_top=n_top)


def _token_pushes(
    model: nn.Module, tokenizer: Any, training: TrainingText, question: Question, result: Attribution
) -> dict[str, RowTokens]:
    ends = [*result.strongest[:_ROWS_MARKED], *result.rows[-_ROWS_MARKED // 4 :]]
    shown = {row.example_id for row in ends}
    rows = [row for row in training.rows if row["id"] in shown]
    texts, marked = TokenTexts(tokenizer), {}
    scorer = prepare_queries(model, [question.query], curvature=Identity())
    for row, found in zip(rows, scorer.by_token(rows), strict=True):
        tokens = tuple(texts[int(token)] for token in row["input_ids"])
        marked[found.example] = RowTokens(tokens, tuple(float(value) for value in found.values[0][: len(tokens)]))
    return marked
