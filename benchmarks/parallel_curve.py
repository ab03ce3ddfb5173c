"""Draw docs/img/parallel.png, which split when: `python benchmarks/parallel_curve.py`.

Above is what the cost model says of H200s, efficiency against devices for three lengths. Below is
what the op's time is made of, by the same model; and what the model says of processes of one
machine, beside what `parallel.py` has measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gdn_ops.parallel.cost import Strategy, op_seconds
from gdn_ops.parallel.machines import MACHINES
from gdn_ops.parallel.planning import Model, Split, row
from gdn_ops.spec.language import Sizes

MEASURED = Path(__file__).parent / "results" / "parallel.json"
PICTURE = Path(__file__).parents[1] / "docs" / "img" / "parallel.png"
DEVICES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = {32768: "#999999", 131072: "#0072b2", 1048576: "#d55e00"}
LINES: dict[Strategy, str] = {"pipeline": "--", "gather": "-"}
SHARED = (2, 4, 8)
STACKED = 131072
PARTS = {"compute": "#0072b2", "added": "#56b4e9", "bubble": "#bbbbbb", "exchange": "#e69f00"}
NAMES = ("its part of the work", "work the split adds", "waiting for other ranks", "exchange")
H200 = MACHINES["h200"]


def model(tokens: int) -> Model:
    """Return a training step of 36 layers on one sequence, 16 key and 32 value heads."""
    return Model(Sizes(1, tokens, 16, 32, 128, 128, 1), 36, 2048, 8192)


def of_step(strategy: Strategy, tokens: int) -> list[float]:
    """Return the efficiency of a step, by the number of devices."""
    return [row(model(tokens), Split(strategy, n, 1), H200).efficiency for n in DEVICES]


def of_op(strategy: Strategy, tokens: int) -> list[float]:
    """Return the efficiency of the op alone, by the number of devices."""
    s = model(tokens).sizes
    alone = op_seconds("data", s, 1, H200).total
    return [alone / (n * op_seconds(strategy, s, n, H200).total) for n in DEVICES]


def parts() -> dict[str, dict[str, float]]:
    """Return the time of all devices over that of one, by split and by what it is made of."""
    s = model(STACKED).sizes
    alone = op_seconds("data", s, 1, H200).total
    return {
        f"{strategy}\nx{n}": {
            part: n * seconds / alone
            for part, seconds in op_seconds(strategy, s, n, H200)._asdict().items()
        }
        for n in SHARED
        for strategy in LINES
    }


def measured() -> dict[str, tuple[float, float]]:
    """Return the times predicted and measured, over those of one process, by split."""
    rows: list[dict[str, Any]] = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]
    return {
        f"{x['strategy']} x{x['processes']}": (x["predicted_over_one"], x["over_one"])
        for x in rows
        if x["what"] == "forward+backward" and x["processes"] > 1
    }


def draw() -> Figure:
    """Return the picture."""
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    above, below = figure.subplots(2, 2)
    for axis, title in zip(above, ("a training step", "the op alone"), strict=True):
        for tokens, colour in LENGTHS.items():
            for strategy, line in LINES.items():
                efficiency = (of_step if axis is above[0] else of_op)(strategy, tokens)
                axis.plot(DEVICES, efficiency, line, color=colour, marker=".",
                          label=f"{strategy}, {tokens // 1024}k tokens")  # fmt: skip
        _efficiency(axis, f"{title}, H200, by the model")
    above[0].legend(fontsize=7, loc="lower left")
    _stacks(below[0])
    _bars(below[1])
    return figure


def _efficiency(axis: Any, title: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(DEVICES, map(str, DEVICES))
    axis.set_ylim(0, 1.02)
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("devices", fontsize=8)
    axis.set_ylabel("efficiency", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)


def _stacks(axis: Any) -> None:
    found = parts()
    bottom = [0.0] * len(found)
    for (part, colour), name in zip(PARTS.items(), NAMES, strict=True):
        heights = [split[part] for split in found.values()]
        axis.bar(list(found), heights, 0.7, bottom=bottom, label=name, color=colour)
        bottom = [x + y for x, y in zip(bottom, heights, strict=True)]
    axis.axhline(1, color="black", linewidth=0.8)
    tokens = f"{STACKED // 1024}k tokens"
    axis.set_title(f"the op alone, H200, {tokens}, by the model", fontsize=9)
    axis.set_ylabel("time of all devices over that of one", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7, loc="upper left")


def _bars(axis: Any) -> None:
    found = measured()
    places = range(len(found))
    for shift, which, label, colour in (
        (-0.2, 0, "predicted", "#7f7f7f"),
        (0.2, 1, "measured", "#009e73"),
    ):
        heights = [pair[which] for pair in found.values()]
        bars = axis.bar([i + shift for i in places], heights, 0.4, label=label, color=colour)
        axis.bar_label(bars, [f"{height:.2f}" for height in heights], fontsize=7)
    axis.set_xticks(list(places), list(found), fontsize=8)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_title("gloo, two cores shared: time over that of one process", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.margins(y=0.15)
    axis.legend(fontsize=7)


def main() -> None:
    """Write the picture."""
    draw().savefig(PICTURE, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
