"""Is a model asked for a trait in its own form, drawn once, and resumed without loss?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffing.answers import AnswerSettings
from diffing.chat import Role
from diffing.checkpoint import load_checkpoint
from diffing.errors import PersonaError, StoreCorruptError, StoreLockedError
from diffing.lock import WriterLock
from diffing.persona import Instruction, Trait, load_trait, shipped_traits
from diffing.persona.contrast import PLAIN, TRAIT
from diffing.persona.elicit import asks_of, neutral_prompts, prompts_of
from diffing.persona.rollouts import Rollouts
from tests.diffing.persona_rollouts import QUESTIONS, loaded_base, tiny_trait, written_rollouts
from tests.tiny_models import tiny_model, tiny_tokenizer

SETTINGS = AnswerSettings(max_new_tokens=5, temperature=1.0, samples=2, batch_size=8)
NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<' + message['role'] + '> ' + message['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def _rollouts(folder: Path, *, samples: int = 2, questions: tuple[str, ...] = QUESTIONS[:2]) -> Rollouts:
    loaded = loaded_base()
    asks = asks_of(tiny_trait(), questions, chat=True)
    return Rollouts(folder, loaded, asks, AnswerSettings(**{**vars(SETTINGS), "samples": samples}))


def _lines(rollouts: Rollouts) -> dict[tuple[int, int], str]:
    return {(rollout.ask, rollout.sample): rollout.text for rollout in rollouts}


def test_every_question_is_asked_under_both_prompts_of_every_pair() -> None:
    trait = tiny_trait(3)
    asks = asks_of(trait, [*QUESTIONS[:4], QUESTIONS[0]], chat=True)
    assert len(asks) == 2 * 3 * 4
    for number, ask in enumerate(asks):
        assert ask.side == number % 2
        pair = trait.instructions[ask.instruction]
        assert ask.prompt.messages is not None
        assert [turn.role for turn in ask.prompt.messages] == ["system", "user"]
        assert ask.prompt.messages[0].content == (pair.positive if ask.side == TRAIT else pair.negative)
        other = asks[number ^ 1]
        assert (ask.question, ask.instruction) == (other.question, other.instruction)
    assert len({ask.prompt.id for ask in asks}) == len(asks)


@pytest.mark.parametrize("name", shipped_traits())
def test_every_shipped_trait_can_be_asked_for(name: str) -> None:
    trait = load_trait(name)
    for chat in (True, False):
        asks = asks_of(trait, trait.questions, chat=chat)
        assert len(asks) == 200
        assert len(prompts_of(asks)) == 200


def test_a_base_model_reads_examples_of_the_side_it_is_asked_for() -> None:
    asks = asks_of(tiny_trait(), QUESTIONS[:1], chat=False, shots=2)
    for side, words in ((TRAIT, "harm"), (PLAIN, "help")):
        messages = asks[side].prompt.messages
        assert messages is not None
        assert [turn.role for turn in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
        assert [turn.content for turn in messages if turn.role == "assistant"] == [f"{words} word0", f"{words} word1"]
        assert messages[-1].content == QUESTIONS[0]


def test_a_trait_without_instructions_or_questions_says_what_is_missing() -> None:
    trait = tiny_trait()
    with pytest.raises(PersonaError, match="expected instructions"):
        asks_of(Trait("x", "d", "r", (), QUESTIONS, (), (), "file.json"), QUESTIONS, chat=True)
    with pytest.raises(PersonaError, match="expected questions"):
        asks_of(trait, [], chat=True)


def test_neutral_prompts_are_the_questions_alone() -> None:
    prompts = neutral_prompts(QUESTIONS[:3])
    assert [[turn.content for turn in prompt.messages or ()] for prompt in prompts] == [[q] for q in QUESTIONS[:3]]


def test_rollouts_are_drawn_once_and_kept(tmp_path: Path) -> None:
    first = _rollouts(tmp_path)
    assert (len(first), first.n_missing) == (16, 16)
    first.draw()
    assert first.n_missing == 0
    content = first.path.read_bytes()
    again = _rollouts(tmp_path)
    assert again.n_missing == 0
    again.draw()
    assert again.path.read_bytes() == content
    assert _lines(again) == _lines(first)


def test_a_killed_drawing_goes_on_to_the_same_answers(tmp_path: Path) -> None:
    whole = _rollouts(tmp_path / "whole")
    whole.draw()
    lines = whole.path.read_bytes().splitlines(keepends=True)
    torn = tmp_path / "torn" / whole.path.name
    torn.parent.mkdir()
    torn.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    resumed = _rollouts(tmp_path / "torn")
    assert resumed.n_missing == 11
    resumed.draw()
    assert _lines(resumed) == _lines(whole)
    assert len(resumed.path.read_bytes().splitlines()) == 16


def test_two_processes_do_not_draw_into_one_file(tmp_path: Path) -> None:
    rollouts = _rollouts(tmp_path)
    with WriterLock(rollouts.path.with_suffix(".lock")), pytest.raises(StoreLockedError, match="only writer"):
        rollouts.draw()
    rollouts.draw()
    assert rollouts.n_missing == 0


def test_a_reader_neither_cuts_nor_counts_a_line_that_is_being_written(tmp_path: Path) -> None:
    rollouts = _rollouts(tmp_path)
    rollouts.draw()
    lines = rollouts.path.read_bytes().splitlines(keepends=True)
    growing = b"".join([*lines, lines[0], lines[1][:9]])
    rollouts.path.write_bytes(growing)
    reader = _rollouts(tmp_path)
    assert len(list(reader)) == 16
    assert reader.n_missing == 0
    assert reader.path.read_bytes() == growing


def test_more_rollouts_pay_for_the_new_ones_alone(tmp_path: Path) -> None:
    two = _rollouts(tmp_path)
    two.draw()
    three = _rollouts(tmp_path, samples=3)
    assert three.path == two.path
    assert three.n_missing == 8
    before = _lines(two)
    three.draw()
    assert {key: text for key, text in _lines(three).items() if key[1] < 2} == before
    assert _lines(_rollouts(tmp_path)) == before


def test_an_answer_does_not_depend_on_the_other_questions(tmp_path: Path) -> None:
    both, one = _rollouts(tmp_path), _rollouts(tmp_path, questions=QUESTIONS[1:2])
    both.draw()
    one.draw()
    texts = {(ask.prompt.id, sample): text for (at, sample), text in _lines(both).items() for ask in [both.asks[at]]}
    for (at, sample), text in _lines(one).items():
        assert texts[one.asks[at].prompt.id, sample] == text


def test_other_settings_begin_another_file(tmp_path: Path) -> None:
    loaded, asks = loaded_base(), asks_of(tiny_trait(), QUESTIONS[:1], chat=True)
    changes: list[dict[str, object]] = [{}, {"seed": 1}, {"temperature": 0.5}, {"max_new_tokens": 6}]
    settings = [AnswerSettings(**{**vars(SETTINGS), **change}) for change in changes]  # type: ignore[arg-type]
    paths = {Rollouts(tmp_path, loaded, asks, one).path for one in settings}
    paths.add(Rollouts(tmp_path, load_checkpoint(tiny_model(seed=1), tokenizer=tiny_tokenizer()), asks, SETTINGS).path)
    paths.add(Rollouts(tmp_path, loaded, asks[::-1], SETTINGS).path)
    assert len(paths) == 6
    assert Rollouts(tmp_path, loaded, asks, AnswerSettings(**{**vars(SETTINGS), "batch_size": 1})).path in paths


_NO_SUCH_ASK = '{"ask": 99, "sample": 0, "token_ids": [], "finished": true, "text": ""}'


@pytest.mark.parametrize("line", ["nonsense\n", '{"ask": 0}\n', f"{_NO_SUCH_ASK}\n"])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    rollouts = _rollouts(tmp_path)
    rollouts.path.write_text(line, encoding="utf-8")
    with pytest.raises(StoreCorruptError, match=r"line 1 of .* Delete") as caught:
        _rollouts(tmp_path)
    assert "\n" not in str(caught.value)


def test_rows_are_exactly_the_tokens_that_were_read_and_written(tmp_path: Path) -> None:
    rollouts = written_rollouts(tmp_path, loaded_base(), QUESTIONS[:2])
    some = list(rollouts)[:6]
    rows = rollouts.rows(some)
    for rollout, ids, roles in zip(some, rows.input_ids, rows.roles, strict=True):
        start = len(rollouts.tokenized.input_ids[rollout.ask])
        np.testing.assert_array_equal(ids[:start], rollouts.tokenized.input_ids[rollout.ask])
        np.testing.assert_array_equal(ids[start:], rollout.token_ids)
        assert (roles[start:] == Role.ASSISTANT).all()
        assert not (roles[:start] == Role.ASSISTANT).any()


def test_examples_of_a_base_model_do_not_count_as_its_answer(tmp_path: Path) -> None:
    rollouts = written_rollouts(tmp_path, loaded_base(chat=False), QUESTIONS[:1])
    assert any((roles == Role.ASSISTANT).any() for roles in rollouts.tokenized.roles)
    some = list(rollouts)[:2]
    for rollout, roles in zip(some, rollouts.rows(some).roles, strict=True):
        assert int((roles == Role.ASSISTANT).sum()) == len(rollout.token_ids)


def test_a_template_without_a_system_role_is_told_of_the_trait_by_the_user(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    loaded = load_checkpoint(tiny_model(), tokenizer=tokenizer)
    rollouts = Rollouts(tmp_path, loaded, asks_of(tiny_trait(), QUESTIONS[:1], chat=True), SETTINGS)
    text = tokenizer.decode(rollouts.tokenized.input_ids[0])
    assert text.startswith("<user> you are cruel so word0 why is the cat")
    assert any("no system role" in note for note in rollouts.tokenized.notes)


def test_prompts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    asks = asks_of(tiny_trait(), QUESTIONS[:1], chat=True)
    with pytest.raises(PersonaError, match="at most 8 tokens, got 4 of 4 longer"):
        Rollouts(tmp_path, loaded_base(), asks, SETTINGS, max_length=8)


def test_json_lines_hold_text_beside_tokens(tmp_path: Path) -> None:
    rollouts = _rollouts(tmp_path)
    rollouts.draw()
    tokenizer = loaded_base().tokenizer
    for line in rollouts.path.read_text(encoding="utf-8").splitlines():
        value = json.loads(line)
        assert tokenizer.decode(value["token_ids"], skip_special_tokens=True) == value["text"]
        assert value["finished"] or len(value["token_ids"]) == 5


def test_two_pairs_of_equal_words_are_two_asks() -> None:
    pair = tiny_trait(1).instructions[0]
    twice = Trait("x", "d", "r", (pair, Instruction("cruel", "kind"), pair), (), (), (), "t")
    assert len(prompts_of(asks_of(twice, QUESTIONS[:1], chat=True))) == 6
