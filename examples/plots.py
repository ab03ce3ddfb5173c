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


MARKERS = "osD^v"
STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
"""Of the first, second, ... line of a panel, so that they differ in print too."""

APART = (3.0, 0.8)
"""Points by which each line is moved to the right and up: equal values are seen beside another."""

FARTHEST = 0.15
"""Share of an axis by which a name may stand away from the end of its line."""


def moved(axis: Any, i: int, count: int) -> Any:
    """Return the transform of line i of some: its data, moved by a little that is no value."""
    from matplotlib.transforms import ScaledTranslation

    right, up = ((i - (count - 1) / 2) * points / 72 for points in APART)
    return axis.transData + ScaledTranslation(right, up, axis.figure.dpi_scale_trans)


def fit_width(axis: Any, values: list[float]) -> None:
    """Set the limits of x, which lines that are moved do not set, and a tick at each value."""
    low, high = min(values), max(values)
    if axis.get_xscale() == "log":
        axis.set_xlim(low / (high / low) ** 0.06, high * (high / low) ** 0.06)
    else:
        axis.set_xlim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    axis.set_xticks(sorted(set(values)), [f"{x:g}" for x in sorted(set(values))])


def name_ends(axis: Any, ends: dict[str, tuple[str, float]]) -> None:
    """Write the names of lines beside their right ends, at heights where none hides another.

    Where too many lines end at one height, they stand in a legend, the uppermost first.

    Args:
        axis: whose limits and scales are final; its lines have these names as labels.
        ends: by name, the colour and the last value.
    """
    low, high = axis.get_ylim()
    heights = {name: (y - low) / (high - low) for name, (_, y) in ends.items()}
    order = sorted(heights, key=heights.__getitem__)
    gap = 0.042
    need = [gap * (1 + name.count("\n")) for name in order]
    places: list[float] = []
    for i, name in enumerate(order):
        least = places[-1] + (need[i - 1] + need[i]) if places else 0.0
        places.append(max(heights[name], least))
    # Move labels past the upper edge down, and those below them with them.
    most = 1.0
    for i in reversed(range(len(order))):
        places[i] = min(places[i], most)
        most = places[i] - (need[i] + need[i - 1])
    if max(abs(heights[n] - y) for n, y in zip(order, places, strict=True)) > FARTHEST:
        handles, names = axis.get_legend_handles_labels()
        by_name = dict(zip(names, handles, strict=True))
        shown = order[::-1]
        axis.legend(
            [by_name[n] for n in shown],
            shown,
            fontsize=7,
            frameon=False,
            loc="center left",
            bbox_to_anchor=(1.02, 0.5),
            handlelength=3.2,
        )
        return
    for name, place in zip(order, places, strict=True):
        colour = ends[name][0]
        axis.annotate(
            name,
            (1.0, heights[name]),
            (1.06, place),
            xycoords="axes fraction",
            fontsize=7,
            color=colour,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6},
            annotation_clip=False,
        )


def draw(
    axis: Any, points: list[Point], law: str, title: str, x: str, y: str, *, is_log: bool
) -> dict[str, tuple[str, float]]:
    """Draw the closed forms as lines and what was measured as marks with two standard errors.

    Returns:
        What `name_ends` writes beside the lines.
    """
    lines: dict[str, list[Point]] = {}
    for p in points:
        if p.law == law:
            lines.setdefault(p.line, []).append(p)
    ends: dict[str, tuple[str, float]] = {}
    for i, (label, line) in enumerate(lines.items()):
        colour, place = COLOURS[line[0].rule], moved(axis, i, len(lines))
        where, measured = [p.x for p in line], [p.measured for p in line]
        form = [p.measured if p.expected is None else p.expected for p in line]
        name = label.replace(", ", ",\n", 1)
        axis.plot(where, form, linestyle=STYLES[i], color=colour, lw=1.4, transform=place)
        axis.errorbar(
            where,
            measured,
            [2 * p.error for p in line],
            fmt=MARKERS[i],
            ms=4.5,
            lw=1,
            color=colour,
            mfc="white",
            transform=place,
        )
        # For a legend: the line with its mark.
        style = {"linestyle": STYLES[i], "marker": MARKERS[i], "ms": 4.5, "mfc": "white"}
        axis.plot([], [], color=colour, lw=1.4, label=name, **style)
        ends[name] = colour, form[-1]
    values = [v for line in lines.values() for p in line for v in (p.measured, p.expected or 0.0)]
    low, high = min(0.0, *values), max(values)
    # A line that is moved counts for no limit.
    axis.set_ylim(low - 0.05 * (high - low), high + 0.07 * (high - low))
    if is_log:
        axis.set_xscale("log", base=2)
    fit_width(axis, [p.x for line in lines.values() for p in line])
    titled(axis, title, x, y)
    return ends


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
