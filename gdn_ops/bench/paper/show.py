"""Show a result of `gdn-ops bench paper` as text."""

from __future__ import annotations

from gdn_ops.bench.paper import views
from gdn_ops.bench.paper.published import HARDWARE, LENGTHS, THROUGHPUT
from gdn_ops.bench.paper.views import Data, Grid, label, short, size
from gdn_ops.terminal.tables import Section, table, wrapped


def text(data: Data) -> str:
    """Return a result in plain text: circumstances, tables, what was left out.

    Args:
        data: the JSON of the result.
    """
    lines = [views.machine(data), views.skeleton(data), _load(data)]
    worst = max(data["checks"], key=lambda check: check["error"] / check["allowance"])
    lines.append(
        f"conformance: {len(data['checks'])} comparisons with the definition, the worst off by "
        f"{worst['error']:.2g}, allowed {worst['allowance']:.2g}"
    )
    parts = [wrapped(line, indent="  ") for line in lines]
    for what, title in (
        ("training", "forward and backward"),
        ("prefill", "forward and the last logits"),
    ):
        parts.append(_throughput(data, what, title))
    parts += [_layers(data), _memory(data), _decode(data), _energy(data)]
    left_out = (one for one in data["skipped"] if one["what"] != "energy")
    parts += [
        wrapped(f"left out: {one['comparator']} ({one['what']}): {one['reason']}", indent="  ")
        for one in left_out
    ]
    return "\n".join(part for part in parts if part)


def _load(data: Data) -> str:
    load = data["system"]["load"]
    seconds = f"{data['system']['seconds']:.0f} s"
    if load["before"] is None:
        return f"took {seconds}"
    return f"took {seconds}; load average {load['before'][0]:g} before, {load['after'][0]:g} after"


def _throughput(data: Data, what: str, title: str) -> str:
    rows = views.grid(data, what)
    if not rows:
        return ""
    lengths = views.lengths_of(rows)
    cells = []
    for name, of_mixer in rows.items():
        speeds = [_speed(of_mixer.get(length)) for length in lengths]
        at = views.break_even_of(data, what, name)
        ends = ["-" if at is None else str(at), f"{views.spread(of_mixer.values()):.2f}"]
        cells.append([f"  {label(name)}", *speeds, *ends])
    tokens = data["system"]["tokens"]
    heading = f"{what} ({title}), thousand tokens a second, {tokens} tokens a batch"
    sections: list[Section] = [(heading, cells)]
    if what == "training" and set(lengths) & set(LENGTHS):
        sections.append((f"published, {HARDWARE}", _published(lengths)))
    head = ["", *map(short, lengths), "faster from", "max/min"]
    return table(head, sections)


def _speed(row: dict[str, float] | None) -> str:
    return "-" if row is None else f"{row['tokens_per_second'] / 1e3:.3g}"


def _published(lengths: list[int]) -> list[list[str]]:
    """Return the published speeds at the lengths that both have."""
    rows = []
    for name, speeds in THROUGHPUT.items():
        by_length = dict(zip(LENGTHS, speeds, strict=True))
        cells = [f"{by_length[n]:g}" if n in by_length else "-" for n in lengths]
        rows.append([f"  {label(name)}", *cells])
    return rows


def _layers(data: Data) -> str:
    """Return where GDN overtakes attention, a line for each width of a single layer."""
    layers = data["system"]["layers"]
    cells = []
    for width in layers["widths"]:
        row = [f"  {width}"]
        for what in ("layer forward", "layer forward+backward"):
            at = views.break_even_of(data, what, "gdn", width)
            row.append("-" if at is None else str(at))
        if any(cell != "-" for cell in row[1:]):
            cells.append(row)
    if not cells:
        return ""
    heading = (
        f"length from which on a GDN layer is faster than attention, {layers['tokens']} tokens"
    )
    return table(("width", "forward", "forward+backward"), [(heading, cells)])


def _memory(data: Data) -> str:
    contexts = data["system"]["contexts"]
    by_model: dict[str, dict[int, int]] = {}
    for one in data["memory"]:
        by_model.setdefault(one["model"], {})[one["context"]] = one["bytes"]
    cells = []
    for name, sizes in by_model.items():
        equal = data["equal_context"].get(name)
        row = [f"  {label(name)}", *(size(sizes[context]) for context in contexts)]
        cells.append([*row, "-" if equal is None else f"{equal:.0f}"])
    head = ["", *map(short, contexts), "less than keys and values from"]
    return table(head, [("what is remembered of a text, by its tokens", cells)])


def _decode(data: Data) -> str:
    rows: Grid = views.grid(data, "decode")
    if not rows:
        return ""
    contexts = views.lengths_of(rows)
    cells = [
        [
            f"  {label(name)}",
            *(f"{of_mixer[c]['median']:.3g}" if c in of_mixer else "-" for c in contexts),
            f"{views.spread(of_mixer.values()):.2f}",
        ]
        for name, of_mixer in rows.items()
    ]
    head = ["", *map(short, contexts), "max/min"]
    return table(head, [("decode of one token behind a text, in ms", cells)])


def _energy(data: Data) -> str:
    counter, reason = data["energy"]["counter"], data["energy"]["reason"]
    if counter is None:
        return wrapped(f"energy per token: absent: {reason}", indent="  ")
    rows = views.grid(data, "training")
    lengths = views.lengths_of(rows)
    cells = [
        [f"  {label(name)}", *(_millijoules(of_mixer.get(length)) for length in lengths)]
        for name, of_mixer in rows.items()
    ]
    heading = f"energy of training in mJ a token, {counter}, idle power included"
    return table(["", *map(short, lengths)], [(heading, cells)])


def _millijoules(row: dict[str, float | None] | None) -> str:
    joules = None if row is None else row["joules_per_token"]
    return "-" if joules is None else f"{1e3 * joules:.3g}"
