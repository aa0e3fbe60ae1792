"""How is each part of a diff measured, once both sides are captured and the crosscoder is fitted?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from diffing.answer_diff import AnswerDiff, diff_answers
from diffing.baselines import Baselines, measure_baselines
from diffing.capture import capture
from diffing.checkpoint import LoadedCheckpoint
from diffing.crosscoder.config import CrosscoderConfig
from diffing.crosscoder.contexts import LatentContexts, collect_contexts
from diffing.crosscoder.describe import LatentDescription, describe_latents
from diffing.crosscoder.evidence import collect_evidence
from diffing.crosscoder.label import CHANGED, EXCLUSIVE
from diffing.crosscoder.map import LatentMap, map_latents
from diffing.crosscoder.model import CrosscoderFit
from diffing.crosscoder.neighbours import Neighbourhoods, find_neighbours
from diffing.diff_plan import DiffPlan
from diffing.difference_lens import DifferenceLens, read_difference_lens
from diffing.difference_sae import DifferenceSae, measure_difference_sae
from diffing.lens import MeanDifference, measure_mean_difference
from diffing.logit_mining import LogitMining, mine_logits
from diffing.pair import PairedActivations
from diffing.prompts import Prompt, PromptSet, TokenizedPrompts
from diffing.site import Site
from diffing.splice import SpliceResult, splice_latents
from diffing.stagewise import StagewiseDiff, diff_stagewise
from diffing.steer import Steering, steer_latent
from diffing.token_relevance import WordComparison
from diffing.unembedding import TokenTexts, Unembedding
from diffing.weight_diff import WeightChange, diff_weights

_FEWEST_TO_MAP = 6
_STEER_PROMPTS = 8


@dataclass(frozen=True)
class DiffParts:
    """Two checkpoints, what they read, and how what they store was described.

    Attributes:
        base: before.
        tuned: after.
        prompts: what both read.
        tokenized: the same as tokens.
        site: where activations were read.
        paired: those activations.
        fit: the crosscoder.
        latents: its table.
        shown: latents worth a card.
        plan: what is asked for.
        max_length: most tokens of a prompt.
        progress: whether bars are shown.
    """

    base: LoadedCheckpoint
    tuned: LoadedCheckpoint
    prompts: PromptSet
    tokenized: TokenizedPrompts
    site: Site
    paired: PairedActivations
    fit: CrosscoderFit
    latents: pd.DataFrame
    shown: tuple[int, ...]
    plan: DiffPlan
    max_length: int
    progress: bool

    @cached_property
    def texts(self) -> TokenTexts:
        """How tokens are written."""
        return TokenTexts(self.tuned.tokenizer)

    @cached_property
    def unembeddings(self) -> tuple[Unembedding, Unembedding] | None:
        """Base's and tuned's; None for a module's own output, which need not live in the residual stream."""
        return None if self.site.stream == "module" else (Unembedding(self.base), Unembedding(self.tuned))

    @property
    def names(self) -> list[str]:
        """Ids of the prompts."""
        return [prompt.id for prompt in self.prompts]

    @property
    def device(self) -> str:
        """Where tuned computes."""
        return str(next(self.tuned.model.parameters()).device)

    @property
    def _one_sided(self) -> CrosscoderConfig:
        """The fit's settings for a dictionary of one thing, which has no sides to share latents or to keep them."""
        return replace(self.fit.config, n_shared=0, k_shared=None, exclusive_share=0.0, delta_weight=0.0)

    def mean_difference(self) -> MeanDifference:
        """Always measured: it costs one pass."""
        reading = self.unembeddings and self.unembeddings[1]
        return measure_mean_difference(self.paired, unembedding=reading, texts=self.texts if reading else None)

    def contexts(self) -> dict[int, LatentContexts]:
        """Where the latents worth a card fire, and what they promote."""
        return dict(
            collect_contexts(
                self.fit,
                self.paired,
                self.shown,
                texts=self.texts,
                prompt_ids=self.names,
                unembeddings=self.unembeddings,
            )
        )

    def baselines(self) -> Baselines | None:
        """The differences without a dictionary."""
        if not self.plan.baselines:
            return None
        return measure_baselines(
            self.paired,
            unembedding=self.unembeddings and self.unembeddings[1],
            texts=self.texts,
            prompt_ids=self.names,
            seed=self.fit.config.seed,
        )

    def difference_sae(self, out: Path) -> DifferenceSae | None:
        """A dictionary of the differences alone; None where there is no difference to describe."""
        if not self.plan.difference_sae or self.base.fingerprint == self.tuned.fingerprint:
            return None
        return measure_difference_sae(
            self.paired,
            self._one_sided,
            unembedding=self.unembeddings and self.unembeddings[1],
            texts=self.texts,
            out=out,
            progress=self.progress,
        )

    def weights(self) -> WeightChange | None:
        """Which weights changed, and which write the latents that changed."""
        if not self.plan.weights:
            return None
        # A module's own output is not the stream, and its latents are no directions of it.
        directions = latent_directions(self.fit, self.latents) if self.unembeddings else {}
        for persona in self.plan.personas:
            if persona.site == str(self.site):
                directions[f"persona {persona.trait}"] = persona.direction
        reading = self.unembeddings and self.unembeddings[1]
        return diff_weights(self.base, self.tuned, directions=directions, unembedding=reading, texts=self.texts)

    def mining(self) -> LogitMining | None:
        """Which next tokens changed most often."""
        if not self.plan.mining:
            return None
        return mine_logits(
            self.base,
            self.tuned,
            self.tokenized,
            device=self.device,
            seed=self.fit.config.seed,
            progress=self.progress,
        )

    def lens(self) -> DifferenceLens | None:
        """What the mean differences say when tuned reads them."""
        if not self.plan.lens or self.site.stream != "resid":
            return None
        words = None
        if self.plan.tuning_texts is not None:
            words = WordComparison(
                _texts_of(self.plan.tuning_texts), _texts_of(self.prompts), tokenizer=self.tuned.tokenizer
            )
        return read_difference_lens(
            self.paired, self.base, self.tuned, self.site, words=words, seed=self.fit.config.seed
        )

    def splice(self) -> SpliceResult | None:
        """Whether the exclusive latents make the difference; None where none is exclusive."""
        if not self.plan.splice or not self.latents["label"].isin(EXCLUSIVE).any():
            return None
        some = PromptSet(self.prompts.prompts[: self.plan.splice_prompts])
        tokenized = some.tokenize(self.tuned.tokenizer, max_length=self.max_length)
        return splice_latents(
            self.fit,
            self.latents,
            self.base,
            self.tuned,
            tokenized,
            self.site,
            seed=self.fit.config.seed,
            progress=self.progress,
        )

    def answers(self) -> AnswerDiff | None:
        """What both models answer to the plan's questions."""
        if self.plan.questions is None:
            return None
        return diff_answers(
            self.base, self.tuned, self.plan.questions, max_length=self.max_length, progress=self.progress
        )

    def steering(self) -> Steering | None:
        """Answers with the most often firing exclusive latent turned up in base and down in tuned."""
        exclusive = self.latents[self.latents["label"] == "tuned_only"]
        if self.plan.questions is None or not len(exclusive):
            return None
        strongest = int(exclusive["firing_rate"].idxmax())
        questions = PromptSet(self.plan.questions.prompts[:_STEER_PROMPTS])
        return steer_latent(
            self.fit,
            self.latents,
            strongest,
            self.base,
            self.tuned,
            questions,
            self.site,
            progress=self.progress,
        )

    def stagewise(self, folder: Path) -> StagewiseDiff | None:
        """Which latents of a base dictionary turn with the model, on the prompts and on the tuning texts."""
        plan = self.plan
        if not plan.stagewise or plan.tuning_texts is None:
            return None
        tokenized = plan.tuning_texts.tokenize(self.tuned.tokenizer, max_length=self.max_length)
        new = capture_sides(
            self.base,
            self.tuned,
            tokenized,
            self.site,
            folder / "stores",
            self.max_length,
            dtype=plan.store_dtype,
            progress=self.progress,
        )
        reading = self.unembeddings and self.unembeddings[1]
        return diff_stagewise(
            self.paired,
            new,
            self._one_sided,
            unembedding=reading,
            texts=self.texts if reading else None,
            progress=self.progress,
        )

    def neighbours(self) -> Neighbourhoods | None:
        """What stands near the latents worth a card."""
        if not self.shown:
            return None
        return find_neighbours(
            self.fit, self.shown, paired=self.paired, personas=self.plan.personas, site=str(self.site)
        )

    def map(self, contexts: dict[int, LatentContexts]) -> LatentMap | None:
        """All living latents in the plane, grouped; None for fewer than six."""
        alive = [int(latent) for latent in self.latents.index[self.latents["label"] != "dead"]]
        if len(alive) < _FEWEST_TO_MAP:
            return None
        return map_latents(self.fit, alive, contexts=contexts, seed=self.fit.config.seed)

    def descriptions(self, contexts: dict[int, LatentContexts], cache: Path) -> dict[int, LatentDescription]:
        """What a language model says of the latents that changed; nothing where none was named."""
        asked = self.plan.describe
        changed = [latent for latent in self.shown if self.latents["label"][latent] in CHANGED]
        if asked is None or not changed:
            return {}
        # The client behind an endpoint is slow to import, and most diffs ask nobody.
        from diffing.endpoint import Endpoint

        evidence = collect_evidence(
            self.fit, self.paired, changed, texts=self.texts, prompt_ids=self.names, seed=self.fit.config.seed
        )
        promoted = {latent: [score.text for score in contexts[latent].promoted] for latent in changed}
        with Endpoint(asked, cache=cache) as endpoint:
            return describe_latents(
                endpoint,
                evidence,
                promoted=promoted,
                control=True,
                seed=self.fit.config.seed,
                progress=self.progress,
            )


