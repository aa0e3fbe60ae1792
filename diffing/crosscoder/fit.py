"""Which joint dictionary explains all models' activations?"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffing.crosscoder.config import CrosscoderConfig, data_caveat
from diffing.crosscoder.held_out import gate_batches, gate_is_unseen, is_held_out
from diffing.crosscoder.model import FILE_NAME, CrosscoderFit
from diffing.crosscoder.normaliser import Normaliser, fit_normaliser
from diffing.crosscoder.origin import origin_of
from diffing.crosscoder.partition import Partition
from diffing.crosscoder.select import select_above
from diffing.crosscoder.sides import Sides, flatten_sides, stack_sides
from diffing.crosscoder.sparsity import block_cuts
from diffing.crosscoder.training import Training
from diffing.crosscoder.training_state import load_training, save_training
from diffing.crosscoder.weights import Weights
from diffing.errors import ComparabilityError, InputError
from diffing.pair import PairedActivations
from diffing.progress import followed
from diffing.provenance import Provenance

_STATE_NAME = "training.safetensors"

logger = logging.getLogger(__name__)


def fit_crosscoder(
    paired: PairedActivations, config: CrosscoderConfig, *, out: Path | str | None = None, progress: bool = False
) -> CrosscoderFit:
    """Fits a crosscoder over two or more models (Lindsey 2024; Minder 2025; norm-weighted selection over all sides).

    Which kind suits whom, with macro-F1 and variance explained on planted worlds (`benchmarks.planted_world`, preset
    "std", development seeds 10 and 11 or the one that is named, 1,500 steps, gated to the true number of latents;
    so few worlds rank nothing finely):

    - BatchTopK, the default: .98-.99 at .959; no false exclusive latent, and the fastest.
    - With `revive_alike` at 0.3: .98-.99 at .76, against .86-.87 at .744, where one side is three times noisier
      ("noisy", seeds 1 and 2: exclusive features with a parent are no longer left in it, recall .92-.94 against
      .38-.48); as good or better on "std" (seeds 1 and 2) and no exclusive call on "null" (seed 1). Where firings are
      loose it takes them for features of one side: .96-.99 with 2 to 8 false exclusive latents of some 130, against
      1.00 with none ("hard", seeds 1, 101 and 102). For noisy activations, with a null.
    - With the delta loss at weight 1: .98-1.00 at .960, but .97 with two false exclusive latents where BatchTopK alone
      has 1.00 with none ("hard", seed 11): no gain to count on here. For differences that are small beside the
      activations.
    - L1: .95-.96 at .94 where trained three times too dense and cut back, .59 at .77 (seed 10) where priced down to k
      itself: it shrinks what it writes. For comparison with older work.
    - JumpReLU: .97 at .960; as true to the activations, about four times slower on a CPU. Its thresholds alone end near
      k, so that the price fades to nothing. For comparison.
    - Exclusive latents (a tenth a side): .98 at .957. No gain where the labels already find exclusive features; for
      who wants candidates that cannot write to the other side by construction.
    - Designated shared latents with two budgets: .87 at .925 (seed 11, 96 shared, 3 of 10): tied rows cannot write
      features that turned, of which this world has many. For narrow fine-tunes, whose shared part barely moves.

    Args:
        paired: raw activations; normalisation happens inside and is folded into the result. Sides may differ in
            width.
        config: settings.
        out: folder for the result and, while running, the training state. A fit killed at any moment goes on from
            there when called again with the same arguments, and ends in the same bits (on a CPU).
        progress: shows a bar on the terminal.

    Returns:
        The fit, taking and giving raw activations, on the CPU.

    Raises:
        InputError: NaN activations (named), settings that these sides cannot have, or no such device.
        ComparabilityError: `out` holds a fit of other data or settings.
    """
    device = _device(config.device)
    Partition.of(config, paired.d_model)
    if caveat := data_caveat(paired.n_tokens, config.n_latents):
        logger.warning(caveat)
    normaliser = fit_normaliser(paired, max_norm_ratio=config.max_norm_ratio)
    folder = Path(out) if out is not None else None
    if folder is not None and (folder / FILE_NAME).is_file():
        return _finished(folder, config, normaliser)
    training = _start_or_resume(folder, paired, config, normaliser, device)
    _train(training, paired, normaliser, folder, progress=progress)
    fit = _finish(training, paired, normaliser)
    if folder is not None:
        fit.save(folder)
        # A kill in the middle of writing a state leaves its half behind.
        for leftover in (folder / _STATE_NAME, *folder.glob(f".{_STATE_NAME}.*.partial")):
            leftover.unlink(missing_ok=True)
    return fit


def _train(
    training: Training, paired: PairedActivations, normaliser: Normaliser, folder: Path | None, *, progress: bool
) -> None:
    config = training.config
    prepare = _Preparation(paired, normaliser, training.weights.decoder.device)
    stream = paired.stream(config.batch_size, seed=config.seed, start=training.step)
    steps = range(training.step, config.steps)
    for step, batch in zip(followed(steps, "Fitting the crosscoder", shown=progress), stream, strict=False):
        inputs = prepare(batch, without=config.held_out)
        if step == 0:
            training.scale_decoder(inputs)
        training.advance(inputs)
        done = step + 1
        if folder is not None and done % config.save_every == 0 and done < config.steps:
            save_training(training, folder / _STATE_NAME, _identity(config, normaliser))


class _Preparation:
    """Raw batches to normalised flat ones on the training's device."""

    def __init__(self, paired: PairedActivations, normaliser: Normaliser, device: torch.device) -> None:
        self._widths, self._normaliser, self._device = paired.d_model, normaliser.to(device), device

    def __call__(self, batch: Sides, *, without: float = 0.0, only: float = 0.0) -> Tensor:
        """Args: `without`, `only`: the share of rows held out, which are left out, or are all that stays."""
        x = stack_sides(batch, self._widths).to(self._device)
        usual = self._normaliser.usual(x)
        if without or only:
            held_out = is_held_out(x[:, 0, : self._widths[0]], without or only)
            usual &= held_out if only else ~held_out
        # A batch of outliers alone would leave nothing to normalise by; it is rarer than rare, and harmless kept.
        x = x[usual] if bool(usual.any()) or only else x
        return flatten_sides(self._normaliser.apply(x), self._widths)


