"""A plain dense BatchTopK crosscoder in PyTorch: what ours is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from diffing.crosscoder.config import CrosscoderConfig
from diffing.crosscoder.model import CrosscoderFit
from diffing.crosscoder.normaliser import Normaliser, fit_normaliser
from diffing.crosscoder.training import Weights
from diffing.pair import PairedActivations


class DenseTraining:
    """Autograd through the whole [token, latent] matrix; the exact top k · B of the batch; Adam."""

    def __init__(self, config: CrosscoderConfig, n_models: int, d_model: int) -> None:
        self.config = config
        self.weights = Weights.initial(config.n_latents, n_models, d_model, seed=config.seed)
        self.parameters = [tensor.requires_grad_(True) for tensor in self.weights.parameters().values()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.peak_rate(d_model), fused=True)
        self.peak, self.step = config.peak_rate(d_model), 0

    def advance(self, batch: Tensor) -> None:
        weights = self.weights
        activations = torch.relu(batch @ weights.encoder.T + weights.encoder_bias)
        scores = (activations * weights.code_norms()).flatten()
        top = scores.topk(self.config.k * len(batch), sorted=False).indices
        kept = torch.zeros_like(scores)
        kept[top] = activations.flatten()[top]
        written = kept.view_as(activations) @ weights.decoder + weights.decoder_bias
        loss = (batch - written).square().sum() / batch.square().sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.param_groups[0]["lr"] = self.peak * self.config.schedule_at(self.step)
        self.optimizer.step()
        self.step += 1


def fit_dense(paired: PairedActivations, config: CrosscoderConfig) -> CrosscoderFit:
    """The same data, schedule and threshold as ours; unit rows at first, the exact top k · B, no revival."""
    normaliser = fit_normaliser(paired, max_norm_ratio=config.max_norm_ratio)
    training = DenseTraining(config, paired.n_models, paired.d_model[0])
    stream = paired.stream(config.batch_size, seed=config.seed)
    for _, batch in zip(range(config.steps), stream, strict=False):
        training.advance(normalised(batch, normaliser))
    inputs = torch.cat([normalised(batch, normaliser) for _, batch in zip(range(32), stream, strict=False)])
    with torch.no_grad():
        weights = training.weights
        scores = torch.relu(inputs @ weights.encoder.T + weights.encoder_bias) * weights.code_norms()
        cut = float(scores.flatten().topk(config.k * len(inputs)).values.min())
        rate = (scores > cut).float().mean(dim=0)
    return CrosscoderFit.from_training(weights, normaliser, cut, rate, config, [])


def normalised(batch: Tensor, normaliser: Normaliser) -> Tensor:
    return normaliser.apply(batch[normaliser.usual(batch)]).flatten(1).float()
