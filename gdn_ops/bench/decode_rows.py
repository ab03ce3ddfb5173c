"""Make the rows of `gdn-ops bench decode`: times, and the numbers that have a target."""

from __future__ import annotations

import statistics

from gdn_ops.bench.rows import Row, timed_rows
from gdn_ops.bench.turns import Timing


def decode_rows(
    case: str, mib: float, timing: dict[str, Timing], added: dict[str, Timing]
) -> list[Row]:
    """Return the rows of the times, and of the ratios and differences that have a target.

    The state has `mib` MiB; `added` is, by way, what step() adds to the run of onnxruntime.
    """
    rows = timed_rows("decode", case, "us", timing, "floor", floor=timing["floor"].median)
    floor = timing["floor"]

    def judge(
        name: str, unit: str, median: float, best: float, bound: float, at_least: bool = False
    ) -> None:
        """Add a row with its target."""
        reached = median >= bound if at_least else median <= bound
        target = f"{'>=' if at_least else '<='} {bound:g}{'x' if unit == 'x' else ' us'}"
        numbers = (median, best, len(floor.samples))
        rows.append(Row("decode", case, name, unit, *numbers, target=target, reached=reached))

    for way in ("custom in place", "custom in place, own buffers"):
        if way in timing:
            x = timing[way]
            judge(f"{way} / floor", "x", x.median / floor.median, x.best / floor.best, 1.6)
    if "ort in place" not in timing:
        return rows
    own, bare = timing["ort in place"], timing["ort in place, bare"]
    # Give what step() adds targets of its own.
    pairs = [("ort, bare / floor", bare, floor, 4.0 if mib < 2 else 3.0, False)]
    others = (("standard in place", 3.0), ("torch", 3.0), ("compile", 2.0))
    pairs += [(f"{other} / ort", timing[other], own, bound, True) for other, bound in others]
    for name, x, y, bound, at_least in pairs:
        judge(name, "x", x.median / y.median, x.best / y.best, bound, at_least)
    # Of each round: a disturbance that lasts longer meets both.
    plain = timing["ort in place, bare, no guards"]
    cost = statistics.median(a - b for a, b in zip(bare.samples, plain.samples, strict=True))
    judge("cost of guards", "us", cost * 1e6, (bare.best - plain.best) * 1e6, 15.0)
    # As a run without step() does, which finds its token in bound memory.
    for name, way in (("own buffers", "ort in place, own buffers"),
                      ("token copied in", "ort in place")):  # fmt: skip
        judge(f"step() adds, {name}", "us", added[way].median * 1e6, added[way].best * 1e6, 25.0)
    return rows
