"""How is a crosscoder fitted?"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from diffing.crosscoder.choices import check_blocks, check_choices
from diffing.errors import InputError

# Below this many tokens a latent, the same data give noticeably other latents with another seed.
TOKENS_PER_LATENT = 1000
# Share of the rows held out where nobody chose any, and the number of rows below which a gate fitted on them is loose.
_HELD_OUT = 0.05
_FEWEST_HELD_OUT = 1000
# Firings a latent between two revivals, on average, below which silence is chance.
_FIRINGS_TO_TELL = 32


@dataclass(frozen=True)
class CrosscoderConfig:
    """Settings of one fit; everything random follows from `seed`.

    Attributes:
        n_latents: size of the dictionary. Rather too large: unused latents die and do no harm.
        k: latents active per token, on average over a batch (BatchTopK).
        steps: optimizer steps.
        batch_size: tokens per step.
        seed: fixes initial weights and the order of the data.
        lr: peak learning rate of Adam; None chooses by width and size of the dictionary.
        warm_up: share of the steps over which the learning rate rises linearly.
        decay: share of the steps, at the end, over which it falls linearly to zero.
        anneal: share of the steps over which the number of active latents falls from `anneal_from` · k to k.
        anneal_from: multiple of k to start from; 1 for no annealing.
        clip: largest norm of the whole gradient (of the loss as a fraction of the variance).
        revivals: how often, during the first `revive_until` of the steps, idle latents are set to directions that
            the others leave unexplained; 0 for never, and less often where latents had no time to show themselves.
        revive_until: share of the steps after which latents are left alone.
        idle_below: a latent is idle when its share of the written energy is below this multiple of the mean.
        revive_alike: cosine from which two residuals count as missing the same feature. Noise makes residuals unlike:
            where it is much of the activations, 0.3 finds features that 0.5 leaves in others; it also takes firings
            that one side alone shows for features of that side. Chance gives cosines of about one over the root of
            the sides' widths together; stay at several times that.
        max_norm_ratio: tokens whose activation norm exceeds this multiple of the median on any side are left out
            of statistics and training; attention sinks would otherwise rule both.
        save_every: steps between two saved training states, where there is a folder to save to.
        sparsity: how few latents are kept active. `batch_topk`: the k · B strongest of a batch; the fewest false
            exclusive latents and the default. `l1` (Lindsey 2024): a price on Σ f · decoder norms; finds rare features
            well where it may be dense (a k several times the true one), and invents exclusive latents where it may
            not. `jumprelu` (Anthropic 2025): a threshold for every latent; for those who reproduce such work.
        penalty: λ of `l1` and `jumprelu`, in the loss Σ_m ‖z^m − ẑ^m‖² + λ · price a token, with E‖z^m‖² = d_model.
            None steers λ so that k latents are active, and the final gate is re-fitted to exactly k; with a number
            of your own, k is only a scale and the reached number is `CrosscoderFit.l0`.
        density: multiple of k at which a steered `l1` or `jumprelu` is trained; the gate brings it back to k. None for
            3 (`l1`) or 2 (`jumprelu`).
        penalty_ramp: share of the steps over which λ rises from 0; None for 5 % (`l1`) or all of them (`jumprelu`
            with a penalty of one's own).
        bandwidth: width of the window in which JumpReLU's thresholds see a gradient, as a share of √(d_model / k),
            about the activation of one of k equal latents.
        pre_activation_penalty: λ_p of JumpReLU's price on silent latents, Σ ReLU(threshold − a) · norm.
        n_shared: designated shared latents, with one decoder row for all sides (Anthropic 2025).
        shared_penalty: λ of the shared latents relative to the others', for `l1` and `jumprelu`; .1 to .2.
        k_shared: how many of the k belong to the shared latents, in a budget of their own (dual-k BatchTopK,
            Delta-crosscoder 2026); None for one budget.
        exclusive_share: share of the dictionary, for each side, that may write to that side alone (dedicated feature
            crosscoder 2026); finds more exclusive features, and more false ones.
        delta_weight: weight of the additional error ‖(z^m − z^base) − (ẑ^m − ẑ^base)‖² of every later side m. The loss
            is then (1 + w)(‖e_base‖² + ‖e_tuned‖²) − 2w e_base · e_tuned. For narrow fine-tunes.
        precision: `float32`, or `bfloat16` for the encoder's product alone; weights, activations and all else stay
            in fp32.
        device: `auto` for a GPU where there is one, or a device by name. A fit comes back on the CPU.
        held_out: share of the rows kept from training (chosen by their content, so that copies of a row stay on one
            side), on which the gate is fitted; 0 fits it on the batches after the last, unseen only within the first
            epoch. `CrosscoderFit.gate_unseen` says which it was.
    """

    n_latents: int
    k: int
    steps: int = 3000
    batch_size: int = 1024
    seed: int = 0
    lr: float | None = None
    warm_up: float = 0.05
    decay: float = 0.4
    anneal: float = 0.0
    anneal_from: float = 1.0
    clip: float = 1.0
    revivals: int = 10
    revive_until: float = 0.6
    idle_below: float = 0.03
    revive_alike: float = 0.5
    max_norm_ratio: float = 10.0
    save_every: int = 250
    sparsity: str = "batch_topk"
    penalty: float | None = None
    density: float | None = None
    penalty_ramp: float | None = None
    bandwidth: float = 0.5
    pre_activation_penalty: float = 3e-6
    n_shared: int = 0
    shared_penalty: float = 0.15
    k_shared: int | None = None
    exclusive_share: float = 0.0
    delta_weight: float = 0.0
    precision: str = "float32"
    device: str = "auto"
    held_out: float = 0.0

    def __post_init__(self) -> None:
        for name in ("n_latents", "k", "steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"Expected {name} of at least 1, got {getattr(self, name)}. Pass a larger {name}.")
        if self.k > self.n_latents:
            raise InputError(
                f"Expected k of at most n_latents ({self.n_latents}), got {self.k}. Lower k or enlarge the dictionary."
            )
        if self.seed < 0:
            raise InputError(f"Expected a seed of 0 or more, got {self.seed}. Pass another seed.")
        check_choices(self)

    def peak_rate(self, d_model: int) -> float:
        """The learning rate asked for, or 4e-3 where d_model is 128, falling as the size of a unit row's entries.

        Large dictionaries, whose latents each see little data, take smaller steps.
        """
        if self.lr is not None:
            return self.lr
        return 4e-3 * min(1.5, math.sqrt(128 / d_model)) * min(1.0, math.sqrt(4096 / self.n_latents))

    @property
    def n_exclusive(self) -> int:
        """Exclusive latents of each side."""
        return int(self.exclusive_share * self.n_latents)

    @property
    def steered(self) -> bool:
        """Whether λ follows the number of active latents."""
        return self.sparsity != "batch_topk" and self.penalty is None

    def check_sides(self, widths: tuple[int, ...]) -> None:
        """Refuses what sides of these widths cannot have.

        Raises:
            InputError: too few sides, too small a dictionary, or different widths where rows are compared.
        """
        check_blocks(self, widths)

    @property
    def revival_interval(self) -> int:
        """Steps between two revivals; 0 for none.

        Long enough that a latent that is no rarer than others would have fired often: before that, idle latents
        cannot be told from those whose turn has not come, which a large dictionary in a short run is full of.
        """
        if not self.revivals:
            return 0
        telling = math.ceil(_FIRINGS_TO_TELL * self.n_latents / (self.k * self.batch_size))
        return max(1, int(self.revive_until * self.steps / self.revivals), telling)

    def schedule_at(self, step: int) -> float:
        """Share of the peak learning rate at the step with this number, from 0."""
        rising = (step + 1) / max(1.0, self.warm_up * self.steps)
        falling = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, rising, falling)

    def k_at(self, step: int) -> float:
        """Latents active per token at the step with this number, from 0."""
        left = 1.0 - (step + 1) / max(1.0, self.anneal * self.steps)
        return min(float(self.n_latents), self.k * self.anneal_from ** max(0.0, left))

    def to_json(self) -> dict[str, Any]:
        """JSON values; `CrosscoderConfig(**value)` gives an equal configuration."""
        return asdict(self)

    @classmethod
    def for_data(cls, n_tokens: int, d_model: int, *, seed: int = 0) -> CrosscoderConfig:
        """Settings for so much data of this width when nobody chose any.

        The dictionary is 4 · d_model, or less where there would be fewer than 200 tokens a latent; the steps are
        some ten passes over the data within 1,500 to 10,000. A twentieth of the rows is held out to fit the gate
        on where that leaves a thousand of them.
        """
        room = 2 ** math.floor(math.log2(max(64, n_tokens / 200)))
        n_latents = min(4 * d_model, room)
        batch_size = min(1024, max(64, n_tokens // 16))
        steps = min(10_000, max(1_500, 10 * n_tokens // batch_size))
        k = max(4, min(32, n_latents // 16))
        held_out = _HELD_OUT if n_tokens * _HELD_OUT >= _FEWEST_HELD_OUT else 0.0
        return cls(n_latents=n_latents, k=k, steps=steps, batch_size=batch_size, seed=seed, held_out=held_out)


def data_caveat(n_tokens: int, n_latents: int) -> str | None:
    """A sentence where there is too little data for the dictionary, with the ratio; else None."""
    if n_tokens >= TOKENS_PER_LATENT * n_latents:
        return None
    return (
        f"Too little data for the dictionary: {n_tokens:,} tokens for {n_latents:,} latents are "
        f"{n_tokens / n_latents:.0f} tokens a latent; below {TOKENS_PER_LATENT:,}, latents differ from seed to seed."
    )
