"""What the plots of the examples have in common: colours of the rules, size, file."""

from __future__ import annotations

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
