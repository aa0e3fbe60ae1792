"""Which training rows did it?"""

from attribution.check import Check, Validation
from attribution.curvature import Curvature, EkfacCurvature, Identity
from attribution.curvature_file import load_curvature, save_curvature
from attribution.fit import fit_curvature, fit_ekfac
from attribution.forecast import Forecast, ForecastSettings, forecast
from attribution.index import GradientIndex
from attribution.influence import InfluenceScores, influence, score_query
from attribution.lexical import lexical_scores
from attribution.live_rows import KeepExampleIds
from attribution.outcomes import Outcomes
from attribution.planted import check_planted, make_plants
from attribution.pushes import Pushes, measure_pushes
from attribution.queries import (
    CompletionQuery,
    ContrastQuery,
    LatentQuery,
    LogitDifferenceQuery,
    ProjectionQuery,
    Query,
)
from attribution.ranking import Attribution, AttributionRow, rank_rows
from attribution.retraining import Retraining
from attribution.score_store import ScoreStore, write_scores
from attribution.scorer import Scorer, TopRows, prepare_queries, prepare_rows
from attribution.source import Segment, source_scores
from attribution.tail_patch import check_tail_patch
from attribution.trajectory import SavedStep, influence_along, score_trajectory
from attribution.validate import check_datamodel, check_leave_out

__all__ = [
    "Attribution",
    "AttributionRow",
    "Check",
    "CompletionQuery",
    "ContrastQuery",
    "Curvature",
    "EkfacCurvature",
    "Forecast",
    "ForecastSettings",
    "GradientIndex",
    "Identity",
    "InfluenceScores",
    "KeepExampleIds",
    "LatentQuery",
    "LogitDifferenceQuery",
    "Outcomes",
    "ProjectionQuery",
    "Pushes",
    "Query",
    "Retraining",
    "SavedStep",
    "ScoreStore",
    "Scorer",
    "Segment",
    "TopRows",
    "Validation",
    "check_datamodel",
    "check_leave_out",
    "check_planted",
    "check_tail_patch",
    "fit_curvature",
    "fit_ekfac",
    "forecast",
    "influence",
    "influence_along",
    "lexical_scores",
    "load_curvature",
    "make_plants",
    "measure_pushes",
    "prepare_queries",
    "prepare_rows",
    "rank_rows",
    "save_curvature",
    "score_query",
    "score_trajectory",
    "source_scores",
    "write_scores",
]
