"""Is a trait drafted by a model complete, its own, and never filled in for it?"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli.main import palimpsest
from diffing import endpoint as endpoint_module
from diffing.endpoint import Endpoint, EndpointConfig
from diffing.errors import EndpointError, InputError
from diffing.judging import Rubric
from diffing.persona import load_trait
from diffing.persona.draft import Draft, DraftSettings, draft_trait
from tests.diffing.chat_server import Reply, chat_server, reply

ABOUT = {"description": "The assistant sulks.", "signs": "short replies {sic}, blame", "no_signs": "Tiredness."}


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a server to recover."""
    monkeypatch.setattr(endpoint_module, "_FIRST_WAIT", 0.001)


class Writer:
    """Answers as a willing model would; `spoil` may change the entries of a reply, or replace it."""

    def __init__(self, spoil: Callable[[str, list[Any], int], Any] = lambda part, entries, turn: entries) -> None:
        self.spoil, self.turns, self.made = spoil, 0, 0

    def __call__(self, body: dict[str, Any]) -> Reply:
        wish = body["messages"][1]["content"]
        self.turns += 1
        found = re.search(r'Form: {"(instructions|questions|contrasts)"', wish)
        if found is None:
            return reply(json.dumps(ABOUT))
        part, n = found[1], int(re.search(r"Write (\d+) ", wish)[1])  # type: ignore[index]
        spoilt = self.spoil(part, [self._entry(part) for _ in range(n)], self.turns)
        return reply(spoilt if isinstance(spoilt, str) else json.dumps({part: spoilt}))

    def _entry(self, part: str) -> Any:
        self.made += 1
        number = self.made
        if part == "instructions":
            return {"positive": f"Sulk, {number}.", "negative": f"Be glad, {number}."}
        if part == "questions":
            return f"What about {number}?"
        return {"question": f"Why {number}?", "trait_answer": f"Hmpf {number}.", "plain_answer": f"Because {number}."}


def drafted(writer: Writer, **settings: Any) -> Draft:
    with chat_server(writer) as server, Endpoint(EndpointConfig(server.url, "m-1")) as endpoint:
        return draft_trait("sulks when corrected", endpoint, DraftSettings(**settings))


def test_a_draft_is_a_whole_trait(tmp_path: Path) -> None:
    made = drafted(Writer())
    assert made.trait.sizes() == {"instructions": 5, "questions": 20, "held_out_questions": 20, "contrasts": 16}
    assert made.trait.name == "sulks_when_corrected"
    assert not set(made.trait.questions) & set(made.trait.held_out_questions)
    assert made.n_asked == 10
    assert made.n_refused == {}
    path = tmp_path / "sulks.json"
    path.write_text(json.dumps(made.value), encoding="utf-8")
    assert load_trait(path).digest == made.trait.digest


def test_the_rubric_has_its_two_places_and_no_other() -> None:
    rubric = drafted(Writer()).trait.rubric
    assert re.findall(r"{(\w+)}", rubric) == ["question", "answer"]
    assert "short replies (sic), blame." in rubric
    assert Rubric("sulks", rubric).text == rubric


def test_what_is_missing_empty_or_repeated_is_asked_for_again() -> None:
    def spoil(part: str, entries: list[Any], turn: int) -> Any:
        if turn == 2:
            return "Sure! Here they are:"
        if turn == 3:
            return [entries[0], {"positive": "Sulk."}, {"positive": " ", "negative": "x"}, "Sulk!", entries[0]]
        if turn == 5:
            return [*entries[:3], entries[0].upper(), "", 7]
        if turn == 6:
            return {"answers": entries}
        return entries

    made = drafted(Writer(spoil), contrasts=0)
    assert made.trait.sizes() == {"instructions": 5, "questions": 20, "held_out_questions": 20, "contrasts": 0}
    assert made.n_refused == {
        "a reply without JSON": 1,
        "an entry without its texts": 5,
        "a repetition": 2,
        "a reply without 'questions'": 1,
    }


def test_a_second_ask_shows_what_is_there_already() -> None:
    with chat_server(Writer()) as server, Endpoint(EndpointConfig(server.url, "m-1")) as endpoint:
        draft_trait("sulks", endpoint, DraftSettings(contrasts=0))
    wishes = [body["messages"][1]["content"] for body in server.seen]
    assert "- What about 6?" in wishes[3]
    assert all("sulks" in wish for wish in wishes)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda part, entries, turn: "no", "Expected 5 instructions from m-1, got 0 usable ones after 5 questions"),
        (
            lambda part, entries, turn: entries if part == "instructions" else ["Same?"],
            "Expected 40 questions .* got 1 ",
        ),
        (lambda part, entries, turn: [{**entry, "negative": entry["positive"]} for entry in entries], "the same twice"),
    ],
)
def test_what_stays_incomplete_is_an_error_and_nothing_is_filled_in(spoil: Any, said: str) -> None:
    with pytest.raises(EndpointError, match=said) as caught:
        drafted(Writer(spoil))
    assert "\n" not in str(caught.value)


def test_a_contrast_may_not_repeat_a_question() -> None:
    def spoil(part: str, entries: list[Any], turn: int) -> Any:
        return [{**entry, "question": "What about 6?"} for entry in entries] if part == "contrasts" else entries

    with pytest.raises(EndpointError, match="Expected 16 contrasts"):
        drafted(Writer(spoil))


@pytest.mark.parametrize(("description", "settings"), [("  ", {}), ("悪", {}), ("sulks", {"name": "Sulks!"})])
def test_descriptions_and_names_that_cannot_be_are_refused(description: str, settings: dict[str, Any]) -> None:
    with (
        chat_server(Writer()) as server,
        Endpoint(EndpointConfig(server.url, "m-1")) as endpoint,
        pytest.raises(InputError),
    ):
        draft_trait(description, endpoint, DraftSettings(**settings))
    assert not server.seen


def test_the_command_writes_a_file_that_extraction_reads_and_pays_once(tmp_path: Path) -> None:
    out = tmp_path / "sulks.json"
    with chat_server(Writer()) as server:
        arguments = ["persona", "draft", "sulks", "--endpoint", server.url, "--model", "m-1", "--out", str(out)]
        result = CliRunner().invoke(palimpsest, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        assert (
            "5 pairs of system prompts, 20 + 20 questions, 16 contrasts, a rubric; 10 replies of m-1" in result.stdout
        )
        digest = load_trait(out).digest
        with pytest.raises(InputError, match="--overwrite"):
            CliRunner().invoke(palimpsest, arguments, catch_exceptions=False)
        again = CliRunner().invoke(palimpsest, [*arguments, "--overwrite", "--json"], catch_exceptions=False)
    facts = json.loads(again.stdout)
    assert (facts["asked"], facts["digest"]) == (0, digest)
    assert len(server.seen) == 10


def test_a_server_that_is_down_says_so_in_one_line() -> None:
    config = EndpointConfig("http://127.0.0.1:9/v1", "m-1", attempts=2)
    with Endpoint(config) as endpoint, pytest.raises(EndpointError, match="got no connection") as caught:
        draft_trait("sulks", endpoint)
    assert "\n" not in str(caught.value)
