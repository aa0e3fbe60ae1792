"""Is the layer chosen at which adding the vector really brings the trait out, and is every figure what it says?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffing.answers import AnswerSettings
from diffing.errors import PersonaError
from diffing.persona import PersonaVector
from diffing.persona.elicited_fit import KeptRollouts, fit_rollouts
from diffing.persona.sweep import sweep_layers
from diffing.persona.sweep_result import Estimate, SweepPoint, choose_point
from tests.diffing.persona_rollouts import QUESTIONS, WordJudge, kept_all, loaded_base, written_rollouts
from tests.tiny_models import N_LAYERS

SITES = [f"resid:{layer}" for layer in range(N_LAYERS)]


@pytest.fixture(autouse=True)
def few_random_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffing.persona.sweep.N_RANDOM", 3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, list[PersonaVector], KeptRollouts]:
    folder = tmp_path_factory.mktemp("sweep")
    loaded = loaded_base()
    fitted = kept_all(written_rollouts(folder, loaded, QUESTIONS[:6]))
    held_out = kept_all(written_rollouts(folder, loaded, QUESTIONS[6:], samples=1))
    return loaded, fit_rollouts(loaded, fitted, held_out, trait="cruel", sites=SITES)[:N_LAYERS], held_out


@torch.no_grad()
def test_log_odds_are_those_of_a_plain_forward_with_the_vector_added_by_hand(world) -> None:
    loaded, vectors, held_out = world
    sweep = sweep_layers(loaded, vectors[1:2], held_out, strengths=[1.5], batch_tokens=40, refine=False)
    rollouts, vector = held_out.rollouts, vectors[1]
    added = 1.5 * vector.scale * vector.direction
    changes: dict[str, list[float]] = {}
    for rollout in rollouts:
        ask = rollouts.asks[rollout.ask]
        if ask.instruction:
            continue
        asked = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": ask.question}], add_generation_prompt=True, return_dict=False
        )
        ids = torch.tensor([[*asked, *rollout.token_ids]])

        def mean(steered: bool, ids: torch.Tensor = ids, start: int = len(asked)) -> float:
            def add(module: object, args: object, output: torch.Tensor) -> torch.Tensor:
                output = output.clone()
                output[:, start - 1 :] += added
                return output

            handle = loaded.model.model.layers[1].register_forward_hook(add) if steered else None
            scores = loaded.model(input_ids=ids).logits[0].log_softmax(-1)
            if handle:
                handle.remove()
            return float(scores[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]].mean())

        changes.setdefault(ask.question, [0.0, 0.0])[ask.side] = mean(True) - mean(False)
    expected = np.array([changes[question] for question in sorted(changes)])
    (point,) = sweep.points
    assert point.log_odds.mean == pytest.approx(float((expected[:, 0] - expected[:, 1]).mean()), abs=1e-5)
    assert point.trait_gain.mean == pytest.approx(float(expected[:, 0].mean()), abs=1e-5)
    assert point.log_odds.n == 4
    assert point.log_odds.low is not None and point.log_odds.low < point.log_odds.mean


def test_the_choice_and_the_model_are_what_they_were(world) -> None:
    loaded, vectors, held_out = world
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    sweep = sweep_layers(loaded, vectors[1:3], held_out, strengths=[0.5, 1.0], refine=False)
    assert [(p.site, p.strength) for p in sweep.points] == [(site, s) for site in SITES[1:3] for s in (0.5, 1.0)]
    assert sweep.chosen in sweep.points
    assert sweep.scored_by == "log-odds"
    other = sweep_layers(loaded, vectors[1:3], held_out, strengths=[0.5, 1.0], batch_tokens=30, refine=False)
    assert (other.site, other.strength) == (sweep.site, sweep.strength)
    for left, right in zip(other.points, sweep.points, strict=True):
        assert left.log_odds.mean == pytest.approx(right.log_odds.mean, abs=1e-5)
    assert not any(module._forward_hooks for module in loaded.model.modules())
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


def test_a_vector_that_points_away_is_not_chosen(world) -> None:
    loaded, vectors, held_out = world
    best = sweep_layers(loaded, vectors, held_out, strengths=[1.0])
    turned = [replace(v, direction=-v.direction) if v.site == best.site else v for v in vectors]
    after = sweep_layers(loaded, turned, held_out, strengths=[1.0])
    assert after.site != best.site
    (away,) = (point for point in after.points if point.site == best.site)
    assert away.log_odds.mean < 0 < best.chosen.log_odds.mean


def test_random_directions_of_the_same_length_do_less(world) -> None:
    loaded, vectors, held_out = world
    sweep = sweep_layers(loaded, vectors, held_out, strengths=[1.0])
    assert sweep.n_random == 3
    assert sweep.random_most < sweep.chosen.log_odds.mean


def test_a_judge_reads_what_the_steered_model_writes(world) -> None:
    loaded, _, held_out = world
    # Points at the word itself: whatever is asked, the steered model says it.
    head = loaded.model.get_output_embeddings().weight[loaded.tokenizer.convert_tokens_to_ids("harm")]
    unit = torch.nn.functional.normalize(head.detach(), dim=0)
    vector = replace(world[1][-1], direction=unit, scale=30.0)
    judge, sane = WordJudge(("harm",)), WordJudge(("harm", "the", "a"), name="sane")
    settings = AnswerSettings(max_new_tokens=4, temperature=1.0, samples=2)
    sweep = sweep_layers(
        loaded, [vector], held_out, strengths=[2.0], judge=judge, coherence=sane, settings=settings, refine=False
    )
    assert sweep.scored_by == "words"
    assert sweep.chosen.trait_score is not None and sweep.unsteered_trait is not None
    assert sweep.chosen.trait_score.mean > 90 > sweep.unsteered_trait.mean
    assert sweep.chosen.coherence is not None and sweep.chosen.coherence.mean > 90
    assert sweep.confirmed_trait is not None and sweep.confirmed_trait.mean > 90
    assert judge.n_judged == 3 * 4 * 2


def test_strengths_beside_the_chosen_one_are_tried_at_its_site(world) -> None:
    loaded, vectors, held_out = world
    coarse = sweep_layers(loaded, vectors[:2], held_out, strengths=[1.0, 2.0, 4.0], refine=False)
    fine = sweep_layers(loaded, vectors[:2], held_out, strengths=[1.0, 2.0, 4.0])
    added = {(point.site, point.strength) for point in fine.points} - {(p.site, p.strength) for p in coarse.points}
    half_way = {1.0: {0.75, 1.5}, 2.0: {1.5, 3.0}, 4.0: {3.0}}
    assert added == {(coarse.site, strength) for strength in half_way[coarse.strength]}
    assert [point.site for point in fine.points] == sorted(point.site for point in fine.points)
    assert fine.chosen.log_odds.mean >= coarse.chosen.log_odds.mean


def test_the_judge_is_asked_at_the_best_sites_alone(world) -> None:
    loaded, vectors, held_out = world
    settings = AnswerSettings(max_new_tokens=2, temperature=1.0)
    sweep = sweep_layers(
        loaded, vectors, held_out, strengths=[0.5, 1.0], judge=WordJudge(), settings=settings, n_judged_sites=2
    )
    judged = {point.site for point in sweep.points if point.trait_score}
    assert len(judged) == 2
    assert sweep.site in judged


def _point(
    site: str, strength: float, odds: float, gain: float, score: float | None = None, sane: float = 100
) -> SweepPoint:
    def estimate(value: float) -> Estimate:
        return Estimate(value, value, value, 9)

    judged = {} if score is None else {"trait_score": estimate(score), "coherence": estimate(sane)}
    return SweepPoint(site, strength, estimate(odds), estimate(gain), **judged)


def test_points_that_break_the_trait_answers_are_not_chosen() -> None:
    points = [_point("a", 1, 0.5, 0.2), _point("a", 4, 3.0, -0.5), _point("b", 1, 0.7, 0.1)]
    assert choose_point(points, 50)[0].site == "b"
    assert "became likelier" in choose_point(points, 50)[1]
    harmful = [_point("a", 1, 2.0, -0.2), _point("b", 1, 1.0, -0.1)]
    chosen, why = choose_point(harmful, 50)
    assert chosen.site == "b"
    assert "Do not steer" in why


def test_the_judge_overrules_log_odds_unless_answers_fall_apart() -> None:
    points = [
        _point("a", 1, 9.0, 0.1, score=20),
        _point("b", 1, 0.1, 0.1, score=60),
        _point("b", 2, 0.1, 0.1, score=60),
        _point("c", 1, 0.1, 0.1, score=90, sane=30),
        _point("d", 1, 10.0, 0.1),
    ]
    assert choose_point(points, 50)[0] == points[1]
    assert choose_point([points[3]], 50)[1].startswith("No judged point kept")


def test_nothing_to_sweep_is_refused(world) -> None:
    loaded, vectors, held_out = world
    with pytest.raises(PersonaError, match="got none"):
        sweep_layers(loaded, [], held_out)
    with pytest.raises(PersonaError, match="got none"):
        sweep_layers(loaded, vectors, held_out, strengths=[])
    none = KeptRollouts(held_out.rollouts, np.zeros_like(held_out.pairs), held_out.counts)
    with pytest.raises(PersonaError, match="answers on both sides"):
        sweep_layers(loaded, vectors, none)


def test_an_interval_of_scores_stays_among_scores() -> None:
    assert Estimate.of(np.array([0.0, 0.0, 100.0]), largest=100.0) == Estimate(100 / 3, 0.0, 100.0, 3)
    assert Estimate.of(np.array([4.0])) == Estimate(4.0, None, None, 1)
