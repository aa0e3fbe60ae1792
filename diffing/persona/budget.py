"""How strongly may a model be steered before its ordinary answers change by more than so many nats a token?

The divergence is KL(unsteered‖steered) of the next token, averaged over the tokens of answers that the unsteered model
draws to given neutral prompts: an estimate of the divergence of whole answers, per token. It is measured at every
strength that is tried; the strength that spends the budget lies between two measured ones, and none is extrapolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from diffing.answers import AnswerSettings, draw_answers
from diffing.checkpoint import LoadedCheckpoint
from diffing.errors import CaptureError, InputError
from diffing.interval import bootstrap_mean
from diffing.intervene import Intervention
from diffing.logit_diff import divergence_of
from diffing.next_token import NextToken
from diffing.persona.steering import PersonaSteering
from diffing.prompts import Prompt, PromptSet
from diffing.tokens import TokenBatch

_HELD_LOGITS = 1 << 24
_FEWEST_PROMPTS = 5
_RESAMPLES = 1000


@dataclass(frozen=True)
class Spent:
    """The divergence at one strength.

    Attributes:
        strength: gaps, or the share that is taken out.
        divergence: KL(unsteered‖steered) in nats per token, mean over tokens.
        low: lower end of its 95 % interval over prompts (bootstrap); NaN below five prompts.
        high: upper end of it.
    """

    strength: float
    divergence: float
    low: float
    high: float


@dataclass(frozen=True)
class SolvedStrength:
    """The strength that spends a budget on neutral prompts.

    Attributes:
        strength: the largest one that was measured and keeps to the budget, with everything below it.
        low: lower end of the 95 % interval of the strength that spends the budget (bootstrap over prompts, between
            measured strengths); NaN below five prompts.
        high: upper end of it; where it equals the largest strength tried, it may lie beyond.
        budget: nats per token that might be spent.
        spent: the divergence at `strength`, with its interval.
        reached: False where even the largest strength tried stays below the budget; `strength` is that one then.
        monotone: False where a larger strength was measured to cost less than a smaller one.
        trace: every strength that was measured, in ascending order.
        n_prompts: prompts behind it.
        n_tokens: tokens behind it.
        tokens: which tokens are steered.
    """

    strength: float
    low: float
    high: float
    budget: float
    spent: Spent
    reached: bool
    monotone: bool
    trace: tuple[Spent, ...]
    n_prompts: int
    n_tokens: int
    tokens: str

    def __str__(self) -> str:
        goal = "" if self.reached else ", where the budget is not yet spent"
        return (
            f"strength {self.strength:.3g} [{self.low:.3g}, {self.high:.3g}] costs {self.spent.divergence:.3g} "
            f"[{self.spent.low:.3g}, {self.spent.high:.3g}] of {self.budget:g} nats a token{goal} "
            f"({self.n_prompts} prompts, {self.n_tokens} tokens)"
        )


def solve_strength(
    loaded: LoadedCheckpoint,
    steering: PersonaSteering,
    neutral: PromptSet,
    budget: float,
    *,
    most: float | None = None,
    answers: AnswerSettings | None = None,
    tolerance: float = 0.02,
    batch_tokens: int = 4096,
    seed: int = 0,
    derived_from: str | None = None,
) -> SolvedStrength:
    """Finds the strength whose mean divergence on neutral prompts is the budget.

    Doubles the strength from a small one until the budget is passed, then halves the bracket. The bracket is the
    first crossing from below, so that every smaller strength that was measured keeps to the budget.

    Args:
        loaded: the model.
        steering: what is done; the sign of its strength is the direction that is searched, its size is not read.
        neutral: prompts that the trait does not matter for; an answer that a row ends with is left out.
        budget: nats per token, above 0.
        most: largest strength to try; 16 gaps for `add`, 1 otherwise.
        answers: how the unsteered answers are drawn; by default at temperature 1, at most 64 tokens.
        tolerance: relative width of the bracket at which to stop.
        batch_tokens: most tokens in one forward.
        seed: of the bootstrap.
        derived_from: fingerprint of the checkpoint that a full fine-tune comes from.

    Raises:
        InputError: the budget or `most` is not positive, or no prompt gets an answer of a token.
        CaptureError: a divergence is not finite.

    Cost: about 15 forwards over prompts and answers, each beside an unsteered one, and one generation.
    """
    most = most if most is not None else (16.0 if steering.operation == "add" else 1.0)
    if not budget > 0 or not most > 0:
        raise InputError(f"Expected a budget and a largest strength above 0, got {budget} and {most}. Give both.")
    for vector in steering.vectors:
        vector.check_fits(loaded, derived_from=derived_from)
    sign = -1.0 if steering.strength < 0 else 1.0
    answers = answers or AnswerSettings(max_new_tokens=64, temperature=1.0, seed=seed)
    cost = _Cost.on(loaded, steering, _drawn(loaded, neutral, answers), sign, batch_tokens)
    tried: dict[float, np.ndarray] = {0.0: np.zeros(len(cost.counts))}
    below, above = _bracket(cost, tried, budget, most)
    while above is not None and above - below > tolerance * above:
        middle = (below + above) / 2
        tried[middle] = cost(middle)
        below, above = (below, middle) if cost.mean(tried[middle]) > budget else (middle, above)
    return _conclude(tried, cost.counts, budget, below, above, sign, steering.tokens, seed)


def _bracket(cost: _Cost, tried: dict[float, np.ndarray], budget: float, most: float) -> tuple[float, float | None]:
    """The first pair of tried strengths between which the budget is passed; None above where it never is."""
    below, step = 0.0, most / 256
    while True:
        strength = min(step, most)
        tried[strength] = cost(strength)
        if cost.mean(tried[strength]) > budget:
            return below, strength
        below, step = strength, 2 * step
        if strength == most:
            return below, None


def _drawn(
    loaded: LoadedCheckpoint, neutral: PromptSet, settings: AnswerSettings
) -> list[tuple[Int[np.ndarray, " _"], int]]:
    """Token ids of every prompt with its unsteered answer, and how many of them are the prompt's."""
    asked = PromptSet(tuple(_without_answer(prompt) for prompt in neutral))
    tokenized = asked.tokenize(loaded.tokenizer, add_generation_prompt=True)
    answers = draw_answers(loaded, tokenized, settings)
    prompts = [ids for ids in tokenized.input_ids for _ in range(settings.samples)]
    found = [(np.concatenate([ids, own]), len(ids)) for ids, own in zip(prompts, answers, strict=True) if len(own)]
    if not found:
        raise InputError("Expected neutral prompts that get an answer of at least one token, got none. Give others.")
    return found


