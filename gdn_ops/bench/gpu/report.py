"""Show the result of `bench gpu` as text and as a plot; only the plot needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gdn_ops
from gdn_ops.bench.gpu.result import GpuResult, Outcome, reached
from gdn_ops.bench.gpu.rows import PUBLISHED_ON, GpuRow

_HEAD = ("", "kernel ms", "theirs", "wall ms", "host us", "error", "peak MiB", "roofline", "")
_COLOURS = ("#4c6ef5", "#12b886", "#f59f00", "#e64980", "#868e96", "#7950f2", "#228be6")


def default_folder() -> Path:
    """Return benchmarks/results of this checkout, or the current folder outside of a checkout."""
    root = Path(gdn_ops.__file__).resolve().parents[1]
    results = root / "benchmarks" / "results"
    return results if (root / "pyproject.toml").is_file() and results.is_dir() else Path.cwd()


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def line(row: GpuRow, outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes of a row as one line, told while the benchmark runs."""
    parts = []
    for o in outcomes:
        shown = f"{_number(o.kernel)} ms" if o.status == "measured" else o.status
        parts.append(f"{o.contender} {shown}")
    return f"{row.name}: {', '.join(parts)}"


def _remark(row: GpuRow, o: Outcome) -> str:
    """Return the remark on an outcome: its goals, reached or missed, and its reason."""
    parts = []
    for goal in row.goals:
        if goal.backend == o.contender:
            verdict = reached(goal, o)
            word = {None: "not measured", True: "reached", False: "missed"}[verdict]
            unit = "" if goal.what == "error" else " ms"
            parts.append(f"goal {goal.what} <= {goal.at_most:g}{unit}: {word}")
    if o.kernel_by == "events":
        parts.append("with launches")
    return "; ".join([*parts, *filter(None, [o.reason])])


def _published(row: GpuRow, who: str) -> str:
    found = [
        f"{p.ms:g}" + ("" if p.what == "kernel" else f" {p.what}")
        for p in row.published
        if p.who == who
    ]
    return ", ".join(found) or "-"


def _cells(row: GpuRow, o: Outcome) -> tuple[str, ...]:
    if o.status != "measured":
        error = _number(o.error, 2) if o.status == "wrong" else "-"
        theirs = _published(row, o.contender)
        return (f"  {o.contender}", o.status, theirs, "-", "-", error, "-", "-", _remark(row, o))
    return (
        f"  {o.contender}",
        _number(o.kernel),
        _published(row, o.contender),
        _number(o.wall),
        _number(None if o.host is None else 1e3 * o.host),
        "-" if o.error is None else f"{o.error:.1e} {o.error_of}",
        _number(o.peak),
        "-" if o.roofline is None else f"{100 * o.roofline:.0f} %",
        _remark(row, o),
    )


def text(result: GpuResult) -> str:
    """Return the whole result as a table in plain text."""
    s = result.system
    lines = [f"{s['device']}, driver {s['driver']}, torch {s['versions']['torch']}, {s['date']}"]
    lines += [f"conformance of {c}" for c in result.conformance]
    lines += [f"left out: {name}: {reason}" for name, reason in result.left_out]
    if not result.rows:
        return "\n".join([*lines, "nothing was timed"])
    table: list[tuple[str, ...]] = [_HEAD]
    for row, outcomes in result.rows:
        table.append((row.name,))
        table += [_cells(row, o) for o in outcomes]
        named = {o.contender for o in outcomes}
        others = dict.fromkeys(p.who for p in row.published if p.who not in named)
        table += [(f"  {who}", "-", _published(row, who)) for who in others]
    widths = [max(len(r[i]) for r in table if len(r) > max(i, 1)) for i in range(len(_HEAD))]
    for cells in table:
        pairs = zip(cells, widths, strict=False)
        lines.append("  ".join(f"{c:<{w}}" if len(cells) > 1 else c for c, w in pairs).rstrip())
    goals = [reached(g, o) for row, os in result.rows for o in os for g in row.goals
             if g.backend == o.contender]  # fmt: skip
    lines.append(f"theirs: published, not measured here ({PUBLISHED_ON})")
    lines.append(f"goals reached: {goals.count(True)} of {len(goals)}, "
                 f"not measured: {goals.count(None)}")  # fmt: skip
    return "\n".join(lines)


def write(result: GpuResult, folder: Path) -> list[Path | str]:
    """Write the result as JSON and plot; return the paths, or why the plot is missing."""
    written: list[Path | str] = [result.write_json(folder)]
    try:
        found = _plot(result, folder / f"{result.stem}.png")
    except ModuleNotFoundError as error:
        return [*written, f"no plot: package {error.name!r} is not installed"]
    return [*written, found] if found is not None else written


def _plot(result: GpuResult, path: Path) -> Path | None:
    """Draw kernel times, a panel per row; times that others published are hatched."""
    from matplotlib.figure import Figure

    panels = [(row, _bars(row, outcomes)) for row, outcomes in result.rows]
    panels = [(row, bars) for row, bars in panels if bars]
    if not panels:
        return None
    heights = [0.7 + 0.3 * len(bars) for _, bars in panels]
    figure = Figure(figsize=(8, 0.8 + sum(0.3 + h for h in heights)))
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    names = list(dict.fromkeys(name for _, bars in panels for name, _, _ in bars))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    for axis, (row, bars) in zip(axes[:, 0], panels, strict=True):
        _panel(axis, row, bars, colours)
    s = result.system
    title = f"gdn_ops {s['versions']['gdn_ops']}, {s['device']}, kernel time, {s['date']}"
    figure.suptitle(f"{title}\nhatched: published by others, not measured here", fontsize=10)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110)
    return path


def _bars(row: GpuRow, outcomes: Sequence[Outcome]) -> list[tuple[str, float, bool]]:
    """Return a row's bars: (name, milliseconds, whether published and not measured)."""
    bars = [(o.contender, o.kernel, False) for o in outcomes if o.kernel is not None]
    return [*bars, *((p.who, p.ms, True) for p in row.published if p.what == "kernel")]


def _panel(
    axis: Any, row: GpuRow, bars: Sequence[tuple[str, float, bool]], colours: dict[str, str]
) -> None:
    for i, (name, ms, theirs) in enumerate(bars):
        style = {"hatch": "////", "fill": False, "edgecolor": colours[name]} if theirs else {}
        axis.barh(i, ms, height=0.65, **({"color": colours[name]} | style))
        axis.text(ms, i, f" {_number(ms)}", va="center", fontsize=8)
    axis.set_yticks(range(len(bars)), [f"{n} (published)" if t else n for n, _, t in bars])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.2 * max(ms for _, ms, _ in bars))
    axis.set_title(f"{row.name} (ms, shorter is better)", fontsize=9, loc="left")
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
