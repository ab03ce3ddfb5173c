"""Show a benchmark result as a table, as JSON and as a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gdn_ops.bench.rows import Result, Row

_COLOURS = ("#4c6ef5", "#12b886", "#f59f00", "#e64980", "#868e96", "#7950f2", "#228be6")
_TIMED = ("forward", "forward+backward", "memory", "step")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _ratio(row: Row) -> str:
    """Return the ratio of a row in words."""
    if row.ratio is None or row.comparator == row.against:
        return "-"
    if row.what == "memory":
        return f"{row.ratio:.2f}x the memory"
    if row.what == "step":
        return f"{row.ratio:.2f}x the time"
    return f"{row.ratio:.2f}x faster" if row.ratio >= 1 else f"{1 / row.ratio:.2f}x slower"


def _verdict(row: Row) -> str:
    if row.target is None:
        return ""
    if row.reached is None:
        return f"{row.target}: not measured"
    colour, word = ("green", "reached") if row.reached else ("red", "not reached")
    return f"{row.target}: [{colour}]{word}[/{colour}]"


def table(result: Result) -> Table:
    """Return the rows of a result as a table, a section per measurement and case."""
    found = Table("what", "case", "comparator", "median", "best", "floor", title="gdn-ops bench")
    for name in ("ratio", "against", "target"):
        found.add_column(name)
    previous: tuple[str, str] | None = None
    for row in result.rows:
        group = (row.what, row.case)
        if previous not in (None, group):
            found.add_section()
        head = group if group != previous else ("", "")
        previous = group
        unit = "" if row.unit == "x" else f" {row.unit}"
        cells = (
            *head,
            row.comparator,
            _number(row.median) + unit,
            _number(row.best) + unit,
            _number(row.floor),
        )
        found.add_row(*map(escape, cells), _ratio(row), escape(row.against or "-"), _verdict(row))
    return found


def show(result: Result, console: Console) -> None:
    """Print the result: circumstances, conformance, rows, comparators left out."""
    system = result.system
    cpu = system["devices"][0]
    console.print(
        f"{system['device']} ({cpu['name']}, {cpu['capability']}), {system['threads']['torch']} "
        f"threads, {system['dtype']}, torch {system['versions']['torch']}"
    )
    if result.rates:
        rates = result.rates
        console.print(
            f"measured here: matrix products {rates['gflops']:.0f} GFLOP/s, "
            f"copies {rates['gbytes']:.1f} GB/s, in cache {rates['gbytes_cached']:.0f} GB/s"
        )
    for check in result.checks:
        console.print(f"conformance: {check}")
    console.print(table(result))
    for what, name, reason in result.skipped:
        console.print(f"left out: {escape(name)} ({escape(what)}): {escape(reason)}")
    judged = [row for row in result.rows if row.reached is not None]
    if judged:
        console.print(f"targets reached: {sum(bool(r.reached) for r in judged)} of {len(judged)}")


def write_json(result: Result, path: Path) -> None:
    """Write the result to a JSON file."""
    path.write_text(json.dumps(result.to_json(), indent=2) + "\n")


def write_plot(result: Result, path: Path) -> None:
    """Draw bars of medians, a panel per measurement and case, the floor as a line.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], list[Row]] = {}
    for row in result.rows:
        if row.what in _TIMED:
            panels.setdefault((row.what, row.case), []).append(row)
    if not panels:
        return
    figure = Figure(figsize=(8, 0.8 + sum(0.85 + 0.34 * len(r) for r in panels.values())))
    heights = [0.6 + 0.34 * len(rows) for rows in panels.values()]
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    names = list(dict.fromkeys(row.comparator for rows in panels.values() for row in rows))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    colours |= {name: "#adb5bd" for name in names if name.startswith("eager")}
    for axis, ((what, case), rows) in zip(axes[:, 0], panels.items(), strict=True):
        _panel(axis, what, case, rows, colours)
    system = result.system
    cpu = system["devices"][0]["name"]
    title = f"{system['device']} ({cpu}), {system['threads']['torch']} threads, {system['dtype']}"
    figure.suptitle(f"gdn_ops {system['versions']['gdn_ops']}, {title}", fontsize=10)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=120)


def _panel(axis: Any, what: str, case: str, rows: list[Row], colours: dict[str, str]) -> None:
    """Draw one panel: a bar per comparator, its number and ratio at the end."""
    names = [row.comparator for row in rows]
    values = [row.median for row in rows]
    axis.barh(names, values, color=[colours[name] for name in names], height=0.65)
    axis.invert_yaxis()
    axis.set_xlim(0, max(values) * 1.4)
    for i, row in enumerate(rows):
        ratio = "" if _ratio(row) == "-" else f"  ({_ratio(row)})"
        label = f" {_number(row.median)} {row.unit}{ratio}"
        axis.text(row.median, i, label, va="center", fontsize=8)
    floors = [row.floor for row in rows if row.floor is not None]
    title = f"{what}, {case} ({rows[0].unit}, shorter is better"
    if floors:
        axis.axvline(floors[0], color="black", linewidth=1, linestyle="--")
        title += f"; dashed: floor {_number(floors[0])}"
    axis.set_title(title + ")", fontsize=9, loc="left")
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def write(result: Result, folder: Path) -> list[Path | str]:
    """Write the result as JSON and plot; return the paths, or why the plot is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{result.system['device'].replace(':', '-')}-{result.system['dtype']}"
    written: list[Path | str] = [folder / f"{stem}.json"]
    write_json(result, folder / f"{stem}.json")
    try:
        write_plot(result, folder / f"{stem}.png")
        written.append(folder / f"{stem}.png")
    except ModuleNotFoundError as error:
        written.append(f"no plot: package {error.name!r} is not installed")
    return written
