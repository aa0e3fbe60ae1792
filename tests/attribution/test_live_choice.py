"""Few modules stand for all, where they do, and for no more than was asked."""

from __future__ import annotations

import numpy as np
import torch

from attribution.live_choice import Choice, fewest
from attribution.live_pass import Passed


def planted(n_modules: int = 12, rows: int = 40, queries: int = 2) -> torch.Tensor:
    """Modules 3 and 7 carry the pushes; the others add a constant and a little noise."""
    generator = torch.Generator().manual_seed(0)
    table = 0.01 * torch.randn(n_modules, rows, queries, generator=generator, dtype=torch.float64) + 5.0
    for place in (3, 7):
        table[place] = torch.randn(rows, queries, generator=generator, dtype=torch.float64)
    return table


def passed(table: torch.Tensor, read: set[int]) -> Passed:
    found = Passed({}, (table.shape[1], 1), False)
    found.parts = [(place, 0, table[place]) for place in range(len(table)) if place in read]
    return found


def test_the_modules_that_carry_the_pushes_are_found() -> None:
    read, left_out = fewest(planted(), 0.2)
    assert read == [3, 7]
    assert (left_out < 0.2).all()


def test_what_is_left_out_is_what_is_said() -> None:
    table = torch.randn(20, 50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    read, left_out = fewest(table, 0.3, always=[4])
    assert 4 in read
    missing = table.sum(dim=0) - table[read].sum(dim=0)
    spread = table.sum(dim=0).std(dim=0, unbiased=False)
    np.testing.assert_allclose(left_out, (missing.std(dim=0, unbiased=False) / spread).numpy(), rtol=1e-9)
    assert 0 < left_out.max() <= 0.3


def test_no_tolerance_and_no_numbers_leave_nothing_out() -> None:
    table = planted()
    assert fewest(table, 0.0)[0] == list(range(12))
    table[0, 0, 0] = torch.nan
    assert fewest(table, 0.5)[0] == list(range(12))


def test_all_are_read_until_enough_rows_were_seen_and_again_later() -> None:
    table, choice = planted(rows=16), Choice(12, 0.2)
    everything = set(range(12))
    assert choice.apart
    assert not choice.learn([passed(table, everything)], [1e-3])
    assert choice.learn([passed(table, everything)], [1e-3])
    assert choice.chosen is not None
    assert choice.chosen.read == {3, 7}
    # What is not read counts with its mean.
    torch.testing.assert_close(choice.rest, table[[0, 1, 2, 4, 5, 6, 8, 9, 10, 11]].mean(dim=1).sum(dim=0))
    changed = [choice.learn([passed(table, {3, 7})], [1e-3]) for _ in range(16)]
    assert changed == [False] * 15 + [True]
    assert choice.chosen is None


def test_packed_rows_and_a_rate_of_zero_choose_nothing() -> None:
    table, choice = planted(), Choice(12, 0.2)
    packed = passed(table, set(range(12)))
    packed.by_token = True
    assert not choice.learn([packed], [1e-3])
    assert not choice.learn([passed(table, set(range(12)))], [0.0])
