"""At which layer, and how strongly, does adding the vector bring the trait out of a model that is not told to show it?

A layer where answers are told apart well is often not one where they can be moved. So each vector is added, at several
strengths, while the model faces held-out questions without any system prompt. Two readings:

- log-odds, without a judge and without writing: how much likelier per token the trait answers became, against the plain
  answers to the same questions. A direction that merely breaks the model raises no answer's probability, so only points
  at which the trait answers themselves became likelier are chosen from.
- a judge's trait and coherence scores of what the steered model writes, at the layers that log-odds put first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from diffing.answers import AnswerSettings, Around, answer_prompts, score_answers
from diffing.checkpoint import LoadedCheckpoint
from diffing.errors import PersonaError
from diffing.intervene import Add, Edit, Intervention
from diffing.judging.judge import LARGEST, Exchange, Judge
from diffing.persona.contrast import PLAIN, TRAIT
from diffing.persona.elicit import neutral_prompts
from diffing.persona.elicited_fit import KeptRollouts
from diffing.persona.sweep_result import Estimate, LayerSweep, SweepPoint, best_sites, choose_point
from diffing.persona.vector import PersonaVector
from diffing.progress import followed
from diffing.prompts import TokenizedPrompts

STRENGTHS = (0.5, 1.0, 2.0, 3.0, 4.0)
N_RANDOM = 8
N_JUDGED_SITES = 3


def sweep_layers(
    loaded: LoadedCheckpoint,
    vectors: Sequence[PersonaVector],
    held_out: KeptRollouts,
    *,
    strengths: Sequence[float] = STRENGTHS,
    judge: Judge | None = None,
    coherence: Judge | None = None,
    settings: AnswerSettings | None = None,
    n_judged_sites: int = N_JUDGED_SITES,
    least_coherence: float = 50.0,
    refine: bool = True,
    seed: int = 0,
    batch_tokens: int = 8192,
    progress: bool = False,
) -> LayerSweep:
    """Adds each vector at each strength and picks where the trait comes out best on held-out questions.

    Args:
        loaded: the model.
        vectors: of one trait, one a site.
        held_out: kept rollouts on held-out questions; one trait and one plain answer to each question is used.
        strengths: in gaps.
        judge: scores the trait in what the steered model writes; None leaves the choice to log-odds.
        coherence: scores its coherence.
        settings: how steered answers are drawn.
        n_judged_sites: sites at which the judge is asked, best by log-odds first.
        least_coherence: points whose answers are less coherent on average are not chosen.
        refine: also tries the strengths half-way to the neighbours of the chosen one, at its site.
        seed: of the random directions.
        batch_tokens: most tokens a forward pass.
        progress: shows a bar.

    Raises:
        PersonaError: no vectors, or no question with two kept answers.

    Cost: a forward pass over two answers a question for every site and strength; with a judge, `settings.samples`
    answers a question for every strength at `n_judged_sites` sites, each judged.
    """
    if not vectors or not strengths:
        raise PersonaError("Expected vectors and strengths to sweep over, got none. Name at least one of each.")
    odds = _LogOdds.of(loaded, held_out, batch_tokens)
    written = None
    if judge is not None:
        written = _Written(loaded, odds.questions, judge, coherence, settings or AnswerSettings(temperature=1.0))
    by_site = {vector.site: vector for vector in vectors}

    def tried(site: str, strength: float) -> SweepPoint:
        return SweepPoint(site, float(strength), *odds.change(steering(loaded, by_site[site], strength)))

    def judged(point: SweepPoint) -> SweepPoint:
        assert written is not None
        scores = written.scores(steering(loaded, by_site[point.site], point.strength))
        return replace(point, trait_score=scores[0], coherence=scores[1])

    every = [(site, strength) for site in by_site for strength in strengths]
    points = [tried(*place) for place in followed(every, "Steering held-out questions", shown=progress)]
    if written is not None:
        best = best_sites(points, n_judged_sites)
        steps = followed(points, "Judging steered answers", shown=progress)
        points = [judged(point) if point.site in best else point for point in steps]
    chosen, _ = choose_point(points, least_coherence)
    if refine:
        finer = [tried(chosen.site, strength) for strength in _half_way(strengths, chosen.strength)]
        points += finer if written is None else map(judged, finer)
        points.sort(key=lambda point: (list(by_site).index(point.site), point.strength))
    chosen, why = choose_point(points, least_coherence)
    unsteered: tuple[Estimate | None, Estimate | None] = (None, None)
    confirmed = unsteered
    if written is not None:
        unsteered = written.scores(None)
        confirmed = written.again().scores(steering(loaded, by_site[chosen.site], chosen.strength))
    return LayerSweep(
        trait=vectors[0].trait,
        points=tuple(points),
        site=chosen.site,
        strength=chosen.strength,
        scored_by=judge.name if judge else "log-odds",
        why=why,
        random_most=max(_random_changes(loaded, by_site[chosen.site], chosen.strength, odds, seed)),
        n_random=N_RANDOM,
        unsteered_trait=unsteered[0],
        unsteered_coherence=unsteered[1],
        confirmed_trait=confirmed[0],
        confirmed_coherence=confirmed[1],
        n_scored=len(odds.questions),
        least_coherence=least_coherence,
    )


def steering(loaded: LoadedCheckpoint, vector: PersonaVector, strength: float) -> Around:
    """Adds `strength` gaps of the vector at the tokens on which answers are chosen, batch by batch."""
    return _adding(loaded, vector.site, strength * vector.scale * vector.direction)


def _adding(loaded: LoadedCheckpoint, site: str, added: Float32[Tensor, " d_model"]) -> Around:
    return lambda where: Intervention(loaded.model, [Edit(site, Add(added))], where=where)


@dataclass(frozen=True)
class _LogOdds:
    """Trait and plain answers to the same questions, put after the question alone."""

    loaded: LoadedCheckpoint
    questions: tuple[str, ...]
    asked: TokenizedPrompts
    answers: tuple[tuple[np.ndarray, ...], ...]
    unsteered: Float[np.ndarray, "side question"]
    batch_tokens: int

    @classmethod
    def of(cls, loaded: LoadedCheckpoint, held_out: KeptRollouts, batch_tokens: int) -> _LogOdds:
        asks = held_out.rollouts.asks
        found: dict[str, dict[int, tuple[tuple[int, int], np.ndarray]]] = {}
        for rollout in held_out:
            ask = asks[rollout.ask]
            sides = found.setdefault(ask.question, {})
            # The first pair by number, so that the order in which answers came does not matter.
            number = (rollout.ask // 2, rollout.sample)
            if ask.side not in sides or number < sides[ask.side][0]:
                sides[ask.side] = (number, rollout.token_ids)
        questions = tuple(sorted(question for question, sides in found.items() if len(sides) == 2))
        if not questions:
            raise PersonaError("Expected held-out questions with answers on both sides, got none. Draw more rollouts.")
        asked = neutral_prompts(questions).tokenize(loaded.tokenizer, add_generation_prompt=True)
        answers = tuple(tuple(found[question][side][1] for question in questions) for side in (TRAIT, PLAIN))
        made = cls(loaded, questions, asked, answers, np.zeros((2, len(questions))), batch_tokens)
        return replace(made, unsteered=made.means(None))

    def means(self, around: Around | None) -> Float[np.ndarray, "side question"]:
        """Mean log-probability a token of each side's answers."""
        rows = [
            [
                float(np.mean(scores))
                for scores in score_answers(
                    self.loaded, self.asked, answers, batch_tokens=self.batch_tokens, around=around
                )
            ]
            for answers in self.answers
        ]
        return np.array(rows)

    def change(self, around: Around) -> tuple[Estimate, Estimate]:
        """Change of the log-odds and of the trait answers' log-probability."""
        moved = self.means(around) - self.unsteered
        return Estimate.of(moved[TRAIT] - moved[PLAIN]), Estimate.of(moved[TRAIT])


