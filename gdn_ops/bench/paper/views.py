"""Arrange the JSON of a result for tables and plots: rows by contender and length."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gdn_ops.bench.paper.break_even import BreakEven
from gdn_ops.bench.paper.skeletons import MIXERS

Data = dict[str, Any]
"""The JSON of a result."""

Grid = dict[str, dict[int, dict[str, Any]]]
"""Rows by contender and length."""


def label(name: str) -> str:
    """Return how a contender is called in tables and plots."""
    return MIXERS[name].label if name in MIXERS else name


def grid(data: Data, what: str, width: int | None = None) -> Grid:
    """Return the rows of one measurement.

    Args:
        data: the JSON of a result.
        what: the measurement.
        width: of the model or layer; that of the models if None.
    """
    width = data["system"]["model"]["width"] if width is None else width
    found: Grid = {}
    for row in data["rows"]:
        if (row["what"], row["width"]) == (what, width):
            found.setdefault(row["comparator"], {})[row["length"]] = row
    return found


def lengths_of(rows: Grid) -> list[int]:
    """Return the lengths that some contender has a row of, sorted."""
    return sorted({length for of_mixer in rows.values() for length in of_mixer})


def short(tokens: float) -> str:
    """Return a number of tokens in a few characters, 16k for 16384."""
    return f"{tokens / 1024:g}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:.0f}"


def break_even_of(data: Data, what: str, name: str, width: int | None = None) -> BreakEven | None:
    """Return from which length on a contender is faster than attention, None if not measured."""
    width = data["system"]["model"]["width"] if width is None else width
    for x in data["break_even"]:
        if (x["what"], x["comparator"], x["width"]) == (what, name, width):
            return BreakEven(x["where"], x["length"])
    return None


def spread(rows: Iterable[dict[str, Any]]) -> float:
    """Return the largest ratio of a longest to a shortest sample."""
    return max(float(row["worst"] / row["best"]) for row in rows)


def size(count: float) -> str:
    """Return bytes in words."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def machine(data: Data) -> str:
    """Return on what a result was measured, in words."""
    system = data["system"]
    devices = {one["device"]: one for one in system["devices"]}
    name = system["device"]
    one = devices.get(name, devices.get(f"{name}:0", system["devices"][0]))
    kind = ", ".join(filter(None, (one["name"], one["capability"])))
    threads = system["threads"]["torch"]
    count = "" if name != "cpu" else f", {threads} thread{'s' if threads > 1 else ''}"
    torch = system["versions"]["torch"]
    return f"{name} ({kind}){count}, {system['dtype']}, torch {torch}, {system['date']}"


def skeleton(data: Data) -> str:
    """Return what all models have in common, in words."""
    system, counts = data["system"], list(data["parameters"].values())
    model = system["model"]
    return (
        f"{model['layers']} layers of width {model['width']}, MLPs of {model['inner']}, "
        f"{model['vocabulary']} tokens in the vocabulary, windows of {model['window']}; "
        f"{counts[0]['others'] / 1e6:.3g} million parameters besides the mixers in all of them"
    )
