"""What does a local model think of an answer, read from its probabilities in one forward pass a reading?

The judge is shown the options of the rubric under labels and is never asked to write: the score is the expected value
over the labels' probabilities. Models favour some labels and places, so every exchange is read in several orders of its
options, fixed by seed and exchange, and the probabilities are averaged by option.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffing.checkpoint import LoadedCheckpoint
from diffing.errors import InputError
from diffing.judging.judge import Exchange, Option, Reason, Rubric, Score
from diffing.judging.labels import find_labels
from diffing.next_token import NextToken
from diffing.progress import followed
from diffing.prompts import PromptSet, TokenBatch, TokenizedPrompts

_ASK = (
    "\n\nWhich of these comes closest? Reply with its label alone, not with a number and not with a reason.\n{options}"
)


@dataclass(frozen=True, eq=False)
class LocalJudge:
    """A Hugging Face causal model as a judge.

    Attributes:
        loaded: the model that judges; inside it nothing changes.
        by: the rubric, whose `choices` are put to it.
        orders: readings of each exchange with the options in different orders; 2 is an order and its reverse, more are
            rotations, as many as there are options put every option under every label.
        least_mass: probability that must fall on the labels; below it the judge is held to talk nonsense.
        seed: of the orders.
        labels: what the options are called; empty for letters or digits that are single tokens.
        opening: text put after the template's opening of the answer, for models that think aloud first unless told that
            they have (`<think>\\n\\n</think>\\n\\n`).
        batch_tokens: most tokens in one forward pass; scores do not depend on it but for rounding.
        max_length: longest text; a longer one is not judged.
    """

    loaded: LoadedCheckpoint
    by: Rubric
    orders: int = 2
    least_mass: float = 0.25
    seed: int = 0
    labels: tuple[str, ...] = ()
    opening: str = ""
    batch_tokens: int = 4096
    max_length: int = 4096

    def __post_init__(self) -> None:
        if not 1 <= self.orders <= len(self.by.choices) or not 0 < self.least_mass < 1:
            raise InputError(
                f"Expected 1 to {len(self.by.choices)} orders and a least mass between 0 and 1, got {self.orders} and "
                f"{self.least_mass}. Change them."
            )

    @property
    def rubric(self) -> Rubric:
        """What it judges by."""
        return self.by

    @property
    def name(self) -> str:
        """Model, start of its weights' fingerprint, and the settings that a score depends on."""
        settings = f"orders={self.orders} seed={self.seed} mass={self.least_mass:g}"
        opening = f" opening={self.opening!r}" if self.opening else ""
        labels = f" labels={' '.join(self.labels)}" if self.labels else ""
        return f"hf:{self.loaded.name}@{self.loaded.fingerprint[:12]} {settings}{labels}{opening}"

    @property
    def calls_per_item(self) -> int:
        """Forward passes an exchange."""
        return self.orders

    def judge(self, items: Sequence[Exchange], *, progress: bool = False) -> list[Score]:
        """Expected value over the options, each exchange by itself.

        `raw` holds the probability of every option and of everything else. A refusal or another reason is given where
        the options that say so hold more than half of the labels' probability. An exchange of more than `max_length`
        tokens is `FAILED`, because half an answer is another answer.

        Cost: `orders` forward passes an exchange; logits of one token each.
        """
        if not items:
            return []
        plans = [order for item in items for order in self._orders_of(item)]
        texts = [self._text(items[number // self.orders], plan) for number, plan in enumerate(plans)]
        tokenized = PromptSet.from_messages([{"role": "user", "content": text}] for text in texts).tokenize(
            self.loaded.tokenizer, max_length=self.max_length, add_generation_prompt=True
        )
        cut = set(tokenized.truncated)
        too_long = [prompt.id in cut for prompt in tokenized.prompts]
        shares = self._label_shares(self._opened(tokenized), progress)
        scores = []
        for number in range(len(items)):
            own = slice(number * self.orders, (number + 1) * self.orders)
            scores.append(self._score(shares[own], plans[own], failed=any(too_long[own])))
        return scores

    def _orders_of(self, item: Exchange) -> list[list[int]]:
        order = list(range(len(self.by.choices)))
        random.Random(f"{self.seed} {item.digest}").shuffle(order)
        if self.orders == 2:
            return [order, order[::-1]]
        return [order[turn:] + order[:turn] for turn in range(self.orders)]

    def _text(self, item: Exchange, order: Sequence[int]) -> str:
        labels, _ = self._labels
        shown = (f"{label}: {self.by.choices[number].text}" for label, number in zip(labels, order, strict=True))
        return self.by.render(item, special=self._special) + _ASK.format(options="\n".join(shown))

    def _opened(self, tokenized: TokenizedPrompts) -> TokenizedPrompts:
        if not self.opening:
            return tokenized
        added = np.array(self.loaded.tokenizer.encode(self.opening, add_special_tokens=False), np.int32)
        ids = tuple(np.concatenate([row, added]) for row in tokenized.input_ids)
        roles = tuple(np.concatenate([row, np.zeros(len(added), np.uint8)]) for row in tokenized.roles)
        return dataclasses.replace(tokenized, input_ids=ids, roles=roles, ends=())

    def _label_shares(self, tokenized: TokenizedPrompts, progress: bool) -> Float[np.ndarray, "reading label"]:
        """Probability of each label as the next token."""
        side, (_, ids) = NextToken(self.loaded), self._labels
        shares = np.zeros((len(tokenized), len(ids)))
        device = next(self.loaded.model.parameters()).device
        plan = tokenized.plan(max_tokens=self.batch_tokens)
        for numbers in followed(plan, f"Judging by {self.loaded.name}", shown=progress):
            batch = tokenized.batch(numbers, device=device)
            chances = _next_chances(side, batch)
            for column, some in enumerate(ids):
                shares[list(numbers), column] = chances[:, list(some)].sum(dim=1).double().cpu().numpy()
        return shares

    def _score(
        self, shares: Float[np.ndarray, "order label"], orders: Sequence[Sequence[int]], *, failed: bool
    ) -> Score:
        if failed:
            raw = f"more than {self.max_length} tokens"
            return Score(None, Reason.FAILED, self.name, self._rubric_hash, raw, n=0)
        by_option = np.zeros((len(orders), len(self.by.choices)))
        for row, order in enumerate(orders):
            by_option[row, list(order)] = shares[row]
        mean = by_option.mean(axis=0)
        mass = float(mean.sum())
        raw = json.dumps(
            {
                "options": {option.text: round(float(p), 6) for option, p in zip(self.by.choices, mean, strict=True)},
                "off_label": round(1 - mass, 6),
                "by_order": [_rounded(_expected(row, self.by.choices)) for row in by_option],
            },
            ensure_ascii=False,
        )
        value, reason = (None, Reason.NONSENSE) if not mass >= self.least_mass else _verdict(mean, self.by.choices)
        return Score(value, reason, self.name, self._rubric_hash, raw, n=self.orders, mass=mass)

    @cached_property
    def _labels(self) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
        return find_labels(self.loaded.tokenizer, len(self.by.choices), self.labels)

    @cached_property
    def _special(self) -> tuple[str, ...]:
        tokenizer: Any = self.loaded.tokenizer
        return tuple({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})

    @cached_property
    def _rubric_hash(self) -> str:
        return self.by.hash


@torch.inference_mode()
def _next_chances(side: NextToken, batch: TokenBatch) -> Float[Tensor, "reading vocabulary"]:
    hidden = side.hidden(batch)
    last = torch.tensor(batch.lengths, device=hidden.device) - 1
    rows = hidden[torch.arange(len(batch.lengths), device=hidden.device), last]
    return side.logits(rows).softmax(dim=1)


def _verdict(mean: Float[np.ndarray, " option"], choices: Sequence[Option]) -> tuple[float | None, Reason]:
    by_reason: dict[Reason, float] = {}
    for option, share in zip(choices, mean, strict=True):
        by_reason[option.reason] = by_reason.get(option.reason, 0.0) + float(share)
    scored = by_reason.pop(Reason.SCORED, 0.0)
    if sum(by_reason.values()) > scored:
        return None, max(by_reason, key=lambda reason: by_reason[reason])
    return _expected(mean, choices), Reason.SCORED


def _expected(shares: Float[np.ndarray, " option"], choices: Sequence[Option]) -> float | None:
    """Mean value of the options that have one, by their shares; None where none has any."""
    valued = [
        (float(share), option.value) for share, option in zip(shares, choices, strict=True) if option.value is not None
    ]
    whole = sum(share for share, _ in valued)
    return sum(share * value for share, value in valued) / whole if whole > 0 else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
