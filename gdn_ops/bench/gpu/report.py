"""Show the result of `bench gpu` as text and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gdn_ops
from gdn_ops.bench.gpu.result import GpuResult, Outcome, reached
from gdn_ops.bench.gpu.rows import PUBLISHED_ON, GpuRow
from gdn_ops.bench.report import Bar, Panel, draw, number
from gdn_ops.terminal.tables import table, wrapped

_HEAD = ("", "kernel ms", "theirs", "wall ms", "host us", "error", "peak MiB", "roofline", "")


def default_folder() -> Path:
    """Return benchmarks/results of this checkout, or the current folder outside of a checkout."""
    root = Path(gdn_ops.__file__).resolve().parents[1]
    results = root / "benchmarks" / "results"
    return results if (root / "pyproject.toml").is_file() and results.is_dir() else Path.cwd()


def line(row: GpuRow, outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes of a row as one line, told while the benchmark runs."""
    parts = []
    for o in outcomes:
        shown = f"{number(o.kernel)} ms" if o.status == "measured" else o.status
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
    if o.launches:
        parts.append(" + ".join(f"{x['name']} {number(x['ms'])}" for x in o.launches))
    return "; ".join([*parts, *filter(None, [o.reason])])


def _published(row: GpuRow, who: str) -> str:
    texts = [
        f"{p.ms:g}" + ("" if p.what == "kernel" else f" {p.what}")
        for p in row.published
        if p.who == who
    ]
    return ", ".join(texts) or "-"


def _cells(row: GpuRow, o: Outcome) -> tuple[str, ...]:
    if o.status != "measured":
        error = number(o.error, 2) if o.status == "wrong" else "-"
        theirs = _published(row, o.contender)
        return (f"  {o.contender}", o.status, theirs, "-", "-", error, "-", "-", _remark(row, o))
    return (
        f"  {o.contender}",
        number(o.kernel),
        _published(row, o.contender),
        number(o.wall),
        number(None if o.host is None else 1e3 * o.host),
        "-" if o.error is None else f"{o.error:.1e} {o.error_of}",
        number(o.peak),
        "-" if o.roofline is None else f"{100 * o.roofline:.0f} %",
        _remark(row, o),
    )


def _sets(outcomes: Sequence[Outcome]) -> str:
    """Return how many sets of operands took turns in a row, where it was more than one."""
    several = next((o for o in outcomes if o.sets > 1 and o.set_mib is not None), None)
    return "" if several is None else f", {several.sets} sets of {number(several.set_mib)} MiB"


def _clocks(result: GpuResult) -> list[str]:
    """Return a line of the card's clocks and power limit, as far as they are known."""
    card = result.system.get("card") or {}
    told = {
        "SM clock at most": (card.get("most_sm_mhz"), "MHz"),
        "memory clock at most": (card.get("most_memory_mhz"), "MHz"),
        "power limit": (card.get("power_limit_w"), "W"),
    }
    parts = [f"{what} {x:g} {unit}" for what, (x, unit) in told.items() if x is not None]
    during = [o.sm_mhz for _, outcomes in result.rows for o in outcomes if o.sm_mhz is not None]
    if during:
        parts.append(f"SM clock after rows {min(during):g} to {max(during):g} MHz")
    return [", ".join(parts)] if parts else []


def text(result: GpuResult) -> str:
    """Return the whole result as a table in plain text."""
    s = result.system
    lines = [f"{s['device']}, driver {s['driver']}, torch {s['versions']['torch']}, {s['date']}"]
    lines += _clocks(result)
    lines += [f"conformance of {c}" for c in result.conformance]
    lines += [f"left out: {name}: {reason}" for name, reason in result.left_out]
    lines = [wrapped(line, indent="  ") for line in lines]
    if not result.rows:
        return "\n".join([*lines, "nothing was timed"])
    sections = []
    for row, outcomes in result.rows:
        cells = [_cells(row, o) for o in outcomes]
        named = {o.contender for o in outcomes}
        others = dict.fromkeys(p.who for p in row.published if p.who not in named)
        cells += [(f"  {who}", "-", _published(row, who)) for who in others]
        sections.append((f"{row.name}{_sets(outcomes)}", cells))
    lines.append(table(_HEAD, sections))
    goals = [reached(g, o) for row, os in result.rows for o in os for g in row.goals
             if g.backend == o.contender]  # fmt: skip
    lines.append(wrapped(f"theirs: published, not measured here ({PUBLISHED_ON})", indent="  "))
    lines.append(f"goals reached: {goals.count(True)} of {len(goals)}, "
                 f"not measured: {goals.count(None)}")  # fmt: skip
    return "\n".join(lines)


def write(result: GpuResult, folder: Path, plot: Path | None = None) -> list[Path | str]:
    """Write the result as JSON and plot, into the folder if no file is named for it.

    Returns:
        The paths, or why the plot is missing.
    """
    s = result.system
    title = (
        f"gdn_ops {s['versions']['gdn_ops']}, {s['device']}, kernel time, {s['date']}\n"
        "hatched: published by others, not measured here"
    )
    panels_of_rows = [_panel(row, outcomes) for row, outcomes in result.rows]
    panels = [panel for panel in panels_of_rows if panel.bars]
    return [result.write_json(folder), *draw(panels, title, plot or folder / f"{result.stem}.png")]


def _panel(row: GpuRow, outcomes: Sequence[Outcome]) -> Panel:
    """Return the kernel times of a row; what others published is marked."""
    bars = [Bar(o.contender, o.kernel, number(o.kernel)) for o in outcomes if o.kernel is not None]
    theirs = [p for p in row.published if p.what == "kernel"]
    bars += [Bar(p.who, p.ms, number(p.ms), published=True) for p in theirs]
    return Panel(row.name, bars, "kernel time in ms, shorter is better")
