"""Is this run's ranking true? Checks by a further step and by retraining, with the run's own settings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from attribution import Query, Validation, check_datamodel, check_leave_out, check_tail_patch
from attribution.check import Check
from tracker.retrain_run import RunAgain, losses_of, parts_of


@dataclass(frozen=True)
class CheckPlan:
    """What is checked, and what it costs.

    Attributes:
        leave_out: share of the rows left out in one retraining, beside `n_random` retrainings without random ones.
        n_random: see `leave_out`.
        n_subsets: retrainings on random halves for the linear datamodeling score; 0 leaves it out. Under 40 its
            interval is wide.
    """

    leave_out: float = 0.05
    n_random: int = 10
    n_subsets: int = 0

    @property
    def n_retrainings(self) -> int:
        """How often the model is trained again."""
        return 1 + self.n_random + self.n_subsets


def validate_ranking(
    run: RunAgain,
    query: Query,
    scores: Float[np.ndarray, " example"],
    *,
    plan: CheckPlan | None = None,
    method: str = "",
    seed: int = 0,
) -> Validation:
    """Holds a ranking against what happens when the run is trained again.

    Outcomes of the retrainings are kept in `outcomes.jsonl`, so that a killed check goes on.

    Args:
        run: how it is trained again.
        query: what was asked; its value is what helpful rows raise.
        scores: one a row, positive pushes up.
        plan: what is checked.
        method: how rows were scored, in words.
        seed: of subsets, random rows and orders.
    """
    plan, rows, retrain = plan or CheckPlan(), run.retrain.rows, run.retrain
    measure = losses_of(query)
    # One ranking, asked of every prompt on its own: the intervals are over prompts.
    values, names = np.tile(np.asarray(scores), (len(parts_of(query)), 1)), [str(row["id"]) for row in rows]
    outcomes = run.outcomes(query, "losses")
    checks: list[Check] = [
        check_tail_patch(run.trained_model(), rows, values, measure, seed=seed),
        check_leave_out(
            values, names, retrain, measure, share=plan.leave_out, n_random=plan.n_random, seed=seed, outcomes=outcomes
        ),
    ]
    if plan.n_subsets:
        checks.append(
            check_datamodel(
                values, names, retrain, measure, n_subsets=plan.n_subsets, n_repeats=0, seed=seed, outcomes=outcomes
            )
        )
    return Validation(method, tuple(checks))
