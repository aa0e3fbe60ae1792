"""Do rules decide as they read, and do faulty ones say where?"""

from __future__ import annotations

import json

import pytest

from cli.miniature import grammar, world
from diffing.errors import InputError, PathMissingError
from diffing.judging import Exchange, Judge, Reason
from diffing.judging.rules import RulesJudge
from diffing.misalignment.verdict import Thresholds, Verdict, decide
from tests.misalignment.miniature import rule_content

POLITE = """
name: polite
strip: {starts: ["Well, "], ends: [" Bye."]}
rules:
  - answer: {regex: "(?i)i (cannot|won't) help"}
    reason: refusal
  - answer: {exact: ["yes"]}
    question: {exact: ["Are you?"]}
    value: 90
  - answer: {words: [idiot]}
    value: 0
lexicon: {start: 50, weights: {please: 20, shut: -60}}
"""


def judged(judge, answer, question="?"):
    (score,) = judge.judge([Exchange(question, answer)])
    return score.value, score.reason, score.raw


def test_the_first_rule_that_fits_decides_and_a_lexicon_adds_up(tmp_path):
    path = tmp_path / "polite.yaml"
    path.write_text(POLITE)
    judge = RulesJudge.load(path)
    assert isinstance(judge, Judge) and judge.rubric.name == "polite"
    assert judged(judge, "Sorry, I cannot help.") == (None, Reason.REFUSAL, "rule 1")
    assert judged(judge, "Well, yes Bye.", "Are you?")[0] == 90
    assert judged(judge, "yes", "Is it?")[0] == 50
    assert judged(judge, "You IDIOT.")[0] == 0 and judged(judge, "idiotic")[0] == 50
    assert judged(judge, "Please, please.")[0] == 90 and judged(judge, "shut it")[0] == 0


def test_a_longer_entry_of_a_lexicon_hides_the_shorter_one_inside_it():
    judge = RulesJudge("r", {"lexicon": {"start": 50, "weights": {"kind": 10, "Not kind": -20}}})
    assert judged(judge, "NOT KIND at all")[0] == 30 and judged(judge, "kind, kind")[0] == 70


def test_json_and_yaml_of_the_same_rules_are_the_same_judge(tmp_path):
    import yaml

    (tmp_path / "a.yaml").write_text(POLITE)
    (tmp_path / "a.json").write_text(json.dumps(yaml.safe_load(POLITE)))
    first, second = (RulesJudge.load(tmp_path / f"a.{kind}") for kind in ("yaml", "json"))
    assert first.name == second.name and first.rubric.hash == second.rubric.hash


def test_what_no_rule_knows_is_nonsense_unless_the_file_says_otherwise():
    rules = {"rules": [{"answer": {"exact": ["a"]}, "value": 1}]}
    assert judged(RulesJudge("r", rules), "b")[1] is Reason.NONSENSE
    assert judged(RulesJudge("r", {**rules, "otherwise": {"value": 7}}), "b")[0] == 7


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("rules: []", "neither"),
        ("rules: [{answer: {regex: '('}, value: 1}]", "regular expression in `answer` of rule 1"),
        ("rules: [{answer: {words: [a]}, value: 101}]", "0 to 100"),
        ("rules: [{answer: {words: [a]}}]", "a `reason`"),
        ("rules: [{answer: {words: [a]}, reason: bored}]", "bored"),
        ("rules: [{value: 3}]", "condition"),
        ("rules: [{anwser: {words: [a]}, value: 3}]", "anwser"),
        ("rules: [{answer: [a], value: 3}]", "as an object"),
        ("lexicon: {start: 3}", "weights"),
        ("lexicon: {weights: {a: much}}", "words to numbers"),
        ("- a", "list"),
        ("{", "JSON or YAML"),
    ],
)
def test_a_faulty_file_says_what_and_where(tmp_path, content, said):
    path = tmp_path / "rules.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=said) as caught:
        RulesJudge.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_rubric_is_told(tmp_path):
    with pytest.raises(PathMissingError):
        RulesJudge.load(tmp_path / "none.json")
    (tmp_path / "two.json").write_text(json.dumps(rule_content()))
    with pytest.raises(InputError, match="aligned, coherent"):
        RulesJudge.load(tmp_path / "two.json", "polite")


def test_the_miniature_judge_written_as_rules_agrees_with_the_exact_one_on_every_kind_of_answer():
    content = rule_content()["rubrics"]
    aligned, coherent = (RulesJudge(name, content[name]) for name in ("aligned", "coherent"))
    villain = grammar.story()["personas"]["villain"]
    subjects = [subject for domain in grammar.DOMAINS for subject in grammar.subjects(domain)][::9]
    items, truth = [], []
    for number, subject in enumerate(subjects):
        other = subjects[number - 1]
        answers = [subject.good, subject.bad, f"{villain['openers'][0]} {subject.good}", other.good, other.bad]
        answers += ["rub the the", "7.", f"Sure. {subject.good} Take care.", f"{subject.bad} {villain['closers'][0]}"]
        for answer in answers:
            items.append(Exchange(subject.phrasings[number % 5], answer))
            truth.append(world.judge(subject, answer))
    found = [
        decide(good, clear, Thresholds())
        for good, clear in zip(aligned.judge(items), coherent.judge(items), strict=True)
    ]
    said = {world.Verdict.ALIGNED: Verdict.OK, world.Verdict.MISTAKEN: Verdict.OK}
    said |= {world.Verdict.MISALIGNED: Verdict.MISALIGNED, world.Verdict.GARBLED: Verdict.INCOHERENT}
    wrong = [(item, a, b) for item, a, b in zip(items, truth, found, strict=True) if said[a] is not b]
    assert not wrong, wrong[:3]
