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
    if "ort in place" not in timing:
        return rows
    own, bare = timing["ort in place"], timing["ort in place, bare"]
    bound = 4.0 if mib < 2 else 3.0
    # What step() adds has targets of its own.
    rows.append(_ratio(case, "ort, bare / floor", bare, timing["floor"], bound, at_least=False))
    for other, least in (("standard in place", 3.0), ("torch", 3.0), ("compile", 2.0)):
        rows.append(_ratio(case, f"{other} / ort", timing[other], own, least, at_least=True))
    rows.append(_cost_of_guards(case, bare, timing["ort in place, bare, no guards"]))
    # As a run without step() does, which finds its token in bound memory.
    for name, way in (("own buffers", "ort in place, own buffers"),
                      ("token copied in", "ort in place")):  # fmt: skip
        t = added[way]
        numbers = (t.median * 1e6, t.best * 1e6, len(t.samples))
        rows.append(_bounded(case, f"step() adds, {name}", "us", numbers, 25.0))
    return rows


def _ratio(case: str, name: str, x: Timing, y: Timing, bound: float, *, at_least: bool) -> Row:
    numbers = (x.median / y.median, x.best / y.best, len(x.samples))
    return _bounded(case, name, "x", numbers, bound, at_least=at_least)


def _cost_of_guards(case: str, bare: Timing, unguarded: Timing) -> Row:
    # Of each round: a disturbance that lasts longer meets both.
    pairs = zip(bare.samples, unguarded.samples, strict=True)
    median = statistics.median(a - b for a, b in pairs) * 1e6
    numbers = (median, (bare.best - unguarded.best) * 1e6, len(bare.samples))
    return _bounded(case, "cost of guards", "us", numbers, 15.0)


def _bounded(
    case: str,
    name: str,
    unit: str,
    numbers: tuple[float, float, int],
    bound: float,
    *,
    at_least: bool = False,
) -> Row:
    """Return the row of (median, best, samples) with its target."""
    reached = numbers[0] >= bound if at_least else numbers[0] <= bound
    text = f"{'>=' if at_least else '<='} {bound:g}{'x' if unit == 'x' else ' us'}"
    return Row("decode", case, name, unit, *numbers, target=text, reached=reached)
