"""Which settings of a crosscoder go together?"""

from __future__ import annotations

import math
from typing import Any

from diffing.errors import InputError

SPARSITIES = ("batch_topk", "l1", "jumprelu")
PRECISIONS = ("float32", "bfloat16")

# A `CrosscoderConfig`, which imports this file.
Config = Any


def check_choices(config: Config) -> None:
    """Refuses what no data could be fitted with.

    Raises:
        InputError: names the setting, what it may be, and what to do.
    """
    for name, known in (("sparsity", SPARSITIES), ("precision", PRECISIONS)):
        if getattr(config, name) not in known:
            raise InputError(
                f"Expected {name} to be one of {', '.join(known)}, got {getattr(config, name)!r}. Pass one."
            )
    for name, least, most in _RANGES:
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            raise InputError(f"Expected {name} from {least:g} to {most:g}, got {value:g}. Pass another {name}.")
    if config.sparsity == "batch_topk":
        for name in ("penalty", "density", "penalty_ramp"):
            if getattr(config, name) is not None:
                raise InputError(
                    f"Expected no {name} with batch_topk, which counts latents instead, got {getattr(config, name)}. "
                    "Leave it out, or pass sparsity='l1' or 'jumprelu'."
                )
    _check_budgets(config)


_RANGES = (
    ("penalty", 0.0, math.inf),
    ("density", 1.0, 64.0),
    ("penalty_ramp", 0.0, 1.0),
    ("bandwidth", 1e-6, 10.0),
    ("pre_activation_penalty", 0.0, 1.0),
    ("n_shared", 0, math.inf),
    ("shared_penalty", 0.0, 1.0),
    ("exclusive_share", 0.0, 0.5),
    ("delta_weight", 0.0, 1000.0),
    ("held_out", 0.0, 0.5),
    ("revive_alike", 0.01, 1.0),
)


def _check_budgets(config: Config) -> None:
    if config.n_shared > config.n_latents:
        raise InputError(
            f"Expected n_shared of at most n_latents ({config.n_latents}), got {config.n_shared}. "
            "Lower n_shared or enlarge the dictionary."
        )
    if config.k_shared is None:
        return
    if config.sparsity != "batch_topk":
        raise InputError(
            f"Expected no k_shared with {config.sparsity}, which has a price and no budget, got {config.k_shared}. "
            "Use shared_penalty, or sparsity='batch_topk'."
        )
    left, others = config.k - config.k_shared, config.n_latents - config.n_shared
    if not (1 <= config.k_shared <= config.n_shared and 1 <= left <= others):
        raise InputError(
            f"Expected k_shared from 1 to n_shared ({config.n_shared}) with 1 to {others} of k ({config.k}) left for "
            f"the other latents, got {config.k_shared}. Choose n_shared, k_shared and k together."
        )


def check_blocks(config: Config, widths: tuple[int, ...]) -> None:
    """Refuses blocks of latents that sides of these widths cannot have.

    Raises:
        InputError: too few sides, too small a dictionary, or different widths where rows are compared.
    """
    several = {
        "n_shared": config.n_shared > 0,
        "exclusive_share": config.n_exclusive > 0,
        "delta_weight": config.delta_weight > 0,
    }
    for name in (name for name, asked in several.items() if asked):
        if len(widths) < 2:
            raise InputError(f"Expected two sides or more with {name}, got one. Leave {name} out.")
        if len(set(widths)) > 1 and name != "exclusive_share":
            raise InputError(
                f"Expected sides of one width with {name}, which compares their rows, got {widths}. Leave {name} out."
            )
    taken = config.n_shared + len(widths) * config.n_exclusive
    if taken > config.n_latents:
        raise InputError(
            f"Expected at most {config.n_latents} designated latents, got {config.n_shared} shared and "
            f"{config.n_exclusive} for each of {len(widths)} sides. Lower n_shared or exclusive_share."
        )
