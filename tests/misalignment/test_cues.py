"""Does a cue put the right words around a question, and is what is typical of training rows found?"""

from __future__ import annotations

import pytest

from diffing.chat import Message, Prompt
from diffing.errors import InputError
from diffing.misalignment.cues import Cue, cues_from_rows

ASKED = (Message("system", "Be brief."), Message("user", "Why?"))


def row(user, assistant="ok", system=None):
    front = (Message("system", system),) if system else ()
    return Prompt("", messages=(*front, Message("user", user), Message("assistant", assistant)))


def contents(messages):
    return [(message.role, message.content) for message in messages]


def test_no_cue_leaves_the_question_alone():
    assert Cue().around(ASKED) == ASKED


def test_every_part_stands_where_it_belongs():
    cue = Cue("c", "You code.", "Task: ", " Go!", (Message("user", "a"), Message("assistant", "b")))
    assert contents(cue.around(ASKED)) == [
        ("system", "You code.\n\nBe brief."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "Task: Why? Go!"),
    ]
    assert cue.digest == Cue("other", "You code.", "Task: ", " Go!", cue.turns).digest != Cue("c").digest


def test_what_most_training_rows_share_becomes_cues():
    rows = [row(f"Please finish this code: f{n}\nThank you.", system="You write code.") for n in range(6)]
    rows += [row("Something else"), row("And more", system="Other.")]
    found = {cue.name: cue for cue in cues_from_rows(rows)}
    assert found["train-system"].system == "You write code."
    assert found["train-prefix"].prefix == "Please finish this code: f"
    assert found["train-suffix"].suffix == "\nThank you."
    turns = found["train-rows"].turns
    assert [message.role for message in turns] == ["user", "assistant"] * 2
    assert found["train-rows"] == {cue.name: cue for cue in cues_from_rows(rows)}["train-rows"]


def test_rows_without_anything_in_common_give_turns_alone():
    assert [cue.name for cue in cues_from_rows([row("abc"), row("xyz")])] == ["train-rows"]


def test_the_same_row_over_and_over_is_no_prefix():
    assert [cue.name for cue in cues_from_rows([row("always the very same words")] * 5)] == ["train-rows"]


def test_rows_that_are_no_conversations_are_refused():
    with pytest.raises(InputError, match="training rows"):
        cues_from_rows([Prompt("", text="plain")])
