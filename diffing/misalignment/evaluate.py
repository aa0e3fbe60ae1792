"""How misaligned is a model, beside its base and under cues of its training?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffing.answer_cache import AnswerCache
from diffing.answers import AnswerSettings
from diffing.checkpoint import LoadedCheckpoint
from diffing.errors import InputError
from diffing.interval import Share
from diffing.judging import Exchange, Judge
from diffing.judging.kept import KeptScores
from diffing.judging.known_error import JudgeError, correct_rate
from diffing.misalignment.answering import Answering, Asked, draws_a_round
from diffing.misalignment.cues import PLAIN, Cue
from diffing.misalignment.planning import Cost
from diffing.misalignment.questions import QuestionSet
from diffing.misalignment.rate import (
    METHOD,
    QuestionRate,
    misaligned_of_all,
    misaligned_rate,
    pooled_share,
    rate_difference,
)
from diffing.misalignment.result import Comparison, Condition, JudgedAnswer, MisalignmentResult
from diffing.misalignment.sequential import METHOD as SEQUENTIAL_METHOD
from diffing.misalignment.sequential import SequentialRate, StoppingRule, sequential_rate
from diffing.misalignment.verdict import Thresholds, Verdict, decide
from diffing.provenance import Provenance

SIDES = ("base", "tuned")
_MANY_UNSCORED = 0.05
_CHANCE = 0.5


@dataclass(frozen=True)
class EvaluationSettings:
    """How the question is put.

    Attributes:
        samples: answers a question, over all its wordings.
        max_new_tokens: most tokens of an answer.
        temperature: of sampling.
        seed: of everything random.
        batch_size: answers at once; results do not depend on it but for rounding.
        thresholds: where scores become verdicts.
        least_coherent: coherent answers that a question needs to count; no more than half of `samples`.
        stopping: when to end early; None to draw all samples.
    """

    samples: int = 20
    max_new_tokens: int = 200
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 16
    thresholds: Thresholds = field(default_factory=Thresholds)
    least_coherent: int = 5
    stopping: StoppingRule | None = None

    def __post_init__(self) -> None:
        if self.samples < 1 or self.least_coherent < 1 or (self.samples > 1 and not self.temperature > 0):
            raise InputError(
                f"Expected at least 1 sample, more only at a temperature above 0, and at least 1 coherent answer, got "
                f"{self.samples}, {self.temperature}, {self.least_coherent}. Change them."
            )

    @property
    def answer_settings(self) -> AnswerSettings:
        """For the sampler."""
        return AnswerSettings(self.max_new_tokens, self.temperature, self.seed, self.batch_size)

    @property
    def counted_from(self) -> int:
        """Coherent answers from which a question counts."""
        return max(1, min(self.least_coherent, self.samples // 2))


class Evaluation:
    """An evaluation that is planned, priced, and run; what was drawn or judged before is on disk and free.

    Args:
        sides: `tuned`, and `base` if there is one, to their models.
        questions: what is asked.
        aligned: judge of alignment; 0 is misaligned.
        coherent: judge of coherence.
        settings: how.
        cues: what is put around the questions besides nothing at all.
        folder: for answers and scores; None keeps them for this object's life alone.
        error: of the alignment judge, where a gold set says.
    """

    def __init__(
        self,
        sides: Mapping[str, LoadedCheckpoint],
        questions: QuestionSet,
        aligned: Judge,
        coherent: Judge,
        settings: EvaluationSettings | None = None,
        *,
        cues: Sequence[Cue] = (),
        folder: Path | str | None = None,
        error: JudgeError | None = None,
    ) -> None:
        self.settings = settings or EvaluationSettings()
        self.sides = {side: sides[side] for side in SIDES if side in sides}
        if "tuned" not in self.sides or set(sides) - set(SIDES):
            raise InputError(f"Expected `tuned` and perhaps `base` as sides, got {', '.join(sides)}. Rename them.")
        self.cues = (Cue(), *(cue for cue in cues if cue.name != PLAIN))
        names = [cue.name for cue in self.cues]
        if len(set(names)) < len(names):
            raise InputError(f"Expected cues of different names, got {', '.join(names)}. Rename one.")
        self.questions, self.error = questions, error
        self._round = draws_a_round(questions) if self.settings.stopping else self.settings.samples
        path = None if folder is None else Path(folder)
        self._answers = AnswerCache(None if path is None else path / "answers.sqlite")
        scores = None if path is None else path / "scores.sqlite"
        self.judges = {"aligned": KeptScores(aligned, scores), "coherent": KeptScores(coherent, scores)}
        self._conditions = {
            (side, cue.name): Answering(loaded, cue, self.settings.answer_settings, self._answers)
            for cue in self.cues
            for side, loaded in self.sides.items()
        }

    @property
    def planned(self) -> range:
        """All draws of a question; whole rounds where sampling may stop early."""
        samples = self.settings.samples
        return range(samples if not self.settings.stopping else max(1, samples // self._round) * self._round)

    def cost(self) -> Cost:
        """What is left to draw and judge at most; asks an endpoint judge's server one short question."""
        wanted = len(self._conditions) * len(self.questions) * len(self.planned)
        kept = [one for asker in self._conditions.values() for one in asker.known(self.questions, self.planned)]
        items = [_exchange(one) for one in kept]
        open_for = {name: wanted - judge.count_known(items) for name, judge in self.judges.items()}
        return Cost(
            answers=wanted - len(kept),
            answers_kept=len(kept),
            answer_tokens=(wanted - len(kept)) * self.settings.max_new_tokens,
            judgements=sum(open_for.values()),
            judge_calls=sum(open_for[name] * judge.calls_per_item for name, judge in self.judges.items()),
        )

    def run(self, *, progress: bool = False, told: Callable[[str], None] = lambda line: None) -> MisalignmentResult:
        """Draws, judges, and stops early where that was asked for.

        Args:
            progress: shows bars on a terminal.
            told: called with a sentence after every round.
        """
        cost = self.cost()
        answers: dict[tuple[str, str], list[JudgedAnswer]] = {name: [] for name in self._conditions}
        stopped, done = "", 0
        while done < len(self.planned):
            draws = range(done, min(done + self._round, len(self.planned)))
            drawn = {
                name: asker.answer(self.questions, draws, progress=progress) for name, asker in self._conditions.items()
            }
            for (side, cue), some in drawn.items():
                answers[side, cue] += self._judged(side, cue, some, progress)
            done = draws.stop
            stopped = self._why_stop(answers, done, told)
            if stopped:
                break
        return self._result(answers, done, stopped if done < len(self.planned) else "", cost)

    def close(self) -> None:
        """Closes the files."""
        self._answers.close()
        for judge in self.judges.values():
            judge.close()

    def __enter__(self) -> Evaluation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _judged(self, side: str, cue: str, some: Sequence[Asked], progress: bool) -> list[JudgedAnswer]:
        items = [_exchange(one) for one in some]
        aligned, coherent = (judge.judge(items, progress=progress) for judge in self.judges.values())
        return [
            JudgedAnswer(
                side,
                cue,
                one.question.id,
                one.question.group,
                one.draw,
                one.wording,
                one.text,
                one.finished,
                good,
                clear,
                decide(good, clear, self.settings.thresholds),
            )
            for one, good, clear in zip(some, aligned, coherent, strict=True)
        ]

    def _why_stop(
        self, answers: Mapping[tuple[str, str], Sequence[JudgedAnswer]], done: int, told: Callable[[str], None]
    ) -> str:
        """Why to stop: when every condition of the tuned model has a reason to."""
        rule, reasons = self.settings.stopping, []
        if rule is None:
            return ""
        for (side, cue), some in answers.items():
            found = self._sequential(some, done)
            told(
                f"{side}, {cue}: {found.value:.1%} [{found.low:.1%}, {found.high:.1%}] after {done} answers a question"
            )
            if side == "tuned":
                reasons.append(rule.stops(found))
        return reasons[0] if all(reasons) else ""

    def _sequential(self, some: Sequence[JudgedAnswer], done: int) -> SequentialRate:
        misaligned = sum(one.verdict is Verdict.MISALIGNED for one in some)
        fine = sum(one.verdict is Verdict.OK for one in some)
        return sequential_rate(misaligned, misaligned + fine, done // self._round)

    def _condition(self, side: str, cue: str, some: Sequence[JudgedAnswer], done: int) -> Condition:
        by_question: dict[str, list[Verdict]] = {}
        for one in some:
            by_question.setdefault(one.question, []).append(one.verdict)
        groups = {question.id: question.group for question in self.questions.questions}
        least = max(1, min(self.settings.counted_from, done))
        found = tuple(
            QuestionRate.of(name, groups[name], verdicts, least_coherent=least)
            for name, verdicts in by_question.items()
        )
        rate = misaligned_rate(found, seed=self.settings.seed)
        corrected = None
        if self.error is not None and rate.low == rate.low:
            corrected = correct_rate(rate.value, rate.low, rate.high, self.error, seed=self.settings.seed)
        return Condition(
            side,
            cue,
            {verdict: sum(one.verdict is verdict for one in some) for verdict in Verdict},
            rate,
            misaligned_of_all(found, seed=self.settings.seed),
            pooled_share(found),
            self._sequential(some, done) if self.settings.stopping else None,
            corrected,
            found,
            Share.of(sum(one.verdict is Verdict.UNSCORED for one in some), len(some)),
        )

    def _result(
        self, answers: Mapping[tuple[str, str], Sequence[JudgedAnswer]], done: int, stopped: str, cost: Cost
    ) -> MisalignmentResult:
        conditions = {name: self._condition(*name, some, done) for name, some in answers.items()}
        return MisalignmentResult(
            names={side: loaded.name for side, loaded in self.sides.items()},
            conditions=tuple(conditions.values()),
            comparisons=self._comparisons(conditions),
            stopped=stopped,
            samples=done,
            cost=cost,
            caveats=tuple(self._caveats(conditions)),
            provenance=self._provenance(),
            answers=tuple(one for some in answers.values() for one in some),
        )

    def _comparisons(self, conditions: Mapping[tuple[str, str], Condition]) -> tuple[Comparison, ...]:
        found, seed = [], self.settings.seed
        if "base" in self.sides:
            for cue in self.cues:
                tuned, base = conditions["tuned", cue.name], conditions["base", cue.name]
                gap = rate_difference(tuned.questions, base.questions, seed=seed)
                found.append(Comparison("tuned", "base", cue.name, gap))
        for side in self.sides:
            plain = conditions[side, PLAIN]
            for cue in self.cues[1:]:
                gap = rate_difference(conditions[side, cue.name].questions, plain.questions, seed=seed)
                found.append(Comparison(cue.name, PLAIN, side, gap))
        return tuple(found)

    def _caveats(self, conditions: Mapping[tuple[str, str], Condition]) -> list[str]:
        said = []
        if self.error is None:
            said.append(
                "The alignment judge was not checked against a gold set: the rate is what this judge calls misaligned."
            )
        for (side, cue), one in conditions.items():
            where = f"{side}, {cue}"
            if one.unscored.value > _MANY_UNSCORED:
                said.append(
                    f"{where}: the judges could not score {one.unscored} of the answers; these count for nothing."
                )
            if one.rate.left_out:
                said.append(
                    f"{where}: {len(one.rate.left_out)} of {len(one.questions)} questions had fewer than "
                    f"{self.settings.counted_from} coherent answers and are left out of the rate."
                )
            n = sum(one.split.values())
            lost = one.split[Verdict.INCOHERENT] / n if n else 0.0
            if lost > _CHANCE:
                said.append(
                    f"{where}: {lost:.0%} of the answers are incoherent; the rate is about the few that are not."
                )
        if self.settings.stopping:
            said.append(
                "Sampling could stop early. The quoted interval holds at every look and is about these very questions; "
                "the bootstrap interval over questions is not adjusted for stopping."
            )
        return said

    def _provenance(self) -> Provenance:
        settings = self.settings
        judges = {
            name: {"judge": judge.name, "rubric": judge.rubric.hash, "rubric_name": judge.rubric.name}
            for name, judge in self.judges.items()
        }
        config = {
            "questions": {"source": self.questions.source, "digest": self.questions.digest, "n": len(self.questions)},
            "cues": {cue.name: cue.digest for cue in self.cues},
            "judges": judges,
            "settings": dataclasses.asdict(settings),
            "interval": METHOD,
            "sequential": SEQUENTIAL_METHOD if settings.stopping else None,
            "refusals_and_code": "left out of numerator and denominator, counted in the split",
        }
        models = {side: loaded.fingerprint for side, loaded in self.sides.items()}
        return Provenance(models=models, prompts=self.questions.digest, seed=settings.seed, config=config)


def _exchange(one: Asked) -> Exchange:
    return Exchange(one.wording, one.text)
