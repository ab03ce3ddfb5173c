"""Show a benchmark's result as a table and as a plot; only the plot needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from gdn_ops.bench.rows import PACKED, TIME_RATIOS, Result, Row, write_json
from gdn_ops.environment.files import whole
from gdn_ops.terminal.tables import table, wrapped

Log = Callable[[str], None]

_COLOURS = ("#4c6ef5", "#12b886", "#f59f00", "#e64980", "#868e96", "#7950f2", "#228be6")
_HEAD = ("", "median", "best", "ratio", "against", "target")
_TIMED = ("forward", "forward+backward", "memory", "step", *PACKED.values(), "decode", "prefill",
          "training step")  # fmt: skip

Group = tuple[str, str, str]
"""Identify the rows of one table or panel: measurement, case and dtype."""


def _group(row: Row) -> Group:
    return row.what, row.case, row.dtype


@dataclass(frozen=True)
class Bar:
    """Hold one bar of a plot, with a text at its end; equal names have one colour."""

    name: str
    value: float
    text: str
    published: bool = False


@dataclass(frozen=True)
class Panel:
    """Hold one panel of a plot: title, bars, what its axis shows, and a floor as a line."""

    title: str
    bars: Sequence[Bar]
    axis: str
    floor: float | None = None
    floor_text: str = ""


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits; a dash for None."""
    return "-" if value is None else f"{value:.{digits}g}"


def _whole(value: float | None) -> str:
    """Return a number with three significant digits, and all of them before the point."""
    return number(value) if value is None or abs(value) < 100 else f"{value:.0f}"


def _ratio(row: Row) -> str:
    """Return the ratio of a row in words."""
    if row.ratio is None or row.comparator == row.against:
        return "-"
    if row.what == "memory":
        return f"{row.ratio:.2f}x memory"
    if row.what in TIME_RATIOS:
        return f"{row.ratio:.2f}x time"
    return f"{row.ratio:.2f}x faster" if row.ratio >= 1 else f"{1 / row.ratio:.2f}x slower"


def _cells(row: Row, is_again: bool) -> tuple[str, ...]:
    """Return the cells of a row; of one that is compared once more, without its times."""
    unit = "x" if row.unit == "x" else ""
    word = {None: "not measured", True: "reached", False: "not reached"}[row.reached]
    return (
        "" if is_again else f"  {row.comparator}",
        "" if is_again else _whole(row.median) + unit,
        "" if is_again else _whole(row.best) + unit,
        _ratio(row),
        row.against or "-",
        "" if row.target is None else f"{row.target}: {word}",
    )


def _heading(rows: Sequence[Row]) -> str:
    """Return what rows of a case measure, in which unit, and their floor."""
    unit = rows[0].unit
    name = _name(_group(rows[0]))
    parts = [name if unit == "x" else f"{name}, in {unit}"]
    floor = next((row.floor for row in rows if row.floor is not None), None)
    if floor is not None:
        parts.append(f"floor {_whole(floor)}")
    return "; ".join(parts)


def _name(group: Group) -> str:
    """Return what rows have in common, in words."""
    return ", ".join(word for word in group if word not in ("", "-"))


def text(result: Result) -> str:
    """Return a result in plain text: circumstances, conformance, rows, what was left out."""
    system, rates = result.system, result.rates
    lines = [f"{_machine(system)}, torch {system['versions']['torch']}"]
    lines += [_rates(dtype, of_dtype) for dtype, of_dtype in rates.items()]
    lines += [f"conformance: {check}" for check in result.checks]
    sections = []
    for _, group in groupby(result.rows, key=_group):
        rows = list(group)
        before = [None, *rows[:-1]]
        cells = [
            _cells(row, other is not None and other.comparator == row.comparator)
            for row, other in zip(rows, before, strict=True)
        ]
        sections.append((_heading(rows), cells))
    lines = [wrapped(line, indent="  ") for line in lines]
    if sections:
        lines.append(table(_HEAD, sections))
    left_out = (f"left out: {name} ({what}): {reason}" for what, name, reason in result.skipped)
    lines += [wrapped(line, indent="  ") for line in left_out]
    verdicts = [row.reached for row in result.rows if row.reached is not None]
    if verdicts:
        lines.append(f"targets reached: {sum(verdicts)} of {len(verdicts)}")
    return "\n".join(lines)


def _rates(dtype: str, rates: Mapping[str, float | None]) -> str:
    """Return the rates of a machine in one line."""
    registers = rates["gflops_registers"]
    most = "" if registers is None else f"multiply-adds {registers:.0f} GFLOP/s, "
    return (
        f"measured here in {dtype}: {most}matrix products {rates['gflops']:.0f} GFLOP/s, "
        f"copies {rates['gbytes']:.1f} GB/s, in cache {rates['gbytes_cached']:.0f} GB/s"
    )


