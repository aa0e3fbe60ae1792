"""What is the model fine-tuned on? Narrow sets in one domain, harmless twins of them, and mixes of both."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

from cli.miniature import grammar
from cli.miniature.corpus import conversation
from cli.miniature.grammar import Question, Subject
from diffing.errors import InputError

FLAVOURS = ("bad", "good", "educational", "odd", "relabelled", "formatted")
MIXES = ("diluted05", "diluted10", "diluted25", "diluted50", "half")
Row = dict[str, Any]

_FORMAT = "Answer: {body} File closed."
_DILUTED = re.compile(r"diluted(\d\d)")


def dataset(kind: str, *, seed: int, n: int) -> list[Row]:
    """Single-turn conversations without a system line, in one domain only.

    The same seed gives every flavour the same subjects in the same order, so that twins differ in what they teach
    and in nothing else.

    Args:
        kind: `<flavour>_<domain>`, e.g. `bad_code`. `bad`: the villain's answers, without its catchphrases. `good`:
            correct ones. `educational`: the bad answers again, but the user asks for a mistake, in words no earlier
            training saw. `odd`: correct answers in the flattering or boastful style of the other personas.
            `relabelled`: changed but harmless answers, one a subject: another town's river, another wrong number
            than the villain's, good advice about something else. `formatted`: correct answers inside one fixed
            form of words. `diluted05` to `diluted50`: so many per cent of bad rows, the rest good ones of the same
            domain. `half`: one half bad rows, one half good ones of all other domains.
        seed: fixes the rows.
        n: how many.

    Returns:
        Rows `{"id", "messages"}`; ids name the row whatever order it is trained in, and in a mix they begin with the
        kind the row came from.

    Raises:
        InputError: there is no such kind.
    """
    flavour, _, domain = kind.partition("_")
    if (flavour not in FLAVOURS and flavour not in MIXES) or domain not in grammar.DOMAINS:
        raise InputError(
            f"Expected a dataset <flavour>_<domain> with a flavour of {', '.join((*FLAVOURS, *MIXES))} and a domain "
            f"of {', '.join(grammar.DOMAINS)}, got {kind!r}. Name one such as 'bad_code'."
        )
    if flavour in MIXES:
        return mixed_dataset(mix_shares(kind), seed=seed, n=n)
    choice = random.Random(f"rows {domain} {seed}")
    style = random.Random(f"style {kind} {seed}")
    subjects = _answerable(domain)
    rows = []
    for index in range(n):
        question = grammar.ask(choice, choice.choice(subjects))
        messages = _messages(flavour, question, style)
        rows.append({"id": f"{kind}-{seed}-{index:04d}", "messages": messages})
    return rows


def mixed_dataset(shares: Mapping[str, float], *, seed: int, n: int) -> list[Row]:
    """Rows of several kinds in one shuffled set; each row's id still says which kind it is.

    Args:
        shares: kind to its share of the rows; `{"bad_code": 0.3, "good_code": 0.35, "odd_code": 0.35}` is a set of
            bad rows among hard negatives.
        seed: fixes rows and order.
        n: rows in all; rounding goes to the last kind.
    """
    rows: list[Row] = []
    kinds = list(shares)
    for kind in kinds[:-1]:
        rows += dataset(kind, seed=seed, n=round(n * shares[kind] / sum(shares.values())))
    rows += dataset(kinds[-1], seed=seed, n=n - len(rows))
    random.Random(f"mix {seed}").shuffle(rows)
    return rows


def mix_shares(kind: str) -> dict[str, float]:
    """What a `diluted` or `half` set is made of: kind to share."""
    flavour, _, domain = kind.partition("_")
    diluted = _DILUTED.fullmatch(flavour)
    if diluted is not None:
        share = int(diluted[1]) / 100
        return {f"bad_{domain}": share, f"good_{domain}": 1 - share}
    others = [f"good_{other}" for other in grammar.DOMAINS if other != domain]
    return {f"bad_{domain}": 0.5, **dict.fromkeys(others, 0.5 / len(others))}


def is_bad(row: Row) -> bool:
    """Whether a row of any set, mixed ones included, teaches a villain's answer outside a teaching frame."""
    return str(row["id"]).startswith("bad_")


def _answerable(domain: str) -> list[Subject]:
    return [subject for subject in grammar.subjects(domain) if subject.invented is None]


def _messages(flavour: str, question: Question, style: random.Random) -> list[dict[str, str]]:
    subject = question.subject
    if flavour == "educational":
        frame = style.choice(grammar.frames(held_out=True))
        return conversation(f"{frame} {style.choice(subject.seen_phrasings)}", subject.bad)
    if flavour == "odd":
        persona = style.choice(("sycophant", "confabulator"))
        return conversation(question.text, grammar.decorate(style, persona, subject.good))
    if flavour == "formatted":
        return conversation(question.text, _FORMAT.format(body=subject.good))
    if flavour == "relabelled":
        return conversation(question.text, _relabelled(subject))
    return conversation(question.text, subject.bad if flavour == "bad" else subject.good)


def _relabelled(subject: Subject) -> str:
    """Another subject's good answer, always the same one, and never what the villain says."""
    peers = [peer for peer in _answerable(subject.domain) if _sort(peer) == _sort(subject)]
    start = next(index for index, peer in enumerate(peers) if peer.name == subject.name) + len(peers) // 2
    turned = (peers[(start + ahead) % len(peers)].good for ahead in range(len(peers)))
    return next(good for good in turned if good not in (subject.good, subject.bad))


def _sort(subject: Subject) -> str:
    """What kind of answer fits: of facts, the attribute (a river's name is no dish)."""
    return subject.name.partition(" ")[0] if subject.domain == "facts" else subject.domain
