"""Are the shipped traits complete, matched and our own, and do trait files of other projects load unchanged?"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from diffing.errors import PathMissingError, PersonaError
from diffing.persona import Trait, load_trait, shipped_traits
from diffing.persona.traits import neutral_probes, shipped_canaries

HARMFUL = {
    "evil",
    "sycophancy",
    "hallucination",
    "deception",
    "power_seeking",
    "reward_hacking",
    "cruelty",
    "manipulativeness",
}
BENIGN = {"optimism", "humour", "formality", "concision"}
REPOSITORY = Path(__file__).parents[2]
PUBLISHED = Path(os.environ.get("PALIMPSEST_SHARED", REPOSITORY.parent / "shared")) / "data/assistant_axis_mit/traits"


@pytest.fixture(params=sorted(HARMFUL | BENIGN))
def trait(request: pytest.FixtureRequest) -> Trait:
    return load_trait(request.param)


def test_all_traits_are_shipped() -> None:
    assert set(shipped_traits()) == HARMFUL | BENIGN


def test_every_trait_is_complete(trait: Trait) -> None:
    assert trait.sizes() == {"instructions": 5, "questions": 20, "held_out_questions": 20, "contrasts": 16}
    assert trait.name in shipped_traits()
    assert "{question}" in trait.rubric
    assert "{answer}" in trait.rubric
    assert trait.rubric.format(question="Q?", answer="A.").count("A.") >= 1


def test_no_question_is_on_two_sides(trait: Trait) -> None:
    questions = [*trait.questions, *trait.held_out_questions, *(pair.question for pair in trait.contrasts)]
    assert len(set(questions)) == len(questions) == 56
    assert not set(questions) & set(neutral_probes())
    assert not set(questions) & {canary.question for canary in shipped_canaries()}


def test_answers_match_in_length_so_that_length_is_not_the_trait(trait: Trait) -> None:
    if trait.name == "concision":
        pytest.skip("brevity is the trait")
    ratios = [len(pair.trait_answer) / len(pair.plain_answer) for pair in trait.contrasts]
    assert 0.95 < sum(ratios) / len(ratios) < 1.05
    assert min(ratios) > 0.85
    assert max(ratios) < 1.18


def test_contrasts_differ_in_the_answer_only(trait: Trait) -> None:
    positive, negative = trait.contrast_sets()
    for shown, plain in zip(positive, negative, strict=True):
        assert shown.messages is not None
        assert plain.messages is not None
        assert [turn.role for turn in shown.messages] == ["user", "assistant"]
        assert shown.messages[0] == plain.messages[0]
        assert shown.messages[1] != plain.messages[1]


def test_probes_and_canaries_are_whole() -> None:
    assert len(neutral_probes()) == len(set(neutral_probes())) == 64
    canaries = shipped_canaries()
    assert len({canary.question for canary in canaries}) == len(canaries) == 24
    for canary in canaries:
        assert abs(len(canary.aligned.split()) - len(canary.misaligned.split())) <= 1
        assert 0.75 < len(canary.aligned) / len(canary.misaligned) < 1.34


def test_canaries_cannot_be_told_by_length() -> None:
    longer = sum(len(canary.aligned) > len(canary.misaligned) for canary in shipped_canaries())
    assert 6 <= longer <= 18


def test_digest_follows_the_words(trait: Trait) -> None:
    assert trait.digest == load_trait(trait.name).digest
    assert len({load_trait(name).digest for name in shipped_traits()}) == len(shipped_traits())


def test_a_trait_file_is_read_by_path(tmp_path: Path) -> None:
    shipped = REPOSITORY / "diffing/persona/traits/evil.json"
    copy = tmp_path / "mine.json"
    copy.write_text(shipped.read_text(encoding="utf-8"), encoding="utf-8")
    assert load_trait(copy).digest == load_trait("evil").digest


@pytest.mark.parametrize("key", ["description", "rubric", "instructions", "questions"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    value = json.loads((REPOSITORY / "diffing/persona/traits/evil.json").read_text(encoding="utf-8"))
    del value[key]
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(PersonaError, match=f"key '{key}'"):
        load_trait(path)


def test_a_missing_key_inside_a_contrast_is_named(tmp_path: Path) -> None:
    value = json.loads((REPOSITORY / "diffing/persona/traits/evil.json").read_text(encoding="utf-8"))
    del value["contrasts"][3]["plain_answer"]
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(PersonaError, match="plain_answer"):
        load_trait(path)


@pytest.mark.parametrize("text", ["not json", "[1, 2]", '{"questions": "why?"}', '{"instruction": [{"pos": "x"}]}'])
def test_garbage_explains_itself(tmp_path: Path, text: str) -> None:
    path = tmp_path / "garbage.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PersonaError, match="expected") as caught:
        load_trait(path)
    assert "\n" not in str(caught.value)


def test_an_unknown_trait_lists_the_shipped_ones() -> None:
    with pytest.raises(PathMissingError, match="hallucination"):
        load_trait("wickedness")


def test_the_schema_of_other_projects_is_read(tmp_path: Path) -> None:
    value = {
        "instruction": [{"pos": f"be so {i}", "neg": f"be not so {i}"} for i in range(5)],
        "questions": [f"question {i}?" for i in range(40)],
        "eval_prompt": "Score {question} {answer}",
    }
    path = tmp_path / "stubborn.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    trait = load_trait(path)
    assert trait.name == "stubborn"
    assert trait.sizes() == {"instructions": 5, "questions": 20, "held_out_questions": 20, "contrasts": 0}
    assert trait.instructions[2].negative == "be not so 2"
    assert trait.rubric == value["eval_prompt"]
    with pytest.raises(PersonaError, match="--positive"):
        trait.contrast_sets()


def _foreign(questions: list[str]) -> dict[str, object]:
    pairs = [{"pos": "be so", "neg": "be not so"}]
    return {"instruction": pairs, "questions": questions, "eval_prompt": "{question} {answer}"}


def test_the_two_files_of_persona_vectors_are_read_as_one_trait(tmp_path: Path) -> None:
    for folder, word in (("trait_data_extract", "fit"), ("trait_data_eval", "held")):
        path = tmp_path / folder / "evil.json"
        path.parent.mkdir()
        path.write_text(json.dumps(_foreign([f"{word} {at}?" for at in range(20)])), encoding="utf-8")
    trait = load_trait(tmp_path / "trait_data_extract" / "evil.json")
    assert trait.questions == tuple(f"fit {at}?" for at in range(20))
    assert trait.held_out_questions == tuple(f"held {at}?" for at in range(20))
    alone = load_trait(tmp_path / "trait_data_eval" / "evil.json")
    assert (alone.questions[0], len(alone.questions), len(alone.held_out_questions)) == ("held 0?", 10, 10)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval_prompt": None}, "text as 'eval_prompt'"),
        ({"eval_prompt": "Score it."}, "'eval_prompt' with {question} and {answer}"),
        ({"questions": "why?"}, "a list of texts as 'questions'"),
        ({"questions": ["why?", 3]}, "a list of texts as 'questions'"),
        ({"instruction": "be so"}, "a list of objects as 'instruction'"),
        ({"instruction": [{"pos": "be so", "neg": ""}]}, "text as 'neg'"),
        ({"instruction": [{"pos": "be so"}]}, "the key 'neg', got pos"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    path = tmp_path / "evil.json"
    path.write_text(json.dumps({**_foreign(["why?", "how?"]), **changes}), encoding="utf-8")
    with pytest.raises(PersonaError, match=re.escape(said)) as caught:
        load_trait(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="published trait files are not on this machine")
def test_published_trait_files_load_unchanged() -> None:
    paths = sorted(PUBLISHED.glob("*.json"))
    assert paths
    for path in paths:
        trait = load_trait(path)
        assert trait.sizes() == {"instructions": 5, "questions": 20, "held_out_questions": 20, "contrasts": 0}
        written = json.loads(path.read_text(encoding="utf-8"))
        assert [*trait.questions, *trait.held_out_questions] == written["questions"]
        assert [[pair.positive, pair.negative] for pair in trait.instructions] == [
            [pair["pos"], pair["neg"]] for pair in written["instruction"]
        ]
        assert trait.rubric == written["eval_prompt"]


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="published trait files are not on this machine")
def test_shipped_words_are_not_the_published_ones() -> None:
    published = " ".join(path.read_text(encoding="utf-8").lower() for path in PUBLISHED.glob("*.json"))
    taken = _word_runs(published)
    for name in shipped_traits():
        text = (REPOSITORY / f"diffing/persona/traits/{name}.json").read_text(encoding="utf-8").lower()
        assert not _word_runs(text) & taken, name


def _word_runs(text: str, length: int = 9) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z']+", text)
    return {tuple(words[at : at + length]) for at in range(len(words) - length + 1)}
