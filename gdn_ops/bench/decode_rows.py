"""Make the rows of `gdn-ops bench decode`: times, and the numbers that have a target."""

from __future__ import annotations

import statistics

from gdn_ops.bench.rows import Row
from gdn_ops.bench.runner import Timing


def decode_rows(
    case: str, mib: float, timing: dict[str, Timing], added: dict[str, Timing]
) -> list[Row]:
    """Return the rows of the times, and of the ratios and differences that have a target.

    Args:
        case: as shown.
        mib: size of the state.
        timing: of the ways, by name.
        added: seconds of step() outside of the run of onnxruntime, by the name of the way.
    """
    floor, us = timing["floor"].median, 1e6
    rows = [
        Row(
            "decode",
            case,
            name,
            "us",
            t.median * us,
            t.best * us,
            len(t.samples),
            ratio=floor / t.median,
            against="floor",
            floor=floor * us,
        )
        for name, t in timing.items()
    ]
    if "ort in place" not in timing:
        return rows
    own, bare = timing["ort in place"], timing["ort in place, bare"]
    bound = 4.0 if mib < 2 else 3.0
    # What step() adds has targets of its own.
    rows.append(_ratio(case, "ort, bare / floor", bare, timing["floor"], bound, at_least=False))
    for other, least in (("standard in place", 3.0), ("torch", 3.0), ("compile", 2.0)):
        rows.append(_ratio(case, f"{other} / ort", timing[other], own, least, at_least=True))
    guards = timing["ort in place, bare, no guards"]
    guards = timing["ort in place, bare, no guards"]
    rows.append(_difference(case, "cost of guards", bare, guards, 15.0))
    # As a run without step() does, which finds its token in bound memory.
    name = "ort in place, own buffers"
    rows.append(_added(case, "step() adds, own buffers", added[name], 25.0))
    rows.append(_added(case, "step() adds, token copied in", added["ort in place"], 25.0))
    return rows


def _added(case: str, name: str, x: Timing, bound: float) -> Row:
    value, best, count = x.median * 1e6, x.best * 1e6, len(x.samples)
    text, reached = f"<= {bound:g} us", value <= bound
    return Row("decode", case, name, "us", value, best, count, target=text, reached=reached)


def _ratio(case: str, name: str, x: Timing, y: Timing, bound: float, *, at_least: bool) -> Row:
    value = x.median / y.median
    reached = value >= bound if at_least else value <= bound
    text = f"{'>=' if at_least else '<='} {bound:g}x"
    return Row(
        "decode",
        case,
        name,
        "x",
        value,
        x.best / y.best,
        len(x.samples),
        target=text,
        reached=reached,
    )


def _difference(case: str, name: str, x: Timing, y: Timing, bound: float) -> Row:
    # Of each round: a disturbance that lasts longer meets both.
    value = statistics.median(a - b for a, b in zip(x.samples, y.samples, strict=True)) * 1e6
    best = (x.best - y.best) * 1e6
    return Row(
        "decode",
        case,
        name,
        "us",
        value,
        best,
        len(x.samples),
        target=f"<= {bound:g} us",
        reached=value <= bound,
    )
