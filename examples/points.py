"""Measured points beside their closed forms, as a plot and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from plots import COLOURS, titled


@dataclass(frozen=True)
class Point:
    """A measured mean with its closed form.

    Attributes:
        law: the panel it belongs to.
        line: the label of its line.
        rule: of the family, for the colour.
        x: abscissa.
        measured: mean over the memories.
        error: standard error of that mean.
        expected: the closed form, or None where there is none.
    """

    law: str
    line: str
    rule: str
    x: float
    measured: float
    error: float
    expected: float | None


def draw(axis: Any, points: list[Point], law: str, title: str, x: str, y: str) -> None:
    """Draw the closed forms as lines and what was measured as marks with two standard errors."""
    lines: dict[str, list[Point]] = {}
    for p in points:
        if p.law == law:
            lines.setdefault(p.line, []).append(p)
    seen: list[str] = []
    for label, line in lines.items():
        rule = line[0].rule
        # The second line of a rule is dashed, the third dotted.
        style = ("-", "--", ":")[seen.count(rule)]
        seen.append(rule)
        where, found = [p.x for p in line], [p.measured for p in line]
        form = [p.measured if p.expected is None else p.expected for p in line]
        # Thinner and thinner, so that a line below another is seen.
        thin = 1 / len(seen) ** 0.5
        axis.plot(where, form, style, color=COLOURS[rule], linewidth=3 * thin, label=label)
        errors = [2 * p.error for p in line]
        axis.errorbar(where, found, errors, fmt="o", ms=7 * thin, lw=1, color=COLOURS[rule])
    axis.set_xticks(sorted({p.x for line in lines.values() for p in line}))
    titled(axis, title, x, y)


def table(points: list[Point], law: str) -> str:
    """Return a law in Markdown: measured and, where there is one, the closed form."""
    rows = [p for p in points if p.law == law]
    columns = sorted({p.x for p in rows})
    head = " | ".join(f"{x:g}" for x in columns)
    lines = [f"| {law} | {head} |", "|---" * (len(columns) + 1) + "|"]
    for label in dict.fromkeys(p.line for p in rows):
        at = {p.x: p for p in rows if p.line == label}
        cells = []
        for x in columns:
            p = at.get(x)
            form = "" if p is None or p.expected is None else f" ({p.expected:.3f})"
            cells.append("–" if p is None else f"{p.measured:.3f}{form}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
