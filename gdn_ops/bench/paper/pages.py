"""Write the tables of docs/paper.md from the JSON of results, beside what the paper publishes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gdn_ops.bench.paper import views
from gdn_ops.bench.paper.memory import FORMULAS
from gdn_ops.bench.paper.published import (
    HARDWARE,
    LENGTHS,
    THROUGHPUT,
    kept,
    published_break_even,
)
from gdn_ops.bench.paper.skeletons import ATTENTION
from gdn_ops.bench.paper.views import Data, label, short, size

NONE = "Nothing was recorded yet: `gdn-ops bench paper --out benchmarks/results`."


def recorded(folder: Path) -> list[Data]:
    """Return the results of a folder, those of a CPU first."""
    return [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("paper-*.json"), key=lambda p: "-cpu-" not in p.name)
    ]


def setting(data: Data) -> str:
    """Return what was measured and on what, a sentence or two."""
    system, load = data["system"], data["system"]["load"]
    rounds = sorted({row["samples"] for row in data["rows"]})
    times = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    beside = ""
    if load["before"] is not None:
        beside = f"; load average {load['before'][0]:g} before, {load['after'][0]:g} after"
    return (
        f"{views.machine(data)}. {views.skeleton(data)}. Medians of {times} rounds, after calls "
        f"that do not count; all of it took {system['seconds'] / 60:.0f} minutes{beside}."
    )


def picture_name(data: Data) -> str:
    """Return the name of the file that a result is drawn into."""
    return f"paper-{data['system']['device'].partition(':')[0]}.png"


def picture(data: Data) -> str:
    """Return the picture of a result for a page."""
    return f"![Speed, break-even, memory and latency, beside figure 3](img/{picture_name(data)})"


def parameters(data: Data) -> str:
    """Return the parameters of the models as a table."""
    rows = []
    for name, count in data["parameters"].items():
        text = data["system"]["mixers"][name]
        millions = [f"{count[part] / 1e6:.3f}" for part in ("mixers", "others")]
        rows.append([label(name), text, *millions, data["system"]["backends"][name] or "torch"])
    head = ("", "mixers", "parameters of mixers, millions", "of everything else", "runs on")
    return table(head, rows)


def throughput(data: Data, what: str) -> str:
    """Return the speeds of training or prefill as a table, with the spread of samples."""
    rows = views.grid(data, what)
    lengths = views.lengths_of(rows)
    cells = []
    for name, of_mixer in rows.items():
        row = [label(name)]
        for length in lengths:
            one = of_mixer.get(length)
            row.append("–" if one is None else _range(one))
        ends = [
            of_mixer[n]["tokens_per_second"] for n in (lengths[0], lengths[-1]) if n in of_mixer
        ]
        row.append(f"{ends[1] / ends[0]:.2f}" if len(ends) == 2 else "–")
        cells.append(row)
    ends_at = f"{short(lengths[-1])} over {short(lengths[0])}"
    return table(("thousand tokens/s", *map(short, lengths), ends_at), cells)


def _range(row: dict[str, float]) -> str:
    """Return a median speed with the slowest and the fastest sample."""
    speed = row["tokens_per_second"] / 1e3
    slow, fast = (speed * row["median"] / row[end] for end in ("worst", "best"))
    return f"{speed:.2f} ({slow:.2f}–{fast:.2f})"


def published() -> str:
    """Return figure 3 of the paper as a table."""
    rows = []
    for name, speeds in THROUGHPUT.items():
        share = kept(name)
        assert share is not None
        at = "–" if name == ATTENTION else _tokens(published_break_even(name))
        rows.append([label(name), *(f"{x:g}" for x in speeds), f"{share:.2f}", at])
    head = ("thousand tokens/s", *map(short, LENGTHS), "16k over 2k", "faster than attention from")
    return table(head, rows)


def claims(results: Sequence[Data]) -> str:
    """Return ratios that the paper's figure shows, beside those measured."""
    head = ["", f"published: {HARDWARE}", *(views.machine(data) for data in results)]
    rows = [
        ["GDN's speed over DeltaNet's, training, mean over lengths", _published_ratio()],
        ["GDN, longest over shortest length", f"{kept('gdn'):.2f}, 2k to 16k"],
        ["attention, longest over shortest length", f"{kept(ATTENTION):.2f}, 2k to 16k"],
        ["GDN faster than attention from", _tokens(published_break_even("gdn"))],
        ["GDN-H1 faster than attention from", _tokens(published_break_even("h1"))],
    ]
    for data in results:
        grid = views.grid(data, "training")
        cells = [
            _mean_ratio(grid),
            _kept(grid, "gdn"),
            _kept(grid, ATTENTION),
            *(_tokens(views.break_even_of(data, "training", name)) for name in ("gdn", "h1")),
        ]
        for row, cell in zip(rows, cells, strict=True):
            row.append(cell)
    return table(head, rows)


