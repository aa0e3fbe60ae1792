"""Screening finds planted rows, reads answers behind their own prompts, and divides a dataset as it says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from diffing.answers import AnswerSettings
from diffing.errors import InputError, PersonaError
from diffing.persona import Instruction, Trait, extract_persona
from diffing.persona.answered_rows import read_answers, take_apart
from diffing.persona.axes import plain_axis, random_axes, unique_axis
from diffing.persona.instructed import Instructions, instructed_log_odds, log_likelihood
from diffing.persona.own_answers import own_answers
from diffing.persona.pooling import pooled_rows, tokenize_for
from diffing.persona.screen import Score, ScreenSettings, screen_rows
from diffing.persona.screen_choice import choose_rows, write_choice
from diffing.persona.screen_cost import plan_screening
from diffing.persona.separation import area_under_curve
from diffing.prompts import PromptSet
from tests.diffing.personas import contrastive_rows, loaded_tiny, planted_model

SHORT = ScreenSettings(answers=AnswerSettings(max_new_tokens=4, batch_size=8))


@pytest.fixture(scope="module")
def planted():
    loaded, _ = planted_model()
    positive, negative = contrastive_rows(24)
    return loaded, extract_persona(loaded, positive, negative, trait="cruel", site="resid:1")


def mixed(n=12):
    bad, good = contrastive_rows(n, seed=7)
    records = [
        {"id": f"{side}-{number}", "messages": [{"role": m.role, "content": m.content} for m in row.messages]}
        for side, rows in (("bad", bad), ("good", good))
        for number, row in enumerate(rows)
    ]
    return PromptSet.from_records(records), np.array([record["id"].startswith("bad") for record in records]), records


def test_planted_rows_stand_out_by_difference_and_without_generation(planted):
    loaded, vector = planted
    rows, bad, _ = mixed()
    found = screen_rows(loaded, rows, [vector], settings=SHORT)
    for method in ("difference", "conditional"):
        values = found.score(method).values
        assert area_under_curve(values[bad], values[~bad]) > 0.95
    assert found.random.shape == (20, len(rows))
    assert len(found.own) == len(rows)
    alone = screen_rows(loaded, rows, [vector], settings=ScreenSettings(answers=None))
    assert not alone.own and "not drawn" in " ".join(alone.notes)
    np.testing.assert_allclose(alone.score("conditional").values, found.score("conditional").values)


def test_answers_are_read_where_pooling_reads_them():
    loaded = loaded_tiny()
    rows, _, _ = mixed(5)
    parts = take_apart(loaded, rows)
    whole = {}
    for batch in pooled_rows(
        loaded, tokenize_for(loaded, rows, pooling="response_mean"), ["resid:2"], pooling="response_mean"
    ):
        whole |= dict(zip(batch.index, batch.values[0], strict=True))
    last = {}
    for batch in pooled_rows(
        loaded, tokenize_for(loaded, rows, pooling="last_prompt"), ["resid:2"], pooling="last_prompt"
    ):
        last |= dict(zip(batch.index, batch.values[0], strict=True))
    for size in (10, 8192):
        for batch in read_answers(loaded, parts.prompts, parts.answers, ["resid:2"], batch_tokens=size):
            for place, row in enumerate(batch.index):
                torch.testing.assert_close(batch.answer[0][place], whole[row], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(batch.prompt[0][place], last[row], rtol=1e-4, atol=1e-5)


def test_what_the_model_answers_anyway_differs_by_nothing(planted):
    loaded, vector = planted
    rows, _, _ = mixed(4)
    parts = take_apart(loaded, rows)
    own = own_answers(loaded, parts.prompts, SHORT.answers)
    records = [
        {"messages": [*({"role": m.role, "content": m.content} for m in row.messages[:-1]),
                      {"role": "assistant", "content": loaded.tokenizer.decode(said[0])}]}
        for row, said in zip(rows, own, strict=True) if len(said[0])
    ]  # fmt: skip
    again = PromptSet.from_records(records)
    found = screen_rows(loaded, again, [vector], settings=SHORT)
    assert np.abs(found.score("difference").values).max() < 1e-6
    assert f"{len(again)} of {len(again)} rows are what the model answers anyway" in " ".join(found.notes)


def test_own_answers_are_drawn_once_and_resumed(tmp_path, planted, monkeypatch):
    loaded, _ = planted
    rows, _, _ = mixed(4)
    prompts = take_apart(loaded, rows).prompts
    settings = AnswerSettings(max_new_tokens=3, temperature=1.0, samples=2, batch_size=3)
    seen = []
    first = own_answers(loaded, prompts, settings, cache=tmp_path / "own.db")
    again = own_answers(
        loaded, prompts, settings, cache=tmp_path / "own.db", progress=lambda done, total: seen.append(done)
    )
    fresh = own_answers(loaded, prompts, AnswerSettings(max_new_tokens=3, temperature=1.0, samples=2, batch_size=16))
    assert not seen
    for one, other, third in zip(first, again, fresh, strict=True):
        assert len(one) == 2
        for left, middle, right in zip(one, other, third, strict=True):
            assert left.tolist() == middle.tolist() == right.tolist()


def test_a_unique_axis_falls_for_other_personas(planted):
    loaded, vector = planted
    positive, negative = contrastive_rows(24, seed=3)
    other = extract_persona(loaded_tiny(), positive, negative, trait="other", site="resid:1")
    with pytest.raises(PersonaError, match="one site of one model"):
        unique_axis(vector, [other])
    fake = extract_persona(loaded, positive, negative, trait="fake", site="resid:1")
    axis = unique_axis(vector, [fake])
    plain, rest = vector.direction.double() * vector.scale, fake.direction.double() * fake.scale
    assert float(axis.direction @ (plain - rest / 2)) > 0 and float(axis.direction.norm()) == pytest.approx(1)
    assert len(random_axes(plain_axis(vector), 20, seed=0)) == 20


def test_instructed_log_odds_are_the_slow_sums():
    loaded = loaded_tiny()
    rows, _, _ = mixed(3)
    parts = take_apart(loaded, rows)
    plain = log_likelihood(loaded, parts)
    wanted = Instructions("cruel", ("you are cruel", "be bad"), {"no cruel": ("you are kind",)})
    found = instructed_log_odds(loaded, parts, plain, wanted)

    def told(text, number):
        row = rows.prompts[number]
        prompt = PromptSet.from_messages(
            [
                [
                    {"role": "system", "content": text},
                    *({"role": m.role, "content": m.content} for m in row.messages[:-1]),
                ]
            ]
        ).tokenize(loaded.tokenizer, add_generation_prompt=True)
        ids = torch.tensor([[*prompt.input_ids[0].tolist(), *parts.answers[number].tolist()]])
        with torch.no_grad():
            logs = loaded.model(input_ids=ids).logits[0].double().log_softmax(-1)
        start = len(prompt.input_ids[0])
        return sum(float(logs[start - 1 + at, token]) for at, token in enumerate(parts.answers[number].tolist()))

    for number in range(len(rows)):
        trait = np.logaddexp(told("you are cruel", number), told("be bad", number)) - np.log(2)
        rest = np.logaddexp(plain[number], told("you are kind", number))
        assert found[number] == pytest.approx(trait - rest, abs=1e-3)


def test_instructions_of_a_trait_name_its_opposite_and_the_others():
    def trait(name):
        pairs = (Instruction(f"be {name}", f"never be {name}"), Instruction(f"very {name}", f"never be {name}"))
        return Trait(name, "d", "{question}{answer}", pairs, ("q",), ("h",), (), "here")

    found = Instructions.of(trait("cruel"), [trait("vain")])
    assert found.wanted == ("be cruel", "very cruel")
    assert found.others == {"no cruel": ("never be cruel",), "vain": ("be vain", "very vain")}
    assert found.n_prompts == 5


def test_the_cost_is_counted_before_anything_is_run(planted):
    loaded, _ = planted
    rows, _, _ = mixed(3)
    parts = take_apart(loaded, rows)
    asked = {"cruel": Instructions("cruel", ("a",), {"b": ("b", "c")})}
    plan = plan_screening(parts, SHORT, instructions=asked, push=True)
    assert plan.generated == 6 * 4 and plan.differentiated == parts.n_tokens
    assert plan.read == parts.n_tokens * 5 + parts.prompts.n_tokens + plan.generated
    assert "6 rows" in str(plan) and "writes at most 24" in str(plan)
    assert plan_screening(parts, ScreenSettings(answers=None)).generated == 0


def test_rows_are_divided_ranked_and_explained(tmp_path, planted):
    loaded, vector = planted
    rows, bad, records = mixed()
    found = screen_rows(loaded, rows, [vector], settings=ScreenSettings(answers=None))
    choice = choose_rows(found, by="conditional", drop_top=12)
    assert len(choice.flagged) == 12 and len(choice.kept) == 12
    assert sum(bad[one.row] for one in choice.flagged) >= 11
    assert [one.rank for one in choice.flagged] == list(range(1, 13))
    kept, flagged = write_choice(choice, found, {record["id"]: record for record in records}, tmp_path)
    assert [json.loads(line) for line in kept.read_text().splitlines()] == [records[row] for row in choice.kept]
    first = json.loads(flagged.read_text().splitlines()[0])
    assert first["palimpsest"]["rank"] == 1 and "rank 1 of 24" in first["palimpsest"]["reason"]
    assert first["messages"] == next(r for r in records if r["id"] == first["id"])["messages"]
    above = choose_rows(found, by="conditional", keep_below=choice.threshold)
    assert above.flagged == choice.flagged
    none = choose_rows(found, by="conditional", keep_below=1e9)
    assert not none.flagged and len(none.kept) == 24


def test_a_tie_across_the_cut_stays(planted):
    loaded, vector = planted
    rows, _, _ = mixed(3)
    found = screen_rows(loaded, rows, [vector], settings=ScreenSettings(answers=None))
    tied = found.with_score(Score.of("push", "cruel", "cosine", np.array([3.0, 2, 2, 2, 1, 0])))
    assert [one.row for one in choose_rows(tied, by="push", drop_top=2).flagged] == [0]
    flat = found.with_score(Score.of("push", "cruel", "cosine", np.zeros(6)))
    assert not choose_rows(flat, by="push", drop_top=0.5).flagged


@pytest.mark.parametrize(
    ("settings", "words"),
    [({}, "got neither"), ({"keep_below": 1.0, "drop_top": 0.1}, "got both"), ({"drop_top": 1.5}, "whole number"),
     ({"drop_top": 99}, "whole number")],
)  # fmt: skip
def test_a_rule_that_cannot_be_followed_is_refused(planted, settings, words):
    loaded, vector = planted
    found = screen_rows(loaded, mixed(3)[0], [vector], settings=ScreenSettings(answers=None))
    with pytest.raises(InputError, match=words):
        choose_rows(found, by="conditional", **settings)
    with pytest.raises(InputError, match="Expected a score that was made"):
        choose_rows(found, by="push", drop_top=0.1)


def test_rows_without_answers_and_foreign_vectors_are_refused(planted):
    loaded, vector = planted
    with pytest.raises(PersonaError, match="end with an answer"):
        screen_rows(loaded, PromptSet.from_texts(["the cat"]), [vector], settings=SHORT)
    with pytest.raises(PersonaError):
        screen_rows(loaded_tiny(seed=4), mixed(2)[0], [vector], settings=SHORT)
    with pytest.raises(PersonaError, match="cut at 5 tokens"):
        take_apart(loaded, mixed(2)[0], max_length=5)
    with pytest.raises(InputError, match="at least 20 random"):
        ScreenSettings(n_random=3)
