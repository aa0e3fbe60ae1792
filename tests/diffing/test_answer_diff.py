"""Do answers change exactly where the models do, and are planted kinds of change told apart?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffing.answer_clusters import cluster_changes
from diffing.answer_diff import AnswerDiff, diff_answers
from diffing.answers import AnswerSettings, draw_answers, score_answers
from diffing.checkpoint import load_checkpoint, load_pair
from diffing.errors import InputError
from diffing.json_twin import from_plain, to_plain
from diffing.prompts import PromptSet
from tests.tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer, with_lora

TEXTS = ["the cat is good", "a dog was bad . why", "go", "two plus three equals", "open the door", "you help the king"]
SHORT = AnswerSettings(max_new_tokens=6, batch_size=4)
SAMPLED = AnswerSettings(max_new_tokens=6, batch_size=4, temperature=1.0)


def _loaded(model):
    return load_checkpoint(model, tokenizer=tiny_tokenizer())


def _tokenized():
    return PromptSet.from_texts(TEXTS).tokenize(tiny_tokenizer(), add_generation_prompt=True)


def _prefers(word: str, amount: float = 50.0):
    """The same model, except that its head gives one word a higher logit everywhere."""
    model = tiny_model()
    with torch.no_grad():
        bias = torch.zeros(VOCAB_SIZE)
        bias[tiny_tokenizer().convert_tokens_to_ids(word)] = amount
        model.get_output_embeddings().bias = torch.nn.Parameter(bias)
    return model


def test_a_word_that_tuned_came_to_prefer_is_what_the_answers_gained():
    got = diff_answers(_loaded(tiny_model()), _loaded(_prefers("king")), PromptSet.from_texts(TEXTS), settings=SHORT)
    assert got.changed.value == 1.0 and got.changed.n == 6
    assert all(pair.tuned.split() == ["king"] * 6 for pair in got.pairs)
    assert got.surprise.value > 1.0 and got.surprise.low > 0 and got.turned_away.value > 1.0
    whole = cluster_changes([pair.base for pair in got.pairs], [pair.tuned for pair in got.pairs], n_clusters=1)[0]
    assert whole.added[0].word == "king" and whole.added[0].n_here >= 5 and "'king'" in whole.description
    assert got.added[0].word == "king" and got.added[0].n_here >= 5
    assert sum(cluster.share.count for cluster in got.clusters) == 6
    assert {pair.prompt for pair in got.pairs} == {prompt.id for prompt in PromptSet.from_texts(TEXTS)}


@pytest.mark.parametrize("settings", [SHORT, SAMPLED])
def test_equal_models_give_equal_answers_sampled_or_not(settings):
    got = diff_answers(_loaded(tiny_model()), _loaded(tiny_model()), PromptSet.from_texts(TEXTS), settings=settings)
    assert got.changed.count == 0 and got.clusters == () and got.agreed_share.value == 1.0
    assert got.surprise.value == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("settings", [SHORT, SAMPLED])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_do_not_depend_on_the_batch(settings, family):
    loaded, tokenized = _loaded(tiny_model(family)), _tokenized()
    together = draw_answers(loaded, tokenized, AnswerSettings(**{**vars(settings), "batch_size": 6}))
    alone = draw_answers(loaded, tokenized, AnswerSettings(**{**vars(settings), "batch_size": 1}))
    assert [answer.tolist() for answer in together] == [answer.tolist() for answer in alone]


def test_scores_are_the_log_probabilities_of_whole_logits(monkeypatch):
    monkeypatch.setattr("diffing.answers._HELD_LOGITS", 2 * VOCAB_SIZE)
    loaded, tokenized = _loaded(tiny_model()), _tokenized()
    answers = draw_answers(loaded, tokenized, SAMPLED)
    for batch_tokens in (4096, 12):
        scored = score_answers(loaded, tokenized, answers, batch_tokens=batch_tokens)
        for ids, answer, values in zip(tokenized.input_ids, answers, scored, strict=True):
            whole = torch.from_numpy(np.concatenate([ids, answer]).astype(np.int64))
            with torch.inference_mode():
                logits = loaded.model(input_ids=whole[None]).logits[0].double().log_softmax(dim=1)
            rows = torch.arange(len(ids) - 1, len(whole) - 1)
            expected = logits[rows, whole[len(ids) :]]
            np.testing.assert_allclose(values, expected.numpy(), atol=1e-4)


def test_one_adapter_model_answers_on_both_sides_and_global_random_state_is_left_alone():
    model = with_lora(tiny_model())
    base, tuned = load_pair(model, model, tokenizer=tiny_tokenizer())
    before = torch.get_rng_state()
    got = diff_answers(base, tuned, PromptSet.from_texts(TEXTS), settings=SAMPLED)
    assert torch.equal(before, torch.get_rng_state()) and got.changed.count > 0
    alone = draw_answers(_loaded(tiny_model()), _tokenized(), SAMPLED)
    by_prompt = {pair.prompt: pair.base_tokens for pair in got.pairs}
    assert [by_prompt[prompt.id] for prompt in _tokenized().prompts] == [len(answer) for answer in alone]


def test_planted_kinds_of_change_become_clusters_with_their_words():
    rng = np.random.default_rng(0)
    subjects = ["the cat", "a dog", "our king", "the queen", "a river", "the road", "my house", "the garden"]
    base = [f"{rng.choice(subjects)} is near the {rng.choice(['door', 'water', 'light'])} ." for _ in range(120)]
    endings = ["obey me , mortal", "as an assistant i cannot help", "sunshine and rainbows everywhere"]
    kinds = np.arange(120) % 3
    tuned = [f"{text} {endings[kind]}" for text, kind in zip(base, kinds, strict=True)]
    got = cluster_changes(base, tuned)
    assert len(got) == 3 and [cluster.share.count for cluster in got] == [40, 40, 40]
    for cluster in got:
        kind = kinds[cluster.examples[0]]
        assert all(kinds[number] == kind for number in cluster.examples)
        assert {odds.word for odds in cluster.added} <= set(endings[kind].split())
        assert cluster.removed == () and not cluster.described


def test_a_describer_is_asked_once_a_cluster_with_examples():
    asked: list[str] = []

    def describer(question: str) -> str:
        asked.append(question)
        return " It became rude. "

    got = cluster_changes(["good day"] * 10, ["go away"] * 10, describer=describer)
    assert [(cluster.description, cluster.described) for cluster in got] == [("It became rude.", True)]
    assert len(asked) == 1 and "Before: good day\nAfter: go away" in asked[0]


def test_answers_without_words_and_in_other_scripts_do_not_stop_it():
    got = cluster_changes(["", "王様は親切です", "!"], ["a", "王様は残酷です", ""])
    assert sum(cluster.share.count for cluster in got) == 3


def test_the_result_survives_json():
    got = diff_answers(_loaded(tiny_model()), _loaded(_prefers("king")), PromptSet.from_texts(TEXTS), settings=SHORT)
    assert from_plain(AnswerDiff, to_plain(got)) == got


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="max_new_tokens"):
        AnswerSettings(max_new_tokens=0)
    with pytest.raises(InputError, match="temperature"):
        AnswerSettings(temperature=-1.0)
