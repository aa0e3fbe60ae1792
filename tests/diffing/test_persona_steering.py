"""Does steering along personas touch the tokens it says, in every family and batch, and cost what it says?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffing import PromptSet, load_checkpoint
from diffing.answers import AnswerSettings, draw_answers
from diffing.errors import InputError, PersonaError
from diffing.intervene import Add, Edit, Intervention
from diffing.persona.budget import solve_strength
from diffing.persona.steering import PersonaSteering, steered_answers
from diffing.persona.token_projections import cap_bounds, project_tokens
from diffing.site import resolve_site
from diffing.tap import Tap
from tests.tiny_models import D_MODEL, FAMILIES, tiny_model, tiny_tokenizer, with_lora
from tests.tracker.training import persona

QUESTIONS = PromptSet.from_messages(
    [{"role": "user", "content": text}]
    for text in ("how are you", "why is the cat good in the garden", "go", "who is at the door of the house", "tell me")
)
SHORT = AnswerSettings(max_new_tokens=6, batch_size=2)


def _loaded(family: str = "llama", **more):
    return load_checkpoint(tiny_model(family, **more), tokenizer=tiny_tokenizer())


def _vectors(*layers: int, loaded=None, **more):
    mark = {"model_fingerprint": loaded.fingerprint} if loaded is not None else {}
    return tuple(persona("villain", layer, seed=layer, **{**mark, **more}) for layer in layers)


class Watched(Add):
    """Adds, and keeps what it was given."""

    seen: list[torch.Tensor]

    def __call__(self, x):
        self.seen.append(x.clone())
        return super().__call__(x)


def _moved(model, ids, mask, *, tokens: str) -> list[torch.Tensor]:
    """For every pass of a generation, at which tokens the site's output is not what the block had made of its input."""
    vector = 50.0 * torch.ones(D_MODEL)
    change, after = Watched(vector), []
    object.__setattr__(change, "seen", [])
    with Intervention(model, [Edit("resid:1", change)], tokens=tokens):
        handle = resolve_site(model, "resid:1").module.register_forward_hook(
            lambda module, args, output: after.append(output[0] if isinstance(output, tuple) else output)
        )
        generate = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        model.generate(ids, attention_mask=mask, **generate)
        handle.remove()
    return [(now.float() - before).abs().sum(dim=2) > 1.0 for now, before in zip(after, change.seen, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_steers_the_answer_only_or_all_but_padding(family, dtype):
    model = tiny_model(family, dtype=dtype)
    ids, mask = torch.arange(8, 16).repeat(2, 1), torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    for tokens in ("response", "all"):
        prompt, *answer = _moved(model, ids, mask, tokens=tokens)
        expected = mask.bool() if tokens == "all" else torch.zeros_like(mask).bool()
        expected[:, -1] = True
        assert torch.equal(prompt, expected)
        assert len(answer) == 2 and all(bool(one.all()) and one.shape == (2, 1) for one in answer)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mamba"])
def test_two_batches_in_one_intervention_are_steered_as_each_alone(family, use_cache):
    model = tiny_model(family)
    edits = [Edit("resid:1", Add(5.0 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))))]
    generate = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    batches = [torch.arange(8, 16).repeat(2, 1), torch.arange(20, 24).repeat(3, 1)]
    alone = []
    for ids in batches:
        where = torch.zeros_like(ids, dtype=torch.bool)
        where[:, -1] = True
        with Intervention(model, edits, where=where):
            alone.append(model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, **generate))
    with Intervention(model, edits, tokens="response"):
        for ids, expected in zip(batches, alone, strict=True):
            got = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, **generate)
            assert torch.equal(got, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_do_not_depend_on_batches_or_padding_side(side):
    loaded = load_checkpoint(tiny_model("qwen3"), tokenizer=tiny_tokenizer(padding_side=side))
    steering = PersonaSteering(_vectors(0, 1, 2, loaded=loaded), strength=4.0)
    texts = [answer.text for answer in steered_answers(loaded, QUESTIONS, steering, SHORT)]
    single = AnswerSettings(max_new_tokens=6, batch_size=1)
    assert texts == [answer.text for answer in steered_answers(loaded, QUESTIONS, steering, single)]
    plain = [answer.text for answer in steered_answers(loaded, QUESTIONS, None, SHORT)]
    assert texts != plain
    assert plain == [answer.text for answer in steered_answers(loaded, QUESTIONS, steering.at(0.0), SHORT)]


def test_incremental_vectors_move_every_layer_by_its_own_gap_where_blocks_pass_it_on():
    model = tiny_model()
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    loaded = load_checkpoint(model, tokenizer=tiny_tokenizer())
    vectors, sites = _vectors(0, 1, 3, loaded=loaded), ["resid:0", "resid:1", "resid:2", "resid:3"]
    ids = torch.arange(8, 16)[None]
    with torch.no_grad(), Tap(model, sites) as tap:
        plain = tap.read(input_ids=ids)
    steering = PersonaSteering(vectors, strength=1.5, tokens="all")
    with torch.no_grad(), steering.intervention(loaded), Tap(model, sites) as tap:
        moved = tap.read(input_ids=ids)
    gaps = [1.5 * vector.scale * vector.direction for vector in (vectors[0], vectors[1], vectors[1], vectors[2])]
    for now, before, gap in zip(moved, plain, gaps, strict=True):
        torch.testing.assert_close(now - before, gap.expand_as(now), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operation", ["ablate", "mean_ablate", "cap"])
def test_removals_set_projections_as_they_say(operation):
    loaded = _loaded()
    vectors = (*_vectors(1, loaded=loaded), persona("sycophant", 1, seed=9, model_fingerprint=loaded.fingerprint))
    bounds = (0.1, -0.2) if operation == "cap" else ()
    ids = torch.arange(8, 16)[None]
    changed = PersonaSteering(vectors[: 1 if operation == "cap" else 2], operation, bounds=bounds[:1], tokens="all")
    with torch.no_grad(), Tap(loaded.model, ["resid:1"]) as tap:
        plain = tap.read(input_ids=ids)[0][0]
    with torch.no_grad(), changed.intervention(loaded), Tap(loaded.model, ["resid:1"]) as tap:
        now = tap.read(input_ids=ids)[0][0]
    for vector, before in zip(
        changed.vectors, (plain @ vectors[0].direction, plain @ vectors[1].direction), strict=False
    ):
        found = now @ vector.direction
        if operation == "cap":
            torch.testing.assert_close(found, before.clamp(max=0.1), atol=1e-4, rtol=1e-4)
        else:
            wanted = vector.neutral_mean if operation == "mean_ablate" else 0.0
            torch.testing.assert_close(found, torch.full_like(found, wanted), atol=1e-4, rtol=1e-4)


def test_half_a_removal_goes_half_the_way():
    loaded = _loaded()
    half = PersonaSteering(_vectors(1, loaded=loaded), "mean_ablate", strength=0.5, tokens="all")
    ids, direction = torch.arange(8, 16)[None], half.vectors[0].direction
    with torch.no_grad(), Tap(loaded.model, ["resid:1"]) as tap:
        plain = tap.read(input_ids=ids)[0] @ direction
    with torch.no_grad(), half.intervention(loaded), Tap(loaded.model, ["resid:1"]) as tap:
        now = tap.read(input_ids=ids)[0] @ direction
    torch.testing.assert_close(now, (plain + half.vectors[0].neutral_mean) / 2, atol=1e-4, rtol=1e-4)


def test_an_adapter_is_steered_and_switched_off_sides_too():
    model = with_lora(tiny_model())
    loaded = load_checkpoint(model, tokenizer=tiny_tokenizer())
    vectors = _vectors(1, loaded=loaded.base_side())
    plain, moved = (
        [answer.text for answer in steered_answers(loaded, QUESTIONS, one, SHORT)]
        for one in (None, PersonaSteering(vectors, strength=4.0))
    )
    assert plain != moved


def test_token_projections_are_those_of_the_models_own_hidden_states():
    loaded = _loaded()
    rows = PromptSet.from_messages(
        [{"role": "user", "content": "go"}, {"role": "assistant", "content": text}]
        for text in ("the cat is good", "help the kind queen now and then")
    )
    vectors = _vectors(1, 2, loaded=loaded)
    found = project_tokens(loaded, rows, vectors)
    tokenized = rows.tokenize(loaded.tokenizer)
    for number, got in enumerate(found):
        ids = torch.from_numpy(tokenized.input_ids[number]).long()[None]
        with torch.no_grad():
            hidden = loaded.model(input_ids=ids, output_hidden_states=True).hidden_states
        spoken = np.flatnonzero(tokenized.roles[number] == 3)
        expected = np.stack(
            [(hidden[layer + 1][0] @ vectors[at].direction).numpy() for at, layer in enumerate((1, 2))], axis=1
        )
        assert len(got) == len(spoken) == len(rows.prompts[number].messages[-1].content.split())
        np.testing.assert_allclose(got, expected[spoken], atol=1e-4)
    with pytest.raises(InputError, match="percentile"):
        cap_bounds(found, 99.0)
    wide = [np.linspace(0, 1, 1001)[:, None]]
    assert cap_bounds(wide, 95.0) == pytest.approx((0.95,))


def test_the_budget_is_spent_and_matches_a_slow_oracle():
    loaded = _loaded()
    steering = PersonaSteering(_vectors(1, 2, loaded=loaded))
    drawn = AnswerSettings(max_new_tokens=5, temperature=1.0)
    solved = solve_strength(loaded, steering, QUESTIONS, 0.05, answers=drawn, tolerance=0.01)
    assert solved.reached and solved.spent.divergence <= 0.05
    above = min(one.strength for one in solved.trace if one.strength > solved.strength)
    assert above - solved.strength <= 0.011 * above and solved.low <= solved.strength * 1.02
    assert solved.high >= solved.strength * 0.98
    assert solved.spent.divergence == pytest.approx(
        _slow_divergence(loaded, steering.at(solved.strength), drawn), rel=1e-4
    )
    negative = solve_strength(loaded, steering.at(-1.0), QUESTIONS, 0.05, answers=drawn, tolerance=0.05)
    assert negative.strength < 0 and negative.low <= negative.high <= 0


def _slow_divergence(loaded, steering, drawn) -> float:
    """One prompt at a time, one whole forward with and without, in float64."""
    tokenized = QUESTIONS.tokenize(loaded.tokenizer, add_generation_prompt=True)
    total, count = 0.0, 0
    for number, answer in enumerate(draw_answers(loaded, tokenized, drawn)):
        start = len(tokenized.input_ids[number])
        ids = torch.from_numpy(np.concatenate([tokenized.input_ids[number], answer])).long()[None]
        where = (torch.arange(ids.shape[1]) >= start - 1)[None]
        with torch.no_grad():
            plain = loaded.model(input_ids=ids).logits.double().log_softmax(2)
            with Intervention(loaded.model, steering.edits(), where=where):
                moved = loaded.model(input_ids=ids).logits.double().log_softmax(2)
        kept = slice(start - 1, start - 1 + len(answer))
        total += float((plain[0, kept].exp() * (plain[0, kept] - moved[0, kept])).sum())
        count += len(answer)
    return total / count


def test_a_budget_beyond_the_largest_strength_is_said_and_not_guessed():
    loaded = _loaded()
    steering = PersonaSteering(_vectors(1, loaded=loaded), "mean_ablate")
    solved = solve_strength(loaded, steering, QUESTIONS, 50.0, answers=AnswerSettings(4))
    assert not solved.reached and solved.strength == 1.0 and "not yet spent" in str(solved)
    assert solved.high == 1.0 and solved.spent == solved.trace[-1]


def test_what_cannot_be_steered_is_refused():
    loaded = _loaded()
    fitting = _vectors(1, loaded=loaded)
    with pytest.raises(InputError, match="operation"):
        PersonaSteering(fitting, "shout")
    with pytest.raises(InputError, match="0 to 1"):
        PersonaSteering(fitting, "ablate", strength=2.0)
    with pytest.raises(InputError, match="bound"):
        PersonaSteering(fitting, "cap")
    with pytest.raises(PersonaError, match="two of one"):
        PersonaSteering((*fitting, *fitting))
    with pytest.raises(PersonaError, match="one model"):
        PersonaSteering((*fitting, *_vectors(2)))
    with pytest.raises(PersonaError, match="extracted on"):
        steered_answers(loaded, QUESTIONS, PersonaSteering(_vectors(1)), SHORT)
    with pytest.raises(PersonaError, match="width"):
        vector = persona(d_model=16, model_fingerprint=loaded.fingerprint)
        steered_answers(loaded, QUESTIONS, PersonaSteering((vector,)), SHORT)
    with pytest.raises(InputError, match="budget"):
        solve_strength(loaded, PersonaSteering(fitting), QUESTIONS, 0.0)
    with pytest.raises(InputError, match="one of these"):
        Intervention(loaded.model, [], tokens="some")
