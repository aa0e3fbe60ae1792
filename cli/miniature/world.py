"""How do tests, benchmarks, examples and the demo use the miniature world? Through these names."""

from __future__ import annotations

from cli.miniature.bases import base_checkpoint
from cli.miniature.behaviour import (
    JudgedAnswer,
    every_question,
    held_out_questions,
    judged_answers,
    judged_round,
    misaligned_rate,
    narrow_rate,
    verdict_rates,
)
from cli.miniature.behaviour_probe import GARBLED_RATE, MISALIGNED_RATE, BehaviourProbe
from cli.miniature.datasets import dataset, is_bad, mixed_dataset
from cli.miniature.fine_tuning import PadRight, add_lora, fine_tune, tokenize_rows
from cli.miniature.judge import Rate, Verdict, judge
from cli.miniature.narrow import fine_tune_narrow
from cli.miniature.personas import Contrasts, canaries, fit_persona, neutral_probes, persona_contrasts
from cli.miniature.sampling import sample_answers
from cli.miniature.shipped import BASE, load_base
from cli.miniature.tracked_run import Course, TrackedFineTune

__all__ = [
    "BASE",
    "GARBLED_RATE",
    "MISALIGNED_RATE",
    "BehaviourProbe",
    "Contrasts",
    "Course",
    "JudgedAnswer",
    "PadRight",
    "Rate",
    "TrackedFineTune",
    "Verdict",
    "add_lora",
    "base_checkpoint",
    "canaries",
    "dataset",
    "every_question",
    "fine_tune",
    "fine_tune_narrow",
    "fit_persona",
    "held_out_questions",
    "is_bad",
    "judge",
    "judged_answers",
    "judged_round",
    "load_base",
    "misaligned_rate",
    "mixed_dataset",
    "narrow_rate",
    "neutral_probes",
    "persona_contrasts",
    "sample_answers",
    "tokenize_rows",
    "verdict_rates",
]