def _published_ratio() -> str:
    pairs = zip(THROUGHPUT["gdn"], THROUGHPUT["deltanet"], strict=True)
    ratios = [own / other for own, other in pairs]
    return f"{sum(ratios) / len(ratios):.2f}"


def _mean_ratio(grid: views.Grid) -> str:
    both = grid.get("gdn", {}).keys() & grid.get("deltanet", {}).keys()
    if not both:
        return "–"
    speeds = [[grid[n][x]["tokens_per_second"] for x in both] for n in ("gdn", "deltanet")]
    ratios = [own / other for own, other in zip(*speeds, strict=True)]
    return f"{sum(ratios) / len(ratios):.2f}"


def _kept(grid: views.Grid, name: str) -> str:
    if name not in grid:
        return "–"
    ends = min(grid[name]), max(grid[name])
    first, last = (grid[name][n]["tokens_per_second"] for n in ends)
    return f"{last / first:.2f}, {short(ends[0])} to {short(ends[1])}"


def _tokens(at: Any) -> str:
    return "–" if at is None else f"{at} tokens"


def break_even(data: Data) -> str:
    """Return break-even lengths: of the models, and of single layers by width."""
    models = [
        [label(name), *(_tokens(views.break_even_of(data, what, name)) for what in
                        ("prefill", "training"))]
        for name in data["parameters"]
        if name != ATTENTION
    ]  # fmt: skip
    width = data["system"]["model"]["width"]
    first = table((f"models of width {width}", "prefill", "training"), models)
    whats = ("layer forward", "layer forward+backward")
    layers = [
        [str(width), *(_tokens(views.break_even_of(data, what, "gdn", width)) for what in whats)]
        for width in data["system"]["layers"]["widths"]
    ]
    second = table(("one GDN layer of width", "forward", "forward and backward"), layers)
    return f"{first}\n\n{second}"


def memory(data: Data) -> str:
    """Return what models remember of a text as a table."""
    contexts = data["system"]["contexts"]
    by_model: dict[str, dict[int, dict[str, int]]] = {}
    for one in data["memory"]:
        by_model.setdefault(one["model"], {})[one["context"]] = one
    rows = []
    for name, sizes in by_model.items():
        equal = data["equal_context"].get(name)
        counted = [size(sizes[context]["bytes"]) for context in contexts]
        rows.append([label(name), *counted, "–" if equal is None else f"{equal:.0f} tokens"])
    head = ("tokens of the text", *map(short, contexts), "keys and values take more from")
    return table(head, rows)


def formulas() -> str:
    """Return the formulas of bytes as a table."""
    names = {"G": "recurrent layers", "A": "attention in a window", "F": "full attention"}
    return table(
        ("layer", "bytes for one text"), [[names[k], f"`{v}`"] for k, v in FORMULAS.items()]
    )


def decode(data: Data) -> str:
    """Return the times of a decoded token as a table, with the spread of samples."""
    rows = views.grid(data, "decode")
    contexts = views.lengths_of(rows)
    cells = [
        [label(name), *(
            f"{of[c]['median']:.2f} ({of[c]['best']:.2f}–{of[c]['worst']:.2f})" if c in of else "–"
            for c in contexts
        )]
        for name, of in rows.items()
    ]  # fmt: skip
    return table(("ms", *map(short, contexts)), cells)


def energy(data: Data) -> str:
    """Return the energy of training as a table, or why there is none."""
    if data["energy"]["counter"] is None:
        return f"Energy per token on {views.machine(data)}: absent. {data['energy']['reason']}."
    rows = views.grid(data, "training")
    lengths = views.lengths_of(rows)
    cells = [
        [label(name), *(_millijoules(of_mixer.get(length)) for length in lengths)]
        for name, of_mixer in rows.items()
    ]
    return table((f"mJ a token, {data['energy']['counter']}", *map(short, lengths)), cells)


def _millijoules(row: dict[str, Any] | None) -> str:
    joules = None if row is None else row["joules_per_token"]
    return "–" if joules is None else f"{1e3 * joules:.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def tables(folder: Path) -> dict[str, str]:
    """Return the tables of the page, by the name of their marks.

    Args:
        folder: of the results.
    """
    results = recorded(folder)

    def each(make: Any, *arguments: Any) -> str:
        parts = [make(data, *arguments) for data in results] or [NONE]
        return "\n\n".join(parts)

    return {
        "paper-setting": each(setting),
        "paper-pictures": each(picture),
        "paper-parameters": each(parameters),
        "paper-published": published(),
        "paper-claims": claims(results),
        "paper-training": each(throughput, "training"),
        "paper-prefill": each(throughput, "prefill"),
        "paper-break-even": each(break_even),
        "paper-memory": each(memory),
        "paper-formulas": formulas(),
        "paper-decode": each(decode),
        "paper-energy": each(energy),
    }
