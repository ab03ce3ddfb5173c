"""Draw the plots of the examples, and measured points beside their closed forms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLOURS = {
    "linear": "#7f7f7f",
    "gated": "#e69f00",
    "delta": "#0072b2",
    "gated_delta": "#009e73",
}
"""One per rule of the family; they differ in lightness too."""

NAMES = {
    "linear": "linear (no gate, no delta)",
    "gated": "gated (decay only)",
    "delta": "delta (no decay)",
    "gated_delta": "gated delta",
}


def panels(columns: int, width: float = 3.6, height: float = 3.2) -> tuple[Any, list[Any]]:
    """Return a figure with panels side by side; no display is needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def titled(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)


def save(figure: Any, path: Path) -> None:
    """Write a PNG without the date, so that equal plots are equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


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
        where, measured = [p.x for p in line], [p.measured for p in line]
        form = [p.measured if p.expected is None else p.expected for p in line]
        # Thinner and thinner, so that a line below another is seen.
        thin = 1 / len(seen) ** 0.5
        axis.plot(where, form, style, color=COLOURS[rule], linewidth=3 * thin, label=label)
        errors = [2 * p.error for p in line]
        axis.errorbar(where, measured, errors, fmt="o", ms=7 * thin, lw=1, color=COLOURS[rule])
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