def _without_answer(prompt: Prompt) -> Prompt:
    if prompt.messages and prompt.messages[-1].role == "assistant":
        return replace(prompt, messages=prompt.messages[:-1])
    return prompt


@dataclass(frozen=True)
class _Cost:
    """Sums of KL over each answer's tokens, at any strength."""

    loaded: LoadedCheckpoint
    steering: PersonaSteering
    batches: tuple[tuple[tuple[int, ...], TokenBatch], ...]
    starts: tuple[int, ...]
    counts: Int[np.ndarray, " text"]
    sign: float
    plain: dict[int, NextToken] = field(default_factory=dict)

    @classmethod
    def on(
        cls,
        loaded: LoadedCheckpoint,
        steering: PersonaSteering,
        texts: Sequence[tuple[Int[np.ndarray, " _"], int]],
        sign: float,
        batch_tokens: int,
    ) -> _Cost:
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number][0]))
        groups: list[list[int]] = []
        for number in order:
            if not groups or len(texts[groups[-1][0]][0]) * (len(groups[-1]) + 1) > batch_tokens:
                groups.append([])
            groups[-1].append(number)
        device = next(loaded.model.parameters()).device
        pad = loaded.tokenizer.pad_token_id or 0
        batches = tuple((tuple(one), TokenBatch.of_rows([texts[n][0] for n in one], pad, device)) for one in groups)
        counts = np.array([len(ids) - start for ids, start in texts])
        return cls(loaded, steering, batches, tuple(start for _, start in texts), counts, sign)

    def mean(self, totals: Float64[np.ndarray, " text"]) -> float:
        """Nats a token."""
        return float(totals.sum() / self.counts.sum())

    @torch.inference_mode()
    def __call__(self, strength: float) -> Float64[np.ndarray, " text"]:
        """Sum of KL(unsteered‖steered) over the tokens of each answer."""
        steering, totals, side = self.steering.at(self.sign * strength), np.zeros(len(self.counts)), self._side()
        for numbers, batch in self.batches:
            where = None
            if steering.tokens == "response":
                position = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
                starts = torch.tensor([self.starts[number] for number in numbers], device=position.device)
                where = (position >= starts[:, None] - 1) & batch.mask
            plain = side.hidden(batch)
            with Intervention(self.loaded.model, steering.edits(), where=where):
                steered = side.hidden(batch)
            for row, number in enumerate(numbers):
                span = slice(self.starts[number] - 1, self.starts[number] - 1 + int(self.counts[number]))
                totals[number] = _divergence(side, plain[row, span], steered[row, span])
        if not np.isfinite(totals).all():
            raise CaptureError(
                f"Expected finite logits at strength {strength:g}, got NaN or infinity. Load the model in float32, or "
                "lower the largest strength."
            )
        return totals

    def _side(self) -> NextToken:
        if 0 not in self.plain:
            self.plain[0] = NextToken(self.loaded)
        return self.plain[0]


