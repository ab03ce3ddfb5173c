"""Resident memory of a rank falls as 1 / ranks: all that a call takes, not only what it keeps."""

from __future__ import annotations

import sys

import pytest

from tests.parallel.memory_workers import HEADS, WIDTH, resident_growth
from tests.parallel.ranks import Ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

TOKENS = 16384

OF_TOKENS = 8 * TOKENS * HEADS * WIDTH * 4
"""Bytes of q, k, v, o and their gradients: 128 MiB."""

OF_RANKS = 4 * 3 * HEADS * 2 * WIDTH * WIDTH * 4
"""Bytes of summaries (M, R) of four ranks, as they come and in float64: 1.5 MiB."""

HUGE_PAGE = 2 << 20
"""Bytes of a page of large results; they end inside of one."""


def growth(count: int, strategy: str, backend: str, *, gathers: bool = False) -> int:
    """Return the most bytes that a rank of so many takes, in processes that did nothing before."""
    how = {"strategy": strategy, "backend": backend}
    started = Ranks(count)
    try:
        return max(started.run(count, resident_growth, TOKENS, how, gathers))
    finally:
        started.close()


def check_falls(growths: dict[int, int]) -> None:
    for count, found in growths.items():
        assert found <= 1.25 * growths[1] / count + OF_RANKS + HUGE_PAGE, growths


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("strategy", ["pipeline", "gather"])
def test_resident_memory_of_a_rank_falls_with_their_number(strategy: str, backend: str) -> None:
    growths = {count: growth(count, strategy, backend) for count in (1, 2, 4)}
    # All that is known to be there is seen.
    for count, found in growths.items():
        assert found >= OF_TOKENS / count, growths
    check_falls(growths)


def test_a_rank_that_gathers_keys_and_values_is_seen() -> None:
    of_one = growth(1, "pipeline", "cpp")
    for count in (2, 4):
        found = growth(count, "pipeline", "cpp", gathers=True)
        with pytest.raises(AssertionError):
            check_falls({1: of_one, count: found})
