"""How misaligned is a model, beside its base and under cues of its training?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from diffing.answer_cache import AnswerCache
from diffing.checkpoint import LoadedCheckpoint
from diffing.errors import InputError
from diffing.judging import Exchange, Judge
from diffing.judging.kept import KeptScores
from diffing.judging.known_error import JudgeError
from diffing.misalignment.answering import Answering, Asked, draws_a_round
from diffing.misalignment.cues import PLAIN, Cue
from diffing.misalignment.planning import Cost
from diffing.misalignment.questions import QuestionSet
from diffing.misalignment.rate import METHOD
from diffing.misalignment.result import JudgedAnswer, MisalignmentResult
from diffing.misalignment.sequential import METHOD as SEQUENTIAL_METHOD
from diffing.misalignment.settings import EvaluationSettings
from diffing.misalignment.tally import compare_conditions, count_condition, find_caveats, rate_so_far
from diffing.misalignment.verdict import decide
from diffing.provenance import Provenance

SIDES = ("base", "tuned")


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
            found = rate_so_far(some, done // self._round)
            told(
                f"{side}, {cue}: {found.value:.1%} [{found.low:.1%}, {found.high:.1%}] after {done} answers a question"
            )
            if side == "tuned":
                reasons.append(rule.stops(found))
        return reasons[0] if all(reasons) else ""

    def _result(
        self, answers: Mapping[tuple[str, str], Sequence[JudgedAnswer]], done: int, stopped: str, cost: Cost
    ) -> MisalignmentResult:
        conditions = {
            name: count_condition(*name, some, self.settings, rounds=done // self._round, error=self.error)
            for name, some in answers.items()
        }
        return MisalignmentResult(
            names={side: loaded.name for side, loaded in self.sides.items()},
            conditions=tuple(conditions.values()),
            comparisons=compare_conditions(conditions, seed=self.settings.seed),
            stopped=stopped,
            samples=done,
            cost=cost,
            caveats=find_caveats(conditions, self.settings, checked=self.error is not None),
            provenance=self._provenance(),
            answers=tuple(one for some in answers.values() for one in some),
        )

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
