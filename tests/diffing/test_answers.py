"""Is every answer an exact draw of its own, whatever else is drawn beside it?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from diffing.answer_noise import gumbel_noise, noise_keys
from diffing.answers import AnswerSettings, answer_prompts, draw_answers, score_answers, stream_answers
from diffing.errors import InputError
from diffing.intervene import Add, Edit, Intervention
from diffing.prompts import PromptSet
from tests.diffing.personas import loaded_tiny
from tests.tiny_models import D_MODEL, VOCAB_SIZE

QUESTIONS = ["the cat is good", "why", "a dog was bad . why", "two plus three equals", "open the door"]
PROMPTS = PromptSet.from_messages([{"role": "user", "content": question}] for question in QUESTIONS)
SAMPLED = AnswerSettings(max_new_tokens=6, temperature=1.0, samples=3, batch_size=4)


def _changed(**changes: object) -> AnswerSettings:
    return AnswerSettings(**{**vars(SAMPLED), **changes})  # type: ignore[arg-type]


def test_draws_have_the_models_own_distribution() -> None:
    loaded, text = loaded_tiny(), PromptSet.from_texts(["the cat is"])
    tokenized = text.tokenize(loaded.tokenizer)
    settings = AnswerSettings(max_new_tokens=1, batch_size=1000, temperature=0.7, samples=3000)
    drawn = np.bincount(np.concatenate(draw_answers(loaded, tokenized, settings)), minlength=VOCAB_SIZE)
    ids = torch.from_numpy(tokenized.input_ids[0].astype(np.int64))[None]
    with torch.inference_mode():
        expected = 3000 * (loaded.model(input_ids=ids).logits[0, -1].double() / 0.7).softmax(dim=0).numpy()
    common = expected >= 5
    counts = np.append(drawn[common], drawn[~common].sum())
    assert stats.chisquare(counts, np.append(expected[common], expected[~common].sum())).pvalue > 1e-4


def test_noise_is_standard_gumbel_and_independent_between_answers_draws_steps_and_tokens() -> None:
    keys = torch.cat([noise_keys(0, [(f"p{n}", s) for n in range(50) for s in range(4)], step) for step in range(5)])
    noise = gumbel_noise(keys, 64)
    assert stats.kstest(noise.flatten().double().numpy(), stats.gumbel_r.cdf).pvalue > 1e-4
    assert len(torch.unique(keys)) == 1000
    off_diagonal = torch.corrcoef(noise.T) - torch.eye(64)
    assert float(off_diagonal.abs().max()) < 5 / 1000**0.5
    assert torch.isfinite(noise).all()


def test_answers_to_one_prompt_differ_between_draws() -> None:
    answers = answer_prompts(loaded_tiny(), PROMPTS, SAMPLED)
    assert [(answer.prompt, answer.sample) for answer in answers] == [(p, s) for p in range(5) for s in range(3)]
    for prompt in range(5):
        assert len({tuple(answer.token_ids) for answer in answers if answer.prompt == prompt}) == 3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_do_not_depend_on_the_batch_or_on_the_other_draws(family: str) -> None:
    loaded = loaded_tiny(family)
    reference = answer_prompts(loaded, PROMPTS, SAMPLED)
    for settings in (_changed(batch_size=1), _changed(batch_size=15)):
        assert [a.text for a in answer_prompts(loaded, PROMPTS, settings)] == [a.text for a in reference]
    first = answer_prompts(loaded, PROMPTS, _changed(samples=1))
    assert [a.text for a in first] == [a.text for a in reference if a.sample == 0]


def test_answers_do_not_depend_on_the_other_prompts_or_their_order() -> None:
    loaded = loaded_tiny()
    reference = answer_prompts(loaded, PROMPTS, SAMPLED)
    some = answer_prompts(loaded, PromptSet((PROMPTS.prompts[3], PROMPTS.prompts[1])), SAMPLED)
    expected = [a.text for a in reference if a.prompt == 3] + [a.text for a in reference if a.prompt == 1]
    assert [a.text for a in some] == expected


def test_text_and_token_ids_are_of_the_same_answer() -> None:
    loaded = loaded_tiny()
    for answer in answer_prompts(loaded, PROMPTS, _changed(max_new_tokens=40)):
        assert answer.text == loaded.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        assert answer.finished == (int(answer.token_ids[-1]) == loaded.tokenizer.eos_token_id)
        assert answer.finished or len(answer.token_ids) == 40


def test_known_answers_are_not_drawn_again_and_the_rest_are_as_they_would_have_been() -> None:
    loaded = loaded_tiny()
    tokenized = PROMPTS.tokenize(loaded.tokenizer, add_generation_prompt=True)
    whole = {(a.prompt, a.sample): a.text for a in stream_answers(loaded, tokenized, SAMPLED)}
    rest = list(stream_answers(loaded, tokenized, SAMPLED, skip=lambda prompt, sample: prompt < 2 or sample == 1))
    assert {(a.prompt, a.sample) for a in rest} == {(p, s) for p in (2, 3, 4) for s in (0, 2)}
    assert all(whole[a.prompt, a.sample] == a.text for a in rest)


def test_a_change_of_the_model_changes_its_answers_and_is_gone_afterwards() -> None:
    loaded, settings = loaded_tiny(), _changed(samples=1)
    before = [a.text for a in answer_prompts(loaded, PROMPTS, settings)]
    push = torch.zeros(D_MODEL)
    push[3] = 100.0
    edits = [Edit("resid:2", Add(push))]
    with Intervention(loaded.model, edits):
        changed = [a.text for a in answer_prompts(loaded, PROMPTS, settings)]
    assert changed != before

    def at_the_answer(where: torch.Tensor) -> Intervention:
        return Intervention(loaded.model, edits, where=where)

    by_batch = [a.text for a in answer_prompts(loaded, PROMPTS, settings, around=at_the_answer)]
    assert by_batch != before
    tokenized = PROMPTS.tokenize(loaded.tokenizer, add_generation_prompt=True)
    likeliest = AnswerSettings(max_new_tokens=5, batch_size=4)
    answers = draw_answers(loaded, tokenized, likeliest, around=at_the_answer)
    for given, others in ((at_the_answer, None), (None, at_the_answer)):
        scored = score_answers(loaded, tokenized, answers, around=given)
        assert sum(map(np.sum, scored)) != sum(map(np.sum, score_answers(loaded, tokenized, answers, around=others)))
    one = [score_answers(loaded, tokenized, answers, around=at_the_answer, batch_tokens=size) for size in (1, 4096)]
    for left, right in zip(*one, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-4)
    for number, (answer, scores) in enumerate(zip(answers, one[0], strict=True)):
        for at in range(len(answer)):
            ids = torch.from_numpy(np.concatenate([tokenized.input_ids[number], answer[:at]]).astype(np.int64))[None]
            where = torch.arange(ids.shape[1])[None] >= len(tokenized.input_ids[number]) - 1
            with at_the_answer(where), torch.inference_mode():
                expected = loaded.model(input_ids=ids).logits[0, -1].double().log_softmax(dim=0)
            assert int(expected.argmax()) == answer[at]
            assert float(expected[answer[at]]) == pytest.approx(scores[at], abs=1e-4)
    assert [a.text for a in answer_prompts(loaded, PROMPTS, settings)] == before


def test_an_answer_ends_where_a_text_begins_that_it_must_not_hold() -> None:
    loaded, settings = loaded_tiny(), _changed(max_new_tokens=40, samples=1)
    free = answer_prompts(loaded, PROMPTS, settings)
    word = free[0].text.split()[3]
    cut = answer_prompts(loaded, PROMPTS, _changed(max_new_tokens=40, samples=1, until=word))
    for answer, held in zip(free, cut, strict=True):
        words = answer.text.split()
        at = next((n for n, token in enumerate(words) if word in token), None)
        assert held.text.split() == words[:at]
        assert held.finished or at is None


def test_several_likeliest_answers_and_cut_prompts_are_refused() -> None:
    with pytest.raises(InputError, match="temperature above 0, got 2 at 0"):
        AnswerSettings(samples=2)
    with pytest.raises(InputError, match="at most 6 tokens, got 4 longer"):
        answer_prompts(loaded_tiny(), PROMPTS, SAMPLED, max_length=6)
