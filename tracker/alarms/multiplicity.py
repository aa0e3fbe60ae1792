"""Of many series watched at once, which are called, so that few of those called are false?"""

from __future__ import annotations

from collections.abc import Mapping

from diffing.errors import InputError


def called_by_e_values(e_values: Mapping[str, float], *, level: float, n_series: int | None = None) -> frozenset[str]:
    """Series called by the e-BH procedure (Wang & Ramdas 2022).

    The k largest e-values are called where the k-th is at least n / (level * k), for the largest such k. The expected
    share of false calls is at most `level`, however the series depend on each other: layers of one model, traits that
    share a direction and copies of one signal need no correction of their own.

    Args:
        e_values: evidence of each series, mean at most 1 where nothing happened.
        level: share of false calls, between 0 and 1.
        n_series: how many series are watched, where not all have evidence yet; never fewer than given.

    Raises:
        InputError: the level is out of range.
    """
    if not 0 < level < 1:
        raise InputError(f"Expected a level between 0 and 1, got {level}. Write 0.05 for five per cent.")
    n = max(n_series or 0, len(e_values))
    ordered = sorted(e_values.items(), key=lambda item: (-item[1], item[0]))
    last = 0
    for k, (_, value) in enumerate(ordered, start=1):
        if value >= n / (level * k):
            last = k
    return frozenset(name for name, _ in ordered[:last])