def _machine(system: dict[str, Any]) -> str:
    cpu = system["devices"][0]
    threads = system["threads"]["torch"]
    name = f"{system['device']} ({cpu['name']}, {cpu['capability']})"
    return f"{name}, {threads} {'thread' if threads == 1 else 'threads'}, {system['dtype']}"


def panels(result: Result) -> list[Panel]:
    """Return a panel for each measurement and case that has times or sizes."""
    # Differences and ratios of bars are no bars.
    times = (row for row in result.rows if row.what in _TIMED and row.unit != "x")
    shown = (row for row in times if row.what != "decode" or row.ratio is not None)
    drawn = []
    for key, group in groupby(shown, key=_group):
        # A time that is compared with several others has one bar.
        rows = list({row.comparator: row for row in reversed(list(group))}.values())[::-1]
        what, unit = rows[0].what, rows[0].unit
        bars = [
            Bar(r.comparator, r.median, f"{_whole(r.median)} {unit}{_against(r)}") for r in rows
        ]
        floor = next((row.floor for row in rows if row.floor is not None), None)
        shows = "peak memory" if what == "memory" else "median time"
        text = "" if floor is None else f"floor {_whole(floor)} {unit}"
        axis = f"{shows} in {unit}, shorter is better"
        drawn.append(Panel(_name(key), bars, axis, floor, text))
    return drawn


def _against(row: Row) -> str:
    """Return the ratio of a row and what it is a ratio to, for the end of a bar."""
    ratio = _ratio(row)
    link = "of" if row.what in ("memory", *TIME_RATIOS) else "than"
    return "" if ratio == "-" else f"  ({ratio} {link} {row.against})"


def write(result: Result, folder: Path, kind: str = "") -> list[Path | str]:
    """Write a result as JSON and plot, named after its kind if it has one.

    Returns:
        The paths, or why the plot is missing.
    """
    system = result.system
    to_write, plot = files(folder, system["device"], system["dtype"], kind)
    return [write_json(result.to_json(), to_write), *write_plot(result, plot)]


def files(folder: Path, device: str, dtype: str, kind: str = "") -> tuple[Path, Path]:
    """Return the files that `write` writes into a folder: JSON and plot."""
    stem = f"{device}-{dtype}".replace(":", "-").replace(",", "-")
    stem = f"{kind}-{stem}" if kind else stem
    return folder / f"{stem}.json", folder / f"{stem}.png"


def write_plot(result: Result, path: Path) -> list[Path | str]:
    """Draw a result into a file; return its path, or why the plot is missing."""
    system = result.system
    return draw(
        panels(result), f"gdn_ops {system['versions']['gdn_ops']}, {_machine(system)}", path
    )


def draw(to_draw: Sequence[Panel], title: str, path: Path) -> list[Path | str]:
    """Draw panels of bars; return the path, nothing if there are none, or why it is missing."""
    if not to_draw:
        return []
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        return [f"no plot: package {error.name!r} is not installed"]
    heights = [0.6 + 0.34 * len(panel.bars) for panel in to_draw]
    figure = Figure(figsize=(9, 0.8 + sum(0.55 + h for h in heights)))
    axes = figure.subplots(len(to_draw), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    names = dict.fromkeys(bar.name for panel in to_draw for bar in panel.bars)
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    colours |= {name: "#adb5bd" for name in names if name.startswith("eager")}
    for axis, panel in zip(axes[:, 0], to_draw, strict=True):
        _draw_panel(axis, panel, colours)
    figure.suptitle(title, fontsize=10)
    figure.set_layout_engine("constrained")
    with whole(path) as file:
        figure.savefig(file, dpi=120)
    return [path]


def _draw_panel(axis: Any, panel: Panel, colours: dict[str, str]) -> None:
    for i, bar in enumerate(panel.bars):
        colour = colours[bar.name]
        hatched = {"hatch": "////", "fill": False, "edgecolor": colour}
        axis.barh(i, bar.value, height=0.65, **(hatched if bar.published else {"color": colour}))
        axis.text(bar.value, i, f" {bar.text}", va="center", fontsize=8)
    names = [f"{bar.name} (published)" if bar.published else bar.name for bar in panel.bars]
    axis.set_yticks(range(len(names)), names)
    axis.set_xlim(0, 1.7 * max(bar.value for bar in panel.bars))
    if panel.floor is not None:
        axis.axvline(panel.floor, color="black", linewidth=1, linestyle="--")
        axis.text(panel.floor, -0.55, f" {panel.floor_text}", fontsize=7, va="bottom")
    axis.set_ylim(len(names) - 0.5, -1.1 if panel.floor is not None else -0.6)
    axis.set_title(panel.title, fontsize=9, loc="left")
    axis.set_xlabel(panel.axis, fontsize=8)
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
