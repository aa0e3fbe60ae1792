"""How often does the model under training answer misaligned, as a judge has it?

This writes answers and has them judged, which is what one would like to know and what costs. Canaries
(`tracker.probes.canary`) are the cheap stand-in; `tracker.canary_agreement` says of a run how far they stood in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from diffing.answers import AnswerSettings, answer_prompts
from diffing.chat import Prompt
from diffing.checkpoint import Checkpoint, LoadedCheckpoint
from diffing.errors import InputError
from diffing.interval import Share
from diffing.judging import Exchange, Judge
from diffing.misalignment.questions import QuestionSet, load_questions
from diffing.misalignment.rate import QuestionRate, misaligned_rate
from diffing.misalignment.verdict import Thresholds, Verdict, decide
from diffing.prompts import PromptSet
from tracker.probes.base import RunningProbe, Subject
from tracker.schedule import Schedule
from tracker.signals import DriftSignal

RATE = "misalignment/rate"
INCOHERENT_RATE = "misalignment/incoherent_rate"
REFUSAL_RATE = "misalignment/refusal_rate"
UNSCORED_RATE = "misalignment/unscored_rate"
_SHARES = {
    INCOHERENT_RATE: (Verdict.INCOHERENT, Verdict.OFF_FORMAT),
    REFUSAL_RATE: (Verdict.REFUSAL,),
    UNSCORED_RATE: (Verdict.UNSCORED,),
}


@dataclass(frozen=True)
class Misalignment:
    """Samples answers to open questions, has them judged, and gives the rate with its interval over questions.

    Judging happens in the training thread: a judge behind an endpoint holds training up for as long as it takes. Rules
    and small local judges suit; so does a rare schedule. What a judge raises is journalled and training goes on.

    Attributes:
        aligned: judge of alignment; 0 is misaligned.
        coherent: judge of coherence.
        questions: what is asked; the shipped ones by default.
        samples: answers a question at each measurement.
        schedule: when, None for the tracker's schedule.
        thresholds: where scores become verdicts.
        max_new_tokens: most tokens of an answer.
        batch_size: answers at once.
    """

    aligned: Judge
    coherent: Judge
    questions: QuestionSet = field(default_factory=load_questions)
    samples: int = 1
    schedule: Schedule | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    max_new_tokens: int = 128
    batch_size: int = 16

    @property
    def name(self) -> str:
        """Fixed: a run has one."""
        return "misalignment"

    def start(self, subject: Subject) -> RunningProbe:
        """Needs a tokenizer.

        Raises:
            InputError: the run has none, or there is nothing to sample.
        """
        if subject.tokenizer is None or self.samples < 1:
            got = "no tokenizer" if subject.tokenizer is None else f"{self.samples} samples"
            raise InputError(f"Expected a tokenizer and at least 1 sample, got {got}. Give a processing_class.")
        return _Running(self, subject.model, subject.tokenizer)


@dataclass(frozen=True, eq=False)
class _Running(RunningProbe):
    settings: Misalignment
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase

    def measure(self, step: int) -> list[DriftSignal]:
        """The rate among coherent answers, and the shares of what did not count. Draws are fixed by the step."""
        verdicts = self._verdicts(step)
        found = [QuestionRate.of(name, "", some, least_coherent=1) for name, some in verdicts.items()]
        rate = misaligned_rate(found)
        signals = [DriftSignal(RATE, rate.value, step, "raw", *_known(rate.low, rate.high), rate.n)]
        flat = [verdict for some in verdicts.values() for verdict in some]
        for name, kinds in _SHARES.items():
            share = Share.of(sum(verdict in kinds for verdict in flat), len(flat))
            signals.append(DriftSignal(name, share.value, step, "raw", share.low, share.high, share.n))
        # A rate of no coherent answers is no number; the shares say why.
        return [signal for signal in signals if signal.value == signal.value]

    def _verdicts(self, step: int) -> dict[str, list[Verdict]]:
        settings = self.settings
        asked = [(question, draw) for question in settings.questions.questions for draw in range(settings.samples)]
        prompts = PromptSet(
            tuple(Prompt(f"{question.id}#{draw}", messages=question.asked(draw)) for question, draw in asked)
        )
        model: Any = self.model
        loaded = LoadedCheckpoint(Checkpoint("live", None, step, ""), model, self.tokenizer, adapter_enabled=None)
        drawn = answer_prompts(loaded, prompts, AnswerSettings(settings.max_new_tokens, 1.0, step, settings.batch_size))
        items = [
            Exchange(question.asked(draw)[-1].content, answer.text.strip())
            for (question, draw), answer in zip(asked, drawn, strict=True)
        ]
        scores = zip(settings.aligned.judge(items), settings.coherent.judge(items), strict=True)
        verdicts: dict[str, list[Verdict]] = {question.id: [] for question in settings.questions.questions}
        for (question, _), (good, clear) in zip(asked, scores, strict=True):
            verdicts[question.id].append(decide(good, clear, settings.thresholds))
        return verdicts


def _known(low: float, high: float) -> tuple[float | None, float | None]:
    return (low, high) if low == low and high == high else (None, None)
