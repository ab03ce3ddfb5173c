"""Show a benchmark's result as a table and as a plot; only the plot needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from gdn_ops.bench.rows import Result, Row, write_json

Log = Callable[[str], None]

_COLOURS = ("#4c6ef5", "#12b886", "#f59f00", "#e64980", "#868e96", "#7950f2", "#228be6")
_HEAD = ("", "median", "best", "floor", "ratio", "against", "target")
_TIMED = ("forward", "forward+backward", "memory", "step")


@dataclass(frozen=True)
class Bar:
    """Hold one bar of a plot, with a text at its end; equal names have one colour."""

    name: str
    value: float
    text: str
    published: bool = False


@dataclass(frozen=True)
class Panel:
    """Hold one panel of a plot: its title, bars, and a floor as a line if there is one."""

    title: str
    bars: Sequence[Bar]
    floor: float | None = None


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits; a dash for None."""
    return "-" if value is None else f"{value:.{digits}g}"


def _whole(value: float | None) -> str:
    """Return a number with three significant digits, and all of them before the point."""
    return number(value) if value is None or abs(value) < 100 else f"{value:.0f}"


def table(head: Sequence[str], sections: Sequence[tuple[str, Sequence[Sequence[str]]]]) -> str:
    """Return a table in plain text; a section is (heading, rows of cells, which may end early)."""
    rows = [head, *(cells for _, section_rows in sections for cells in section_rows)]
    widths = [max(len(r[i]) for r in rows if len(r) > i) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = (f"{c:<{w}}" for c, w in zip(cells, widths, strict=False))
        return "  ".join(padded).rstrip()

    lines = [line(head)]
    for heading, section_rows in sections:
        lines += [heading, *map(line, section_rows)]
    return "\n".join(lines)


def _ratio(row: Row) -> str:
    """Return the ratio of a row in words."""
    if row.ratio is None or row.comparator == row.against:
        return "-"
    if row.what == "memory":
        return f"{row.ratio:.2f}x the memory"
    if row.what == "step":
        return f"{row.ratio:.2f}x the time"
    return f"{row.ratio:.2f}x faster" if row.ratio >= 1 else f"{1 / row.ratio:.2f}x slower"


def _cells(row: Row) -> tuple[str, ...]:
    unit = "" if row.unit == "x" else f" {row.unit}"
    word = {None: "not measured", True: "reached", False: "not reached"}[row.reached]
    return (
        f"  {row.comparator}",
        _whole(row.median) + unit,
        _whole(row.best) + unit,
        _whole(row.floor),
        _ratio(row),
        row.against or "-",
        "" if row.target is None else f"{row.target}: {word}",
    )


def text(result: Result) -> str:
    """Return a result in plain text: circumstances, conformance, rows, what was left out."""
    system, rates = result.system, result.rates
    lines = [f"{_machine(system)}, torch {system['versions']['torch']}"]
    if rates:
        lines.append(
            f"measured here: matrix products {rates['gflops']:.0f} GFLOP/s, "
            f"copies {rates['gbytes']:.1f} GB/s, in cache {rates['gbytes_cached']:.0f} GB/s"
        )
    lines += [f"conformance: {check}" for check in result.checks]
    groups = groupby(result.rows, key=lambda row: (row.what, row.case))
    sections = [(", ".join(group), [_cells(row) for row in rows]) for group, rows in groups]
    lines.append(table(_HEAD, sections))
    lines += [f"left out: {name} ({what}): {reason}" for what, name, reason in result.skipped]
    verdicts = [row.reached for row in result.rows if row.reached is not None]
    if verdicts:
        lines.append(f"targets reached: {sum(verdicts)} of {len(verdicts)}")
    return "\n".join(lines)


def _machine(system: dict[str, Any]) -> str:
    cpu = system["devices"][0]
    threads = system["threads"]["torch"]
    name = f"{system['device']} ({cpu['name']}, {cpu['capability']})"
    return f"{name}, {threads} threads, {system['dtype']}"


def panels(result: Result) -> list[Panel]:
    """Return a panel for each measurement and case that has times or sizes."""
    shown = (row for row in result.rows if row.what in _TIMED)
    drawn = []
    for (what, case), group in groupby(shown, key=lambda row: (row.what, row.case)):
        rows = list(group)
        ratios = ["" if _ratio(row) == "-" else f"  ({_ratio(row)})" for row in rows]
        bars = [
            Bar(row.comparator, row.median, f"{_whole(row.median)} {row.unit}{ratio}")
            for row, ratio in zip(rows, ratios, strict=True)
        ]
        floor = next((row.floor for row in rows if row.floor is not None), None)
        dashed = "" if floor is None else f"; dashed: floor {_whole(floor)}"
        title = f"{what}, {case} ({rows[0].unit}, shorter is better{dashed})"
        drawn.append(Panel(title, bars, floor))
    return drawn


def write(result: Result, folder: Path) -> list[Path | str]:
    """Write a result as JSON and plot; return the paths, or why the plot is missing."""
    system = result.system
    stem = f"{system['device'].replace(':', '-')}-{system['dtype']}"
    title = f"gdn_ops {system['versions']['gdn_ops']}, {_machine(system)}"
    written = write_json(result.to_json(), folder / f"{stem}.json")
    return [written, *draw(panels(result), title, folder / f"{stem}.png")]


def publish(result: Result, kind: str, folder: Path | None) -> None:
    """Print a result as text; write its JSON, named after its kind, if there is a folder."""
    print(text(result))
    if folder is not None:
        stem = f"{kind}-{result.system['device']}-{result.system['dtype']}"
        print(write_json(result.to_json(), folder / f"{stem}.json"))


def draw(to_draw: Sequence[Panel], title: str, path: Path) -> list[Path | str]:
    """Draw panels of bars; return the path, nothing if there are none, or why it is missing."""
    if not to_draw:
        return []
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        return [f"no plot: package {error.name!r} is not installed"]
    heights = [0.6 + 0.34 * len(panel.bars) for panel in to_draw]
    figure = Figure(figsize=(8, 0.8 + sum(0.25 + h for h in heights)))
    axes = figure.subplots(len(to_draw), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    names = dict.fromkeys(bar.name for panel in to_draw for bar in panel.bars)
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    colours |= {name: "#adb5bd" for name in names if name.startswith("eager")}
    for axis, panel in zip(axes[:, 0], to_draw, strict=True):
        _draw_panel(axis, panel, colours)
    figure.suptitle(title, fontsize=10)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=120)
    return [path]


def _draw_panel(axis: Any, panel: Panel, colours: dict[str, str]) -> None:
    for i, bar in enumerate(panel.bars):
        colour = colours[bar.name]
        hatched = {"hatch": "////", "fill": False, "edgecolor": colour}
        axis.barh(i, bar.value, height=0.65, **(hatched if bar.published else {"color": colour}))
        axis.text(bar.value, i, f" {bar.text}", va="center", fontsize=8)
    names = [f"{bar.name} (published)" if bar.published else bar.name for bar in panel.bars]
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.4 * max(bar.value for bar in panel.bars))
    if panel.floor is not None:
        axis.axvline(panel.floor, color="black", linewidth=1, linestyle="--")
    axis.set_title(panel.title, fontsize=9, loc="left")
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