def capture_sides(
    base: LoadedCheckpoint,
    tuned: LoadedCheckpoint,
    tokenized: TokenizedPrompts,
    site: Site,
    folder: Path,
    max_length: int,
    *,
    dtype: str | None = None,
    progress: bool,
) -> PairedActivations:
    """Both sides' activations on the same tokens, stored in `folder`; goes on where it was killed.

    Args:
        base: before.
        tuned: after.
        tokenized: what both read.
        site: where activations are read.
        folder: for the two stores.
        max_length: most tokens of a prompt.
        dtype: of the stores; None keeps what the models compute.
        progress: shows bars on a terminal.
    """
    # Sixteen bits hold all that a 16-bit model computes; a model in fp32 keeps its precision.
    widths = {next(side.model.parameters()).dtype for side in (base, tuned)}
    dtype = dtype or ("float32" if widths == {torch.float32} else "bfloat16")
    stores = [
        capture(side, tokenized, [site], folder / name, max_length=max_length, dtype=dtype, progress=progress)
        for name, side in (("base", base), ("tuned", tuned))
    ]
    return PairedActivations.from_stores(stores, site)


def latent_directions(
    fit: CrosscoderFit, latents: pd.DataFrame, *, most: int = 64
) -> dict[str, Float[Tensor, " d_model"]]:
    """What the latents that changed write, by name: one side's decoder row, or for a rotated one the turn itself.

    Args:
        fit: over two sides.
        latents: its table.
        most: directions to give; the often firing latents first.
    """
    changed = latents[latents["label"].isin(CHANGED)]
    chosen = changed.sort_values("firing_rate", ascending=False, kind="stable").head(most)
    base, tuned = fit.decoder[0], fit.decoder[1]
    made = {}
    for latent, label in chosen["label"].items():
        row = {"tuned_only": tuned[latent], "base_only": base[latent]}.get(label, tuned[latent] - base[latent])
        made[f"latent {latent} ({label.replace('_', ' ')})"] = row
    return made


def _texts_of(prompts: Iterable[Prompt]) -> list[str]:
    return [
        prompt.text or "" if prompt.messages is None else "\n".join(message.content for message in prompt.messages)
        for prompt in prompts
    ]