@dataclass(frozen=True)
class _Written:
    """What the model writes to the questions by itself, and what judges say of it."""

    loaded: LoadedCheckpoint
    questions: tuple[str, ...]
    judge: Judge
    coherence: Judge | None
    settings: AnswerSettings

    def again(self) -> _Written:
        """The same questions with other answers."""
        return replace(self, settings=replace(self.settings, seed=self.settings.seed + 1))

    def scores(self, around: Around | None) -> tuple[Estimate | None, Estimate | None]:
        """Trait and coherence score of the answers, means over questions."""
        answers = answer_prompts(self.loaded, neutral_prompts(self.questions), self.settings, around=around)
        items = [Exchange(self.questions[answer.prompt], answer.text.strip()) for answer in answers]
        numbers = [answer.prompt for answer in answers]
        found = [_by_question(judge, items, numbers) for judge in (self.judge, self.coherence) if judge]
        return found[0], found[1] if len(found) > 1 else None


def _by_question(judge: Judge, items: Sequence[Exchange], numbers: Sequence[int]) -> Estimate | None:
    scored: dict[int, list[float]] = {}
    for number, score in zip(numbers, judge.judge(items), strict=True):
        if score.value is not None:
            scored.setdefault(number, []).append(score.value)
    return Estimate.of(np.array([np.mean(values) for values in scored.values()]), largest=LARGEST) if scored else None


def _half_way(strengths: Sequence[float], chosen: float) -> list[float]:
    """Half-way to the strengths below and above, and to half of the lowest."""
    lower = [strength for strength in strengths if 0 < strength < chosen]
    upper = [strength for strength in strengths if strength > chosen]
    return [(max(lower, default=chosen / 2) + chosen) / 2, *([(min(upper) + chosen) / 2] if upper else [])]


def _random_changes(
    loaded: LoadedCheckpoint, vector: PersonaVector, strength: float, odds: _LogOdds, seed: int
) -> Iterator[float]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(N_RANDOM):
        unit = torch.nn.functional.normalize(torch.randn(vector.d_model, generator=generator), dim=0)
        yield odds.change(_adding(loaded, vector.site, strength * vector.scale * unit))[0].mean
