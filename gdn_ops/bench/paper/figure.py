"""Draw a result of `gdn-ops bench paper` beside the published figure, with matplotlib."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gdn_ops.bench.paper import views
from gdn_ops.bench.paper.published import LENGTHS, THROUGHPUT
from gdn_ops.bench.paper.skeletons import ATTENTION, MIXERS
from gdn_ops.bench.paper.views import Data, label, short
from gdn_ops.environment.files import whole

STYLES = {
    "gdn": ("#009e73", "o"),
    "deltanet": ("#0072b2", "s"),
    "mamba2": ("#e69f00", "D"),
    "linear": ("#7f7f7f", "^"),
    ATTENTION: ("#d55e00", "v"),
    "h1": ("#cc79a7", "P"),
    "h2": ("#56b4e9", "X"),
}
"""Colour and mark of each contender; they differ in lightness and form too."""


def draw(data: Data, path: Path) -> list[Path | str]:
    """Draw a result into a file; return its path, or why there is none.

    Args:
        data: the JSON of the result.
        path: of a .png, .svg or .pdf.
    """
    try:
        figure = make(data)
    except ModuleNotFoundError as error:
        return [f"no plot: package {error.name!r} is not installed"]
    # Without the name of the program, so that equal plots are equal files.
    metadata = {"Software": None} if path.suffix.lower() == ".png" else None
    with whole(path) as file:
        figure.savefig(file, dpi=110, metadata=metadata)
    return [path]


def make(data: Data) -> Any:
    """Return a figure with six panels: speed, published and ours, widths, memory and decode."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.4), layout="constrained")
    axes = figure.subplots(2, 3)
    _published(axes[0][0])
    width, tokens = data["system"]["model"]["width"], data["system"]["tokens"]
    for axis, what in zip(axes[0][1:], ("training", "prefill"), strict=True):
        _speeds(axis, data, what)
        _titled(axis, f"{what}, here, width {width}, {short(tokens)} tokens a batch",
                "length of a sequence", "thousand tokens a second")  # fmt: skip
    _widths(axes[1][0], data)
    _memory(axes[1][1], data)
    _decode(axes[1][2], data)
    handles = {
        text: handle
        for axis in axes.flat
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
        if text in {kind.label for kind in MIXERS.values()}
    }
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=7,
                  fontsize=8, frameon=False)  # fmt: skip
    figure.suptitle(f"here: {views.machine(data)}", fontsize=9)
    return figure


def _line(axis: Any, name: str, x: Iterable[float], y: Iterable[float], **style: Any) -> None:
    colour, mark = STYLES[name]
    axis.plot(list(x), list(y), color=colour, marker=mark, ms=4, lw=1.3, label=label(name), **style)


def _published(axis: Any) -> None:
    for name, speeds in THROUGHPUT.items():
        _line(axis, name, LENGTHS, speeds)
    axis.set_ylim(0)
    _lengths(axis, LENGTHS)
    _titled(axis, "training, published: 1.3 billion parameters, one H100, 32k tokens",
            "length of a sequence", "thousand tokens a second")  # fmt: skip


def _speeds(axis: Any, data: Data, what: str) -> None:
    """Draw medians, with lines from the slowest to the fastest sample."""
    rows = views.grid(data, what)
    for name, by_length in rows.items():
        x = list(by_length)
        speeds = {n: row["tokens_per_second"] / 1e3 for n, row in by_length.items()}
        _line(axis, name, x, speeds.values())
        # Speed is median speed times median over time.
        ends = [
            [speeds[n] * row["median"] / row[end] for n, row in by_length.items()]
            for end in ("worst", "best")
        ]
        axis.vlines(x, *ends, color=STYLES[name][0], lw=0.8, alpha=0.6)
    axis.set_ylim(0)
    _lengths(axis, views.lengths_of(rows))


def _widths(axis: Any, data: Data) -> None:
    """Draw the break-even length of a layer against its width; arrows where it is beyond."""
    layers = data["system"]["layers"]
    styles = (("layer forward", "--", "s"), ("layer forward+backward", "-", "o"))
    for what, line, mark in styles:
        found = {w: views.break_even_of(data, what, "gdn", w) for w in layers["widths"]}
        there = {w: at for w, at in found.items() if at is not None}
        inside = {w: at.length for w, at in there.items() if at.where == "between"}
        axis.plot(list(inside), list(inside.values()), line, marker=mark, ms=4, lw=1.3,
                  color=STYLES["gdn"][0], label=what.removeprefix("layer "))  # fmt: skip
        for w, at in there.items():
            if at.where != "between":
                axis.plot([w], [at.length], marker="v" if at.where == "below" else "^",
                          color=STYLES["gdn"][0], mfc="white", ms=7)  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(layers["widths"], map(str, layers["widths"]))
    axis.minorticks_off()
    lengths = layers["lengths"]
    axis.set_yticks(lengths, map(short, lengths))
    axis.set_ylim(min(lengths) / 1.3, max(lengths) * 1.3)
    axis.legend(fontsize=7, frameon=False)
    _titled(axis, "where one GDN layer overtakes attention (hollow: beyond)",
            "width of the layer", "length of a sequence")  # fmt: skip


def _memory(axis: Any, data: Data) -> None:
    by_model: dict[str, dict[int, float]] = {}
    for one in data["memory"]:
        # Of recurrent layers everywhere, whatever their rule, all are equal.
        if one["model"] in MIXERS and one["model"] not in ("deltanet", "mamba2", "linear"):
            by_model.setdefault(one["model"], {})[one["context"]] = one["bytes"] / 1e6
    for name, sizes in by_model.items():
        _line(axis, name, sizes, sizes.values())
    _log_height(axis)
    _lengths(axis, data["system"]["contexts"])
    _titled(axis, "what a model remembers of a text (GDN: as the other recurrent ones)",
            "tokens of the text", "MB")  # fmt: skip


def _decode(axis: Any, data: Data) -> None:
    rows = views.grid(data, "decode")
    for name, by_context in rows.items():
        _line(axis, name, by_context, [row["median"] for row in by_context.values()])
        ends: list[list[float]] = [
            [r[end] for r in by_context.values()] for end in ("best", "worst")
        ]
        axis.vlines(list(by_context), *ends, color=STYLES[name][0], lw=0.8, alpha=0.6)
    _log_height(axis)
    _lengths(axis, views.lengths_of(rows))
    _titled(axis, "decode of one token", "tokens before it", "milliseconds")


def _lengths(axis: Any, lengths: Iterable[int]) -> None:
    """Set a tick at each length."""
    ticks = list(lengths)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [short(tick) for tick in ticks])
    axis.tick_params(axis="x", which="minor", bottom=False)


def _log_height(axis: Any) -> None:
    """Set heights to logarithms, with ticks at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _titled(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=8.5)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
