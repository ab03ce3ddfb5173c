"""Show an ablation table as plain text and as Markdown, from its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdn_ops.terminal.tables import table, wrapped

Data = Mapping[str, Any]
"""Hold what `run.measure` returns, or a file that it was written to."""


def text(data: Data) -> str:
    """Return a table in plain text that fits the terminal."""
    system, tasks = data["system"], data["tasks"]
    seeds, steps = data["settings"]["seeds"], data["settings"]["steps"]
    lines = [
        f"{system['devices'][0]['name']}, {system['backend']}, torch "
        f"{system['versions']['torch']}; {_count(system['processes'], 'process')}, "
        f"{data['seconds']:.0f} s",
        f"{_count(steps, 'step')}, {_count(seeds, 'seed')}: mean (lowest-highest), in % right"
        " or bits per byte (fewer are better)",
    ]
    head = ("row", *(task["name"] for task in tasks))
    rows = [
        (row["name"], *(_cell(cell, tasks, "-") for cell in _cells(data, row["name"])))
        for row in data["rows"]
    ]
    rows.append(("chance", *(_number(task["chance"], task["unit"]) for task in tasks)))
    body = table(head, [("", rows)])
    if data["cells"] and data["cells"][0]["worse"] is not None and seeds > 1:
        lines += [f"+ or -: better or worse than full with every one of the {seeds} seeds"]
    left_out = [f"absent: {x['what']}: {x['reason']}" for x in data["absent"]]
    return "\n".join([*(wrapped(x, indent="  ") for x in lines), body, *map(wrapped, left_out)])


def markdown(data: Data) -> str:
    """Return a table in Markdown, with the figures of the paper in its last two columns."""
    tasks = data["tasks"]
    head = ["row", "what differs", "parameters", *(_heading(task) for task in tasks)]
    head += ["paper: perplexity", "paper: accuracy, %"]
    lines = [_line(head), "|---" * len(head) + "|"]
    for row in data["rows"]:
        cells = [_cell(cell, tasks, "–") for cell in _cells(data, row["name"])]
        paper = row["paper"]
        figures = ["", ""] if paper is None else [f"{x:.2f}" for x in paper.values()]
        parameters = f"{row['parameters']:,}"
        lines.append(_line([f"`{row['name']}`", row["differs"], parameters, *cells, *figures]))
    by_chance = [_number(task["chance"], task["unit"]) for task in tasks]
    lines.append(_line(["chance", "", "", *by_chance, "", ""]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _count(number: int, noun: str) -> str:
    plural = {"process": "processes"}.get(noun, f"{noun}s")
    return f"{number} {noun if number == 1 else plural}"


def _heading(task: Mapping[str, Any]) -> str:
    return f"{task['name']}, {'%' if task['unit'] == 'share' else 'bits per byte'}"


def _cells(data: Data, row: str) -> list[Mapping[str, Any]]:
    return [cell for cell in data["cells"] if cell["row"] == row]


def _cell(cell: Mapping[str, Any], tasks: list[Mapping[str, Any]], dash: str) -> str:
    """Return mean and range of a cell, with a sign where every seed differs from full alike."""
    if cell["mean"] is None:
        return "diverged"
    unit = next(task["unit"] for task in tasks if task["name"] == cell["task"])
    mean, low, high = (_number(cell[x], unit) for x in ("mean", "lowest", "highest"))
    seeds = len(cell["values"])
    shown = mean if seeds == 1 else f"{mean} ({low}{dash}{high})"
    sign = " +" if cell["better"] == seeds else " -" if cell["worse"] == seeds else ""
    shown += sign if seeds > 1 else ""
    return shown if not cell["diverged"] else f"{shown}, {cell['diverged']} diverged"


def _number(value: float, unit: str) -> str:
    return f"{100 * value:.0f}" if unit == "share" else f"{value:.2f}"