@torch.no_grad()
def _finish(training: Training, paired: PairedActivations, normaliser: Normaliser) -> CrosscoderFit:
    """The gate at which k latents fire per token, and who fires then; everything back on the CPU.

    The running mean of batch cut-offs that others use lags behind in short runs.
    """
    config, weights = training.config, training.weights
    prepare = _Preparation(paired, normaliser, weights.decoder.device)
    inputs = torch.cat([prepare(batch, only=config.held_out) for batch in gate_batches(paired, config)])
    unseen = gate_is_unseen(paired, config) and len(inputs) > 0
    if not len(inputs):
        inputs = prepare(next(paired.stream(config.batch_size, seed=config.seed, start=config.steps)))
    strength, target = training.sparsity.strength(weights), training.sparsity.target()
    if target is None:
        # The price decided; what training counted as active is active.
        cuts = torch.full_like(strength, 1.0 if weights.log_threshold is not None else 0.0)
    else:
        cuts = block_cuts(inputs, weights, strength, target)
    support, _ = select_above(inputs, weights.encoder, weights.encoder_bias, cuts / strength)
    firing_rate = torch.bincount(support.columns, minlength=config.n_latents) / len(inputs)
    threshold = cuts / strength.clamp_min(1e-12) * weights.code_norms() if weights.log_threshold is not None else cuts
    facts = {"gate_unseen": unseen, "provenance": _provenance(paired, config, normaliser)}
    fit = CrosscoderFit.from_training(
        weights.to("cpu"), normaliser, threshold.cpu(), firing_rate.cpu(), config, training.trace, **facts
    )
    if caveat := fit.density_caveat:
        logger.warning(caveat)
    return fit


def _start_or_resume(
    folder: Path | None,
    paired: PairedActivations,
    config: CrosscoderConfig,
    normaliser: Normaliser,
    device: torch.device,
) -> Training:
    state = folder / _STATE_NAME if folder is not None else None
    if state is not None and state.is_file():
        return load_training(state, config, _identity(config, normaliser), device)
    weights = Weights.initial_in(Partition.of(config, paired.d_model), seed=config.seed)
    return Training(config, weights.to(device))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"Expected a device that this machine has, got {name!r}. Pass 'auto' or 'cpu'.") from error
    return device


def _identity(config: CrosscoderConfig, normaliser: Normaliser) -> dict[str, Any]:
    return {"data": _digest(normaliser), "n_tokens": normaliser.n_tokens, **config.to_json()}


def _digest(normaliser: Normaliser) -> str:
    # The means in fp64 depend on every row: equal bits mean the same data in the same order.
    return hashlib.sha256(normaliser.mean.numpy().tobytes() + normaliser.scale.numpy().tobytes()).hexdigest()


def _provenance(paired: PairedActivations, config: CrosscoderConfig, normaliser: Normaliser) -> Provenance:
    """What is known of the sources, with the settings and a digest of the activations themselves."""
    source = origin_of(paired)
    data = {"digest": _digest(normaliser), "n_tokens": normaliser.n_tokens, "n_outliers": normaliser.n_outliers}
    return Provenance(
        models=source.models,
        prompts=source.prompts,
        sites=source.sites,
        seed=config.seed,
        config={"crosscoder": config.to_json(), "data": data, "source": dict(source.config)},
        created_at="",
    )


def _finished(folder: Path, config: CrosscoderConfig, normaliser: Normaliser) -> CrosscoderFit:
    fit = CrosscoderFit.load(folder)
    if fit.config != config or not torch.equal(fit.mean, normaliser.mean.float()):
        raise ComparabilityError(
            f"Expected an empty folder or a fit of the same data and settings in {folder}, got {fit!r}. "
            "Pass another `out`."
        )
    return fit
