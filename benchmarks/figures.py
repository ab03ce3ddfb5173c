"""Draw docs/img/speed.png from the results in results/: `python benchmarks/figures.py`.

What is drawn is the median of each contender in `peers-cpu.json` where that has been measured, and
until then in `cpu-float32.json` and `decode-cpu-float32.json`. The shortest bar is the fastest;
peers are named, whoever wins.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "img" / "speed.png"
OURS, THEIRS = "#009e73", "#7f7f7f"

Panels = dict[str, dict[str, float]]


def read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return result


def panels() -> Panels:
    """Return milliseconds by contender, for each panel."""
    if (RESULTS / "peers-cpu.json").exists():
        measured: Panels = {}
        for row in read("peers-cpu.json")["rows"]:
            if "median" in row:
                measured.setdefault(row["case"], {})[row["who"]] = row["median"]
        return measured
    forward = {
        ours(row["comparator"]): row["median"]
        for row in read("cpu-float32.json")["rows"]
        if row["what"] == "forward" and row["case"] == "qwen-16-32-2048"
    }
    names = {"ort in place, bare": "onnxruntime", "torch in place": "torch"}
    step = {
        ours(names[row["comparator"]]): row["median"] / 1e3
        for row in read("decode-cpu-float32.json")["rows"]
        if row["case"] == "2 MiB, B=1 H=32" and row["comparator"] in names
    }
    return {"forward, T=2048, 2 threads": forward, "one token, 1 thread": step}


def ours(name: str) -> str:
    return f"gdn_ops {name}" if name in ("cpp", "torch", "compile") else name


def draw(data: Panels) -> Figure:
    """Return bars, a panel per case, the fastest at the top, each with its number."""
    figure = Figure(figsize=(3.6 * len(data), 2.4), layout="constrained")
    axes = figure.subplots(1, len(data), squeeze=False)[0]
    for axis, (case, times) in zip(axes, data.items(), strict=True):
        names = sorted(times, key=lambda name: -times[name])
        colours = [OURS if name.startswith("gdn_ops") else THEIRS for name in names]
        bars = axis.barh(names, [times[name] for name in names], color=colours)
        axis.bar_label(bars, [f" {times[name]:.3g}" for name in names], fontsize=8)
        axis.set_title(case, fontsize=9)
        axis.set_xlabel("milliseconds, less is better", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    draw(panels()).savefig(PICTURE, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
