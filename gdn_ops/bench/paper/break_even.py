"""Find the length from which on one contender is faster than another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Where = Literal["between", "below", "above"]


@dataclass(frozen=True)
class BreakEven:
    """Say from which length on a contender is faster.

    Attributes:
        where: "between" two lengths that were measured; "below" the shortest, where it is faster
            at all of them; "above" the longest, where it is not faster there.
        length: tokens, interpolated; the shortest or the longest length otherwise.
    """

    where: Where
    length: float

    def __str__(self) -> str:
        """Return it in words, in tokens."""
        sign = {"between": "", "below": "< ", "above": "> "}[self.where]
        return f"{sign}{round(self.length)}"


def break_even(own: Mapping[int, float], other: Mapping[int, float]) -> BreakEven:
    """Return the length from which on `own` stays below `other`.

    The time of a token is a constant for what is linear in the length, and a constant plus a
    multiple of the length for attention: their difference is interpolated linearly in the length.
    Where noise lets them cross several times, the last crossing counts.

    Args:
        own, other: time of a token by length, the same lengths in both.

    Raises:
        ValueError: the lengths differ, there are none, or a time is not finite.

    Example:
        >>> from gdn_ops.bench.paper.break_even import break_even
        >>> str(break_even({1024: 3.0, 2048: 3.0}, {1024: 2.0, 2048: 6.0}))
        '1280'
    """
    if not own or set(own) != set(other):
        raise ValueError(
            f"break_even: lengths are {sorted(own)} and {sorted(other)}, should be the same ones"
        )
    gain = {length: other[length] - own[length] for length in sorted(own)}
    wrong = next((length for length, x in gain.items() if not math.isfinite(x)), None)
    if wrong is not None:
        raise ValueError(f"break_even: a time at length {wrong} is not finite")
    lengths = list(gain)
    slower = [length for length in lengths if gain[length] <= 0]
    if not slower:
        return BreakEven("below", lengths[0])
    last = slower[-1]
    if last == lengths[-1]:
        return BreakEven("above", last)
    following = lengths[lengths.index(last) + 1]
    share = -gain[last] / (gain[following] - gain[last])
    return BreakEven("between", last + share * (following - last))
