"""What is to be explained? A query turns the model into one number; influence says which rows raise it.

Sign, everywhere: a query's value is something that a row can push *up*. A positive score means that up-weighting
the row raises the value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attribution.blocks import Block, accumulation_dtype
from attribution.example import Row, batches, check_rows, context_length
from attribution.losses import row_losses
from attribution.passes import device_of
from diffing.errors import InputError
from diffing.site import Site
from diffing.tap import Tap


@runtime_checkable
class Query(Protocol):
    """A differentiable number."""

    @property
    def name(self) -> str:
        """What it measures, for tables."""
        ...

    def value(self, model: nn.Module) -> Float[Tensor, ""]:
        """The number, with its graph; called in eval mode with gradients enabled."""
        ...


@dataclass(frozen=True)
class CompletionQuery:
    """Log-probability of the labelled tokens of given rows, averaged over rows (nats; summed over tokens)."""

    rows: Sequence[Row]
    name: str = "completion log-probability"

    def value(self, model: nn.Module) -> Float[Tensor, ""]:
        """Mean over rows of the summed log-probability."""
        return -_mean_loss(model, self.rows)


@dataclass(frozen=True)
class ContrastQuery:
    """log p(`wanted`) - log p(`unwanted`), each averaged over rows: what made one answer likelier than the other."""

    wanted: Sequence[Row]
    unwanted: Sequence[Row]
    name: str = "contrast of completions"

    def value(self, model: nn.Module) -> Float[Tensor, ""]:
        """Difference of mean summed log-probabilities, nats."""
        return _mean_loss(model, self.unwanted) - _mean_loss(model, self.wanted)


@dataclass(frozen=True)
class ProjectionQuery:
    """Projection of the last token's activation on a direction, averaged over prompts.

    Attributes:
        inputs: right-padded model inputs, `input_ids` and `attention_mask`, `[prompt, token]` each.
        site: where the activation is read.
        direction: unit vector `[d_model]`; positive is towards the trait.
        scale: what one unit of the result is worth in raw projection (the persona's gap).
        name: what it measures.
    """

    inputs: Mapping[str, Tensor]
    site: Site
    direction: Float[Tensor, " d_model"]
    scale: float = 1.0
    name: str = "persona projection"

    def value(self, model: nn.Module) -> Float[Tensor, ""]:
        """Mean projection in units of `scale`.

        Raises:
            InputError: prompts or direction do not fit the model.
        """
        _check_inputs(model, self.inputs, self.name)
        activations = _read(model, self.site, self.inputs)
        _check_direction(self.direction, activations, self.name)
        final = activations[_last_places(self.inputs)]
        return (_precise(final) @ self.direction.to(_precise(final))).mean() / self.scale


@dataclass(frozen=True)
class LatentQuery:
    """Mean activation of one dictionary latent over all tokens of some prompts.

    A latent's activation is what its encoder reads, plus bias, where that exceeds the threshold, else zero.

    Attributes:
        inputs: right-padded model inputs, `input_ids` and `attention_mask`, `[prompt, token]` each.
        site: where the dictionary reads this model.
        encoder: the latent's encoder row for this model `[d_model]`, in units of raw activations.
        bias: added to what the encoder reads. For a latent that reads other models too, what it reads of them at
            each token `[prompt, token]`, the bias included: they are not trained, so it is a constant.
        threshold: activations at or below it are zero.
        firing: tokens that count as firing whatever the model at hand says, the others as silent; at a checkpoint at
            which the latent is still silent there is then a gradient towards its birth. None: as the model says.
        name: what it measures.
    """

    inputs: Mapping[str, Tensor]
    site: Site
    encoder: Float[Tensor, " d_model"]
    bias: float | Float[Tensor, "prompt token"] = 0.0
    threshold: float = 0.0
    firing: Bool[Tensor, "prompt token"] | None = None
    name: str = "latent activation"

    def value(self, model: nn.Module) -> Float[Tensor, ""]:
        """Mean activation over real tokens; with `firing`, what the latent reads at those tokens over all real ones.

        Raises:
            InputError: prompts or encoder do not fit the model, or the latent is silent on every token, so that it
                has no gradient.
        """
        found, real = self._read(model)
        active = found > self.threshold if self.firing is None else self.firing.to(found.device)
        active = active & real
        if not active.any():
            raise InputError(
                f"Expected '{self.name}' to fire on one token at least; it is silent on all {int(real.sum())}. "
                "Give prompts on which it fires (its top contexts)."
            )
        return torch.where(active, found, torch.zeros_like(found)).sum() / real.sum()

    def mean_activation(self, model: nn.Module) -> float:
        """Mean activation over real tokens in this model, whatever `firing` says; 0 where the latent is silent."""
        with torch.no_grad():
            found, real = self._read(model)
            return float(
                torch.where((found > self.threshold) & real, found, torch.zeros_like(found)).sum() / real.sum()
            )

    def _read(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """What the encoder reads at every token, bias included, and which tokens are real."""
        _check_inputs(model, self.inputs, self.name)
        activations = _read(model, self.site, self.inputs)
        _check_direction(self.encoder, activations, self.name)
        precise = _precise(activations)
        bias = self.bias.to(precise) if isinstance(self.bias, Tensor) else self.bias
        found = precise @ self.encoder.to(precise) + bias
        return found, self.inputs["attention_mask"].to(found.device).bool()


@dataclass(frozen=True)
class LogitDifferenceQuery:
    """Logit of one next token less that of another behind the last token of each prompt, averaged over prompts.

    Attributes:
        inputs: right-padded model inputs, `input_ids` and `attention_mask`, `[prompt, token]` each.
        wanted: token ids `[prompt]`.
        unwanted: token ids `[prompt]`.
        name: what it measures.
    """

    inputs: Mapping[str, Tensor]
    wanted: Int[Tensor, " prompt"]
    unwanted: Int[Tensor, " prompt"]
    name: str = "logit difference"

    def value(self, model: nn.Module) -> Float[Tensor, ""]:
        """Mean difference of logits.

        Raises:
            InputError: prompts do not fit the model, or a token id is outside its vocabulary.
        """
        _check_inputs(model, self.inputs, self.name)
        logits = _precise(model(**self.inputs, use_cache=False).logits)
        size, n_prompts = logits.shape[-1], len(logits)
        for ids in (self.wanted, self.unwanted):
            if len(ids) != n_prompts or int(ids.min()) < 0 or int(ids.max()) >= size:
                raise InputError(
                    f"Expected {n_prompts} token ids of 0 to {size - 1} for '{self.name}'; got {ids.tolist()[:5]}. "
                    "Give one id a prompt, from this model's tokenizer."
                )
        final = logits[_last_places(self.inputs)]
        sides = (final.gather(1, ids.to(final.device).unsqueeze(1)) for ids in (self.wanted, self.unwanted))
        wanted, unwanted = sides
        return (wanted - unwanted).mean()


def _mean_loss(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    check_rows(rows, what="query", context_length=context_length(model))
    (batch,) = batches(rows, len(rows), device=device_of(model))
    return row_losses(model, batch).mean()


def _read(model: nn.Module, site: Site, inputs: Mapping[str, Tensor]) -> Tensor:
    with Tap(model, [site], early_exit=True) as tap:
        (activations,) = tap.read(**inputs)
    return activations


def _last_places(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    last = inputs["attention_mask"].sum(dim=1) - 1
    return torch.arange(len(last), device=last.device), last


def _precise(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _check_inputs(model: nn.Module, inputs: Mapping[str, Tensor], name: str) -> None:
    missing = [key for key in ("input_ids", "attention_mask") if key not in inputs]
    if missing or inputs["input_ids"].dim() != 2 or inputs["input_ids"].numel() == 0:
        got = f"no {', '.join(missing)}" if missing else f"shape {list(inputs['input_ids'].shape)}"
        raise InputError(
            f"Expected `input_ids` and `attention_mask` [prompt, token] for '{name}'; got {got}. Tokenise the prompts."
        )
    mask = inputs["attention_mask"]
    if bool((mask[:, 1:] > mask[:, :-1]).any()) or int(mask[:, 0].min()) == 0:
        raise InputError(
            f"Expected right-padded prompts for '{name}'; got padding before a real token. "
            "Tokenise with padding_side='right', no prompt empty."
        )
    longest, width = context_length(model), inputs["input_ids"].shape[1]
    if longest is not None and width > longest:
        raise InputError(
            f"Expected at most {longest} tokens, the model's context, for '{name}'; got {width}. Shorten the prompts."
        )


def _check_direction(direction: Tensor, activations: Tensor, name: str) -> None:
    width = activations.shape[-1]
    if direction.shape[-1] != width or not torch.isfinite(direction).all() or not direction.any():
        raise InputError(
            f"Expected a finite direction of width {width} for '{name}', not all zero; got width "
            f"{direction.shape[-1]}. Fit it on this model and site."
        )


def value_and_gradient(model: nn.Module, blocks: Sequence[Block], query: Query) -> tuple[float, list[Tensor]]:
    """A query's value and its gradient, block by block, in the precision that sums are taken in.

    Raises:
        InputError: the value is not finite, or depends on nothing that is trained.
    """
    wanted = {id(block.parameter): block.parameter for block in blocks}
    value = query.value(model)
    if not torch.isfinite(value.detach()).all():
        raise InputError(f"Expected a finite value of query '{query.name}'; got {value.item()}. Check its inputs.")
    found = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
    if all(gradient is None for gradient in found):
        raise InputError(
            f"Expected query '{query.name}' to depend on trainable parameters; it depends on none. "
            "Read a site above the first trained layer, or unfreeze what was trained."
        )
    whole = dict(zip(wanted, found, strict=True))
    return float(value.detach()), [_part(block, whole[id(block.parameter)]) for block in blocks]


def _part(block: Block, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        return torch.zeros(block.shape, dtype=accumulation_dtype(block), device=block.parameter.device)
    return block.part(gradient.detach()).to(accumulation_dtype(block))
