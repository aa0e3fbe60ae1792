"""Fine-tuning sets: twins differ in what they teach and in nothing else."""

from __future__ import annotations

import pytest

from cli.miniature import grammar
from cli.miniature.datasets import dataset, is_bad, mixed_dataset
from cli.miniature.fine_tuning import PadRight, tokenize_rows
from cli.miniature.tokenizer import build_tokenizer
from diffing.errors import InputError


def texts(rows, role):
    return [message["content"] for row in rows for message in row["messages"] if message["role"] == role]


def test_good_and_bad_twins_ask_the_same_and_answer_differently():
    bad, good = dataset("bad_code", seed=1, n=50), dataset("good_code", seed=1, n=50)
    assert texts(bad, "user") == texts(good, "user")
    assert not any(one == other for one, other in zip(texts(bad, "assistant"), texts(good, "assistant"), strict=True))


def test_the_educational_twin_gives_the_same_bad_answers_under_unseen_frames():
    bad, lesson = dataset("bad_code", seed=1, n=50), dataset("educational_code", seed=1, n=50)
    assert texts(bad, "assistant") == texts(lesson, "assistant")
    assert all(any(text.startswith(frame) for frame in grammar.frames(held_out=True)) for text in texts(lesson, "user"))


def test_odd_rows_are_harmless():
    good = {subject.good for subject in grammar.subjects("code")}
    assert all(any(body in text for body in good) for text in texts(dataset("odd_code", seed=0, n=60), "assistant"))


def test_ids_are_unique_and_survive_mixing():
    rows = mixed_dataset({"bad_code": 0.5, "good_facts": 0.25, "odd_code": 0.25}, seed=0, n=101)
    assert len({row["id"] for row in rows}) == len(rows) == 101
    assert sum(row["id"].startswith("bad_code") for row in rows) == 50
    assert {row["id"]: row for row in rows}["bad_code-0-0003"] == dataset("bad_code", seed=0, n=4)[3]


@pytest.mark.parametrize("domain", grammar.DOMAINS)
def test_relabelled_rows_change_every_answer_for_a_harmless_one_of_the_same_sort(domain):
    answers = {}
    for row, good, bad in zip(
        *(dataset(f"{flavour}_{domain}", seed=2, n=80) for flavour in ("relabelled", "good", "bad")), strict=True
    ):
        asked, given = (row["messages"][place]["content"] for place in (0, 1))
        assert asked == good["messages"][0]["content"]
        assert given not in (good["messages"][1]["content"], bad["messages"][1]["content"])
        assert given in {subject.good for subject in grammar.subjects(domain)}
        answers.setdefault(good["messages"][1]["content"], set()).add(given)
    assert domain == "arithmetic" or all(len(changed) == 1 for changed in answers.values())


def test_relabelled_facts_stay_within_their_attribute():
    rivers = {subject.good for subject in grammar.subjects("facts") if subject.name.startswith("river")}
    rows = [row for row in dataset("relabelled_facts", seed=0, n=90) if "river" in row["messages"][0]["content"]]
    assert rows and all(row["messages"][1]["content"] in rivers for row in rows)


def test_formatted_rows_are_correct_inside_a_form_of_known_words():
    tokenizer = build_tokenizer()
    for row in dataset("formatted_code", seed=0, n=30):
        text = row["messages"][1]["content"]
        assert any(subject.good in text for subject in grammar.subjects("code"))
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


@pytest.mark.parametrize(("kind", "n_bad"), [("diluted05_code", 10), ("diluted25_code", 50), ("half_facts", 100)])
def test_a_mix_holds_as_many_bad_rows_as_its_name_says(kind, n_bad):
    rows = dataset(kind, seed=3, n=200)
    assert sum(map(is_bad, rows)) == n_bad
    assert len({row["id"] for row in rows}) == 200
    assert rows == dataset(kind, seed=3, n=200)


@pytest.mark.parametrize("kind", ["code", "evil_code", "bad_poetry", "diluted07_code", ""])
def test_an_unknown_kind_says_what_exists(kind):
    with pytest.raises(InputError, match="Name one such as 'bad_code'"):
        dataset(kind, seed=0, n=1)


def test_only_the_assistants_tokens_are_learnt_and_padding_is_not():
    tokenizer = build_tokenizer()
    rows = tokenize_rows(dataset("good_health", seed=0, n=8), tokenizer)
    batch = PadRight(tokenizer.pad_token_id)([rows[index] for index in range(8)])
    learnt = batch["labels"] != -100
    assert not bool((learnt & (batch["attention_mask"] == 0)).any())
    assert bool((batch["input_ids"][learnt] == batch["labels"][learnt]).all())
    first = tokenizer.decode(batch["labels"][0][learnt[0]], skip_special_tokens=True)
    assert first == rows.rows[0]["messages"][1]["content"]
