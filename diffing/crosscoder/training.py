"""What does one step do to an unfinished fit?"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffing.crosscoder.config import CrosscoderConfig
from diffing.crosscoder.partition import Partition
from diffing.crosscoder.priced import first_log_threshold, make_sparsity
from diffing.crosscoder.revive import find_missing_directions
from diffing.crosscoder.sparse import decode_entries, encode_entries
from diffing.crosscoder.weights import Weights as Weights

_TRACE_POINTS = 200
# Idle latents are revived from the worst eighth of the last eight batches, at most so many rows.
_WORST_BATCHES = 8
_MOST_WORST = 1024
# Share of its usual length that a revived latent ignores, lest it fires on what other features add up to.
_SILENCE = 0.5


@dataclass(frozen=True)
class TracePoint:
    """The fit at one step.

    Attributes:
        step: optimizer steps done, this one included.
        unexplained: fraction of the batch's variance left unexplained, both sides together.
        l0: latents active per token.
        rate: learning rate.
        penalty: λ; 0 where latents are counted, not priced.
    """

    step: int
    unexplained: float
    l0: float
    rate: float
    penalty: float = 0.0


@dataclass(frozen=True)
class StepLoss:
    """What a step minimises, and what it showed on the way.

    Attributes:
        total: the loss, a fraction of the batch's Σ ‖z‖².
        unexplained: its part that is left unexplained; what remains is the delta loss and the price.
        residual: `[token, width]`, z − ẑ.
        energy: `[latent]`, Σ (f · decoder norm)² over the batch.
        l0: active latents per token.
    """

    total: Float[Tensor, ""]
    unexplained: Float[Tensor, ""]
    residual: Float[Tensor, "token width"]
    energy: Float[Tensor, " latent"]
    l0: float


@dataclass
class Training:
    """An unfinished fit: weights, optimizer, how much each latent is used, and the trace.

    Two states that are equal here and see the same batches stay equal bit for bit (same machine, same threads).
    Nothing random happens after the first weights are drawn: the order of the data follows from seed and step.

    Attributes:
        config: settings.
        weights: in normalised units.
        step: optimizer steps done.
        energy: `[latent]`, Σ (f · decoder norm)² since idle latents were last revived.
        worst: `[row, width]`, the largest residuals of the last batches before the next revival.
        trace: the fit so far.
    """

    config: CrosscoderConfig
    weights: Weights
    step: int = 0
    energy: Float[Tensor, " latent"] = field(default_factory=lambda: torch.empty(0))
    worst: Float[Tensor, "row width"] = field(default_factory=lambda: torch.empty(0, 0))
    trace: list[TracePoint] = field(default_factory=list)

    def __post_init__(self) -> None:
        weights = self.weights
        self.partition = Partition.of(self.config, weights.widths)
        self.sparsity = make_sparsity(self.config, weights.mean_width)
        if weights.log_threshold is None:
            threshold = first_log_threshold(self.config, weights.mean_width)
            weights.log_threshold = None if threshold is None else threshold.to(weights.decoder.device)
        if not len(self.energy):
            self.energy = torch.zeros(self.config.n_latents, dtype=torch.float64, device=weights.decoder.device)
        if not len(self.worst):
            self.worst = weights.decoder.new_zeros(0, weights.decoder.shape[1])
        for parameter in weights.parameters().values():
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.Adam(list(weights.parameters().values()), lr=0.0, fused=True)

    @torch.no_grad()
    def scale_decoder(self, batch: Float[Tensor, "token width"]) -> None:
        """Before the first step: multiplies the decoder by the number that makes it explain most of the first batch.

        The strongest latents of a large dictionary all resemble the token, and unit rows would together write several
        times its length: a short run would spend its steps on shrinking them. Not where latents are priced, since
        the price is by the length of unit rows.
        """
        weights = self.weights
        if self.config.sparsity != "batch_topk":
            return
        support, values = self.sparsity.select(batch, weights, weights.code_norms(), self.step)
        written = support.sum_rows(values, weights.decoder)
        best = float((written * batch).sum() / written.square().sum().clamp_min(1e-30))
        weights.decoder *= best if best > 0.0 else 1.0

    def advance(self, batch: Float[Tensor, "token width"]) -> None:
        """One optimizer step on a batch in normalised units."""
        self.optimizer.zero_grad(set_to_none=True)
        found = self.loss(batch)
        found.total.backward()  # type: ignore[no-untyped-call]
        self.energy += found.energy
        self._apply(self._rate())
        self._record(float(found.unexplained.detach()), found.l0)
        self.sparsity.follow(found.l0, self.step)
        self.step += 1
        self._revive(found.residual.detach())

    def loss(self, batch: Float[Tensor, "token width"]) -> StepLoss:
        """What the step with the present number minimises; changes nothing."""
        weights, sparsity = self.weights, self.sparsity
        with torch.no_grad():
            norms = weights.code_norms()
            support, values = sparsity.select(batch, weights, norms, self.step)
        values = encode_entries(values, batch, weights.encoder, weights.encoder_bias, support)
        values = sparsity.activate(values, weights, support)
        with torch.no_grad():
            energy = support.column_energy(values * norms[support.columns])
        residual = batch - decode_entries(values, weights.decoder, support) - weights.decoder_bias
        scale = batch.square().sum()
        unexplained = residual.square().sum() / scale
        total = unexplained
        if self.config.delta_weight:
            total = total + self.config.delta_weight * self._delta(residual) / scale
        price = sparsity.price(values, weights, support, batch, self.step)
        if price is not None:
            total = total + price / scale
        return StepLoss(total, unexplained, residual, energy, sparsity.n_active(values) / max(1, len(batch)))

    def _delta(self, residual: Float[Tensor, "token width"]) -> Tensor:
        """Σ over the later sides m of ‖e_m − e_base‖²."""
        sides = residual.unflatten(1, (self.weights.n_models, -1))
        return (sides[:, 1:] - sides[:, :1]).square().sum()

    def _rate(self) -> float:
        return self.config.peak_rate(round(self.weights.mean_width)) * self.config.schedule_at(self.step)

    def _apply(self, rate: float) -> None:
        weights = self.weights
        for name, gradient in (("decoder", weights.decoder.grad), ("encoder", weights.encoder.grad)):
            if gradient is not None and not self.partition.trivial:
                self.partition.project_(name, gradient)
        parameters = list(weights.parameters().values())
        torch.nn.utils.clip_grad_norm_(parameters, self.config.clip)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        if not self.partition.trivial:
            # A vectorised step may round the last coordinates of a row unlike the others.
            self.partition.project_("decoder", weights.decoder)

    @torch.no_grad()
    def _revive(self, residual: Float[Tensor, "token width"]) -> None:
        """Now and then gives latents that do almost nothing the directions that nobody explains."""
        every = self.config.revival_interval
        if not every or self.step > self.config.revive_until * self.config.steps:
            return
        if -self.step % every < _WORST_BATCHES:
            largest = residual.norm(dim=1).topk(max(1, len(residual) // _WORST_BATCHES)).indices
            self.worst = torch.cat([self.worst, residual[largest]])[-_MOST_WORST:]
        if self.step % every:
            return
        idle = (self.energy < self.config.idle_below * self.energy.mean()).nonzero().squeeze(1)
        directions, lengths = find_missing_directions(self.worst, len(idle), alike=self.config.revive_alike)
        latents, numbers = self.partition.house(idle, directions)
        self._reset(latents, directions[numbers], lengths[numbers])
        self.energy.zero_()
        self.worst = self.worst[:0]

    def _reset(
        self,
        which: Int[Tensor, " latent"],
        directions: Float[Tensor, "latent width"],
        lengths: Float[Tensor, " latent"],
    ) -> None:
        """Latents that write what a token has along these directions, beyond half of the usual length."""
        weights, gain = self.weights, self.weights.n_models**0.5
        fresh = torch.ones(self.config.n_latents, dtype=torch.bool, device=directions.device)
        fresh[which] = False
        weights.decoder[which] = directions * gain
        weights.encoder[which] = directions / gain
        weights.encoder_bias[which] = -_SILENCE * lengths / gain
        if weights.log_threshold is not None:
            # The threshold does what the bias does for the others.
            weights.encoder_bias[which] = 0.0
            weights.log_threshold[which] = (_SILENCE * lengths / gain).log()
        if not self.partition.trivial:
            self.partition.project_("decoder", weights.decoder)
            self.partition.project_("encoder", weights.encoder)
        for name in set(weights.parameters()) - {"decoder_bias"}:
            state = self.optimizer.state[weights.parameters()[name]]
            state["exp_avg"][which] = 0.0
            # From nothing, Adam's first steps would be three times too long.
            state["exp_avg_sq"][which] = state["exp_avg_sq"][fresh].mean(dim=0)
            if name == "decoder" and not self.partition.trivial:
                # Tied coordinates move alike only with equal moments.
                self.partition.project_(name, state["exp_avg_sq"])

    def _record(self, unexplained: float, l0: float) -> None:
        every = max(1, self.config.steps // _TRACE_POINTS)
        done = self.step + 1
        if done % every == 0 or done == self.config.steps:
            self.trace.append(TracePoint(done, unexplained, l0, self._rate(), self.sparsity.penalty_at(self.step)))
