"""Which noise decides the draw of a token, whatever batch, device or run it is drawn in?"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

# Constants of splitmix64 (Steele, Lea, Flood 2014), whose output function is used as a hash of key and token.
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def gumbel_noise(keys: Int64[Tensor, " answer"], n_tokens: int) -> Float[Tensor, "answer token"]:
    """Standard Gumbel noise that is a function of key and token alone, computed where the keys are.

    A sequential generator would fill a vocabulary for every answer on the CPU, which costs more than the model on a
    GPU; a hash of the counter needs no state and gives the same noise on every device.
    """
    tokens = torch.arange(1, n_tokens + 1, device=keys.device) * _signed(_GOLDEN)
    bits = _shifted(_mixed(keys[:, None] + tokens[None, :]), 11)
    # Small values keep all their digits in fp32, and they alone make large noise.
    uniform = ((bits.float() + 0.5) * 2.0**-53).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def noise_keys(seed: int, answers: Sequence[tuple[str, int]], step: int) -> Int64[Tensor, " answer"]:
    """Keys of one step of several answers, each named by its prompt's id and the number of the draw."""
    keys = [_hashed(f"{seed}\0{sample}\0{step}\0{prompt}") for prompt, sample in answers]
    return torch.tensor(keys, dtype=torch.int64)


def _hashed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def _mixed(values: Int64[Tensor, "*_"]) -> Int64[Tensor, "*_"]:
    values = (values ^ _shifted(values, 30)) * _signed(_FIRST)
    values = (values ^ _shifted(values, 27)) * _signed(_SECOND)
    return values ^ _shifted(values, 31)


def _shifted(values: Int64[Tensor, "*_"], by: int) -> Int64[Tensor, "*_"]:
    """Shifted right with zeros coming in; the tensor's own shift copies the sign."""
    return (values >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """The same 64 bits as a signed number."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