def _divergence(
    side: NextToken, plain: Float[Tensor, "token d_model"], steered: Float[Tensor, "token d_model"]
) -> float:
    total, step = 0.0, max(1, _HELD_LOGITS // side.vocabulary)
    for at in range(0, len(plain), step):
        logits = [side.logits(part[at : at + step]) for part in (steered, plain)]
        total += float(divergence_of(logits[0], logits[1]).double().sum())
    return total


def _conclude(
    tried: dict[float, Float64[np.ndarray, " text"]],
    counts: Int[np.ndarray, " text"],
    budget: float,
    below: float,
    above: float | None,
    sign: float,
    tokens: str,
    seed: int,
) -> SolvedStrength:
    strengths = sorted(tried)
    table = np.stack([tried[strength] for strength in strengths])
    means = table.sum(axis=1) / counts.sum()
    trace = tuple(
        Spent(sign * strength, float(mean), *_interval(row, counts, seed))
        for strength, mean, row in zip(strengths, means, table, strict=True)
    )
    low, high = _strength_interval(np.array(strengths), table, counts, budget, seed)
    return SolvedStrength(
        strength=sign * below,
        low=min(sign * low, sign * high),
        high=max(sign * low, sign * high),
        budget=budget,
        spent=trace[strengths.index(below)],
        reached=above is not None,
        monotone=bool((np.diff(means) >= 0).all()),
        trace=trace,
        n_prompts=len(counts),
        n_tokens=int(counts.sum()),
        tokens=tokens,
    )


def _interval(totals: Float64[np.ndarray, " text"], counts: Int[np.ndarray, " text"], seed: int) -> tuple[float, float]:
    if len(counts) < _FEWEST_PROMPTS:
        return float("nan"), float("nan")
    return bootstrap_mean(totals, counts, seed=seed)


def _strength_interval(
    strengths: Float64[np.ndarray, " strength"],
    table: Float64[np.ndarray, "strength text"],
    counts: Int[np.ndarray, " text"],
    budget: float,
    seed: int,
) -> tuple[float, float]:
    """Where redrawn prompts would have put the crossing, between measured strengths; the largest where they have none.

    Between two strengths the root of the divergence is taken to be linear, as it is for small steps.
    """
    if len(counts) < _FEWEST_PROMPTS:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), _RESAMPLES)
    curves = np.sqrt(np.maximum((drawn @ table.T) / (drawn @ counts)[:, None], 0.0))
    goal, crossings = float(np.sqrt(budget)), np.full(len(curves), strengths[-1])
    for row, curve in enumerate(curves):
        passed = np.flatnonzero(curve > goal)
        if len(passed):
            at = int(passed[0])
            share = (goal - curve[at - 1]) / (curve[at] - curve[at - 1])
            crossings[row] = strengths[at - 1] + share * (strengths[at] - strengths[at - 1])
    low, high = np.quantile(crossings, [0.025, 0.975])
    return float(low), float(high)
