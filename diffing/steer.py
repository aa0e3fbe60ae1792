"""What do the models answer when a latent is turned up or down?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from diffing.answers import AnswerSettings, draw_answers
from diffing.checkpoint import LoadedCheckpoint
from diffing.crosscoder.model import CrosscoderFit
from diffing.errors import ComparabilityError, InputError
from diffing.intervene import Add, Edit, Intervention
from diffing.progress import followed
from diffing.prompts import PromptSet, TokenizedPrompts
from diffing.site import Site, resolve_site

SIDES = ("base", "tuned")
TOKENS = ("answer", "all")


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are written.

    Attributes:
        max_new_tokens: most tokens of an answer.
        temperature: of sampling; 0 takes the likeliest token each time.
        seed: of sampling; every arm draws the same numbers.
        batch_size: prompts at once; answers do not depend on it but for rounding.
        tokens: `answer` steers from the token on which the answer's first one is chosen, `all` the prompt as well.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 16
    tokens: str = "answer"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_size < 1 or self.temperature < 0 or self.tokens not in TOKENS:
            raise InputError(
                f"Expected max_new_tokens and batch_size of at least 1, a temperature of 0 or more and tokens out of "
                f"{', '.join(TOKENS)}, got {self!r}. Mend what is off."
            )


@dataclass(frozen=True)
class Arm:
    """One model with the latent moved so far.

    Attributes:
        side: `base` or `tuned`.
        strength: in units of the latent's mean activation where it fires; 0 leaves the model as it is.
    """

    side: str
    strength: float = 0.0

    def __str__(self) -> str:
        return self.side if self.strength == 0 else f"{self.side} {self.strength:+g}"


@dataclass(frozen=True)
class SteeredAnswers:
    """The answers to one prompt.

    Attributes:
        prompt: its id.
        texts: one answer an arm, in the order of `Steering.arms`.
    """

    prompt: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Steering:
    """Answers side by side, with a latent as it is, turned up and turned down.

    Attributes:
        latent: its number in the crosscoder.
        site: where its direction was added (`resid:12`).
        unit: Euclidean length of a strength of 1, in activation units.
        arms: what was compared.
        answers: one entry a prompt.
        settings: how the answers were written.
    """

    latent: int
    site: str
    unit: float
    arms: tuple[Arm, ...]
    answers: tuple[SteeredAnswers, ...]
    settings: GenerationSettings


def steer_latent(
    fit: CrosscoderFit,
    latents: pd.DataFrame,
    latent: int,
    base: LoadedCheckpoint,
    tuned: LoadedCheckpoint,
    prompts: PromptSet,
    site: Site | str,
    *,
    strengths: Sequence[float] = (4.0,),
    settings: GenerationSettings | None = None,
    progress: bool = False,
) -> Steering:
    """Lets both models answer as they are, base with the latent turned up, and tuned with it turned down.

    What is added is the latent's decoder row on the side where it is longer, times its mean activation.

    Args:
        fit: the crosscoder of these models at this site.
        latents: its table, as `compare` makes it.
        latent: which one.
        base: before.
        tuned: after; may be the same model in memory with its adapter on.
        prompts: conversations that end with a question, or texts to go on with.
        site: the site of the fit.
        strengths: how far, in units of the mean activation; base is moved by each, tuned by its negative.
        settings: how answers are written.
        progress: shows a bar on a terminal.

    Raises:
        InputError: no such latent, or one that never fires.
        ComparabilityError: the fit is not of this width.
        SiteError: no such site.
    """
    settings = settings or GenerationSettings()
    where = resolve_site(tuned.model, site)
    vector = _direction(fit, latents, latent)
    if where.d_model is not None and where.d_model != len(vector):
        raise ComparabilityError(
            f"Expected a crosscoder of width {where.d_model} as at {where.site}, got {len(vector)}. "
            "Pass the fit of these models and this site."
        )
    arms = [Arm(side) for side in SIDES]
    for strength in strengths:
        arms += [Arm("base", strength), Arm("tuned", -strength)]
    tokenized = prompts.tokenize(tuned.tokenizer, add_generation_prompt=True)
    texts = []
    for arm in followed(arms, "Steering", shown=progress):
        side = base if arm.side == "base" else tuned
        edits = [Edit(where.site, Add(arm.strength * vector))] if arm.strength else []
        texts.append(generate_answers(side, tokenized, edits=edits, settings=settings))
    answers = tuple(
        SteeredAnswers(prompt.id, tuple(column[row] for column in texts)) for row, prompt in enumerate(prompts)
    )
    return Steering(latent, str(where.site), float(vector.norm()), tuple(arms), answers, settings)


def generate_answers(
    loaded: LoadedCheckpoint,
    tokenized: TokenizedPrompts,
    *,
    edits: Sequence[Edit] = (),
    settings: GenerationSettings | None = None,
) -> list[str]:
    """What one model answers to each prompt while its activations are changed.

    Args:
        loaded: the model; hooks, adapters and mode are put back, and the caller's random state is left alone.
        tokenized: prompts that end where the answer begins (`tokenize(…, add_generation_prompt=True)`).
        edits: what is changed where; none for the model as it is.
        settings: how answers are written.

    Returns:
        The answers in the order of the prompts, without special tokens.
    """
    settings = settings or GenerationSettings()
    drawing = AnswerSettings(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )
    tokens = "response" if settings.tokens == "answer" else "all"
    with Intervention(loaded.model, edits, tokens=tokens):
        answers = draw_answers(loaded, tokenized, drawing)
    return loaded.tokenizer.batch_decode([answer.tolist() for answer in answers], skip_special_tokens=True)


def _direction(fit: CrosscoderFit, latents: pd.DataFrame, latent: int) -> Float[Tensor, " d_model"]:
    """What the latent adds when it fires as strongly as it does on average, in activation units."""
    if latent not in latents.index:
        raise InputError(f"Expected a latent of 0 to {fit.n_latents - 1}, got {latent}. Look it up in the table.")
    row = latents.loc[latent]
    if row["label"] == "dead":
        raise InputError(f"Expected a latent that fires, got {latent}, which never does. Choose one with contexts.")
    side = 1 if row["relative_norm"] >= 0.5 else 0
    return float(row["mean_activation"]) * fit.side_decoder(side)[latent]
