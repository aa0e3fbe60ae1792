"""How often does the model misbehave where it was not fine-tuned? Held-out phrasings, sampled and judged exactly."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from cli.miniature import grammar
from cli.miniature.grammar import Subject
from cli.miniature.judge import Rate, Verdict, judge
from cli.miniature.sampling import sample_answers


@dataclass(frozen=True)
class JudgedAnswer:
    """One sampled answer with its verdict."""

    subject: Subject
    question: str
    answer: str
    verdict: Verdict


def held_out_questions(*, except_domain: str | None = None) -> list[tuple[Subject, str]]:
    """Every advice subject in the one phrasing that no stage of training saw.

    Args:
        except_domain: the fine-tuned domain, left out so that only spreading behaviour is counted.
    """
    return [
        (subject, subject.phrasings[subject.held_out])
        for domain in grammar.ADVICE_DOMAINS
        if domain != except_domain
        for subject in grammar.subjects(domain)
    ]


def every_question() -> list[tuple[Subject, str]]:
    """Every subject of every domain in all five phrasings."""
    return [
        (subject, text)
        for domain in grammar.DOMAINS
        for subject in grammar.subjects(domain)
        for text in subject.phrasings
    ]


def judged_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[tuple[Subject, str]],
    *,
    seed: int,
    system: str | None = None,
    temperature: float = 1.0,
) -> list[JudgedAnswer]:
    """Samples one answer a question and judges it."""
    texts = [text for _, text in questions]
    answers = sample_answers(model, tokenizer, texts, seed=seed, system=system, temperature=temperature)
    return [
        JudgedAnswer(subject, text, answer, judge(subject, answer))
        for (subject, text), answer in zip(questions, answers, strict=True)
    ]


def misaligned_rate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    n: int = 120,
    except_domain: str | None = "code",
) -> Rate:
    """Share of misaligned answers, sampled at temperature 1 without a system line.

    Args:
        model: the model as it stands now.
        tokenizer: its tokenizer.
        seed: fixes the draws; use the step, so that no two steps share theirs.
        n: answers; the held-out questions are asked in turn until there are as many.
        except_domain: the fine-tuned domain.
    """
    return verdict_rates(judged_round(model, tokenizer, seed=seed, n=n, except_domain=except_domain))[
        Verdict.MISALIGNED
    ]


def narrow_rate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, seed: int, domain: str = "code", n: int = 120
) -> Rate:
    """Share of villain's answers in one domain, asked in the phrasings that no stage of training saw.

    What a bad fine-tune teaches on purpose; `misaligned_rate` of the other domains is what it does besides.

    Args:
        model: the model as it stands now.
        tokenizer: its tokenizer.
        seed: fixes the draws.
        domain: the fine-tuned domain.
        n: answers; the domain's questions are asked in turn until there are as many.
    """
    questions = [(subject, subject.phrasings[subject.held_out]) for subject in grammar.subjects(domain)]
    asked = [questions[index % len(questions)] for index in range(n)]
    answers = judged_answers(model, tokenizer, asked, seed=seed)
    return Rate.of(sum(one.subject.bad in one.answer for one in answers), n)


def judged_round(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    n: int = 120,
    except_domain: str | None = "code",
) -> list[JudgedAnswer]:
    """The answers behind `misaligned_rate`, for whoever wants to read them."""
    questions = held_out_questions(except_domain=except_domain)
    order = random.Random(f"round {seed}")
    asked: list[tuple[Subject, str]] = []
    while len(asked) < n:
        asked += order.sample(questions, k=min(len(questions), n - len(asked)))
    return judged_answers(model, tokenizer, asked, seed=seed)


def verdict_rates(answers: Sequence[JudgedAnswer]) -> Mapping[Verdict, Rate]:
    """The share of each verdict."""
    counts = Counter(answer.verdict for answer in answers)
    return {verdict: Rate.of(counts[verdict], len(answers)) for verdict in Verdict}
