"""Show what `gdn-ops compile` has compiled: a table of kernels, one of launches, and JSON."""

from __future__ import annotations

import datetime
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from gdn_ops.aot.machine_code import Counts, values
from gdn_ops.aot.results import CompiledKernel, TimedLaunch
from gdn_ops.dispatch.backend import Backend, installed_version
from gdn_ops.terminal.tables import Section, table, wrapped

COLUMNS = ("launched by", "options", "shared", "registers", "spills", "stack", "matrix", "")
LAUNCH_COLUMNS = ("launch", "fit", "waves", "hot loop", "reg. A", "barriers", "us", "bound")

LOOP_COLUMNS = {
    "all": "instructions",
    "matrix": "matrix",
    "reg. A": "register_a",
    "bar.": "barriers",
    "wait": "waits",
    "ld": "shared_loads",
    "st": "shared_stores",
    "shfl": "shuffles",
    "spill": "spills",
    "mufu": "special",
}
"""Head of a column of the table of loops, and the field of `Counts` in it."""


class Timed(NamedTuple):
    """Hold a launch and the place of its kernel among all that were compiled."""

    row: int
    kernel: CompiledKernel
    launch: TimedLaunch

    @property
    def hot(self) -> tuple[Counts, int] | None:
        """Return what a trip of the hot loop executes, and its trips; None where not known."""
        trips, code = self.launch.trips, self.kernel.code
        if trips is None:
            return None
        index = code.hot(trips)
        return code.trip(index, trips), trips[index] if index >= 0 else 1


def show(rows: Sequence[CompiledKernel], target: str, *, has_loops: bool = False) -> None:
    """Print the kernels and the launches of one target, then the text of every failure.

    Args:
        rows: the kernels.
        target: the GPU.
        has_loops: whether to print what is in each loop too.
    """
    kernels = dict.fromkeys(row.kernel for row in rows)
    sections = [(name, [cells(row) for row in rows if row.kernel == name]) for name in kernels]
    print(f"compiled for {target}")
    print(table(COLUMNS, sections))
    launches = launch_sections(rows)
    if launches:
        print()
        print(table(LAUNCH_COLUMNS, launches))
    if has_loops:
        print()
        print(table(("loop", *LOOP_COLUMNS), [*map(loop_section, rows)]))
    for row in rows:
        where = f"{row.kernel} ({row.sample}, {target})"
        for text in (*row.failures, *([row.note] if row.note else [])):
            print(wrapped(f"{where}: {text}", indent="  "))
    print(flush=True)


def cells(row: CompiledKernel) -> tuple[str, ...]:
    """Return the table cells of a launch as text."""
    matrix = ", ".join(f"{name} {count}" for name, count in sorted(row.instructions.items()))
    options = ", ".join(filter(None, (_option(*item) for item in row.options.items())))
    numbers = map(str, (row.shared, row.registers, row.spills, row.stack))
    verdict = "FAIL" if row.failures else "granted" if row.note else "pass"
    return f"  {row.sample}", options, *numbers, matrix or "-", verdict


def _option(name: str, value: int | bool | str) -> str:
    """Return a launch option in short; nothing for one that is off or only sets up compiling."""
    if name.startswith("enable_") or value is False:
        return ""
    if value is True:
        return name
    return value if isinstance(value, str) else f"{name.removeprefix('num_')} {value}"


def launch_sections(rows: Sequence[CompiledKernel]) -> list[Section]:
    """Return the launches of one target, a section for every sample and direction.

    The forward of a training call is left out where it is that of inference.
    """
    groups = grouped(rows)
    sections: list[Section] = []
    for (sample, direction), launches in groups.items():
        case, _, how = sample.rpartition(" ")
        same = groups.get((f"{case} inference", direction))
        if how == "training" and same and [*map(_place, launches)] == [*map(_place, same)]:
            continue
        sections.append((_title(sample, direction, launches), [*map(launch_cells, launches)]))
    return sections


def grouped(rows: Iterable[CompiledKernel]) -> dict[tuple[str, str], list[Timed]]:
    """Return the launches of one target by sample and direction, in the order they are made."""
    groups: dict[tuple[str, str], list[Timed]] = defaultdict(list)
    for i, row in enumerate(rows):
        for launch in row.launches:
            groups[launch.sample, launch.direction].append(Timed(i, row, launch))
    return {key: sorted(own, key=lambda x: x.launch.order) for key, own in groups.items()}


def _place(x: Timed) -> tuple[int, tuple[int, ...]]:
    return x.row, x.launch.grid


def _title(sample: str, direction: str, launches: Sequence[Timed]) -> str:
    us = total_us(launches)
    return f"{sample}, {direction}: {'not predicted' if us is None else f'{us:.1f} us'}"


def total_us(launches: Sequence[Timed]) -> float | None:
    """Return the predicted time of launches one after the other, None where one has none."""
    own = [x.launch.prediction for x in launches]
    known = [x.us for x in own if x is not None]
    return round(sum(known), 3) if len(known) == len(own) else None


def launch_cells(x: Timed) -> tuple[str, ...]:
    """Return the table cells of a launch as text."""
    time, fit = x.launch.prediction, str(x.kernel.programs)
    if not x.kernel.warps:
        return f"  {x.kernel.kernel}", "", "", "does not compile"
    if x.hot is None:
        return f"  {x.kernel.kernel}", fit, "", "trips not known"
    if time is None:
        return f"  {x.kernel.kernel}", fit, "", "does not fit"
    trip, trips = x.hot
    return (
        f"  {x.kernel.kernel}",
        fit,
        f"{time.waves:.2f}",
        f"{trip.instructions} x {trips}",
        f"{trip.register_a} of {trip.hgmma}" if trip.hgmma else "-",
        str(trip.barriers),
        f"{time.us:.1f}",
        time.bound,
    )


def loop_section(row: CompiledKernel) -> Section:
    """Return the loops of a kernel, each with its own instructions, inner ones indented."""
    lines = [("  outside", row.code.outside)]
    for loop in row.code.loops:
        lines.append((f"  {'  ' * loop.depth}{'wait' if loop.is_wait else 'loop'}", loop.own))
    cells = [
        (name, *(str(getattr(own, field)) for field in LOOP_COLUMNS.values()))
        for name, own in lines
    ]
    return f"{row.kernel}, {row.sample}", cells


def as_json(backend: Backend, rows: Sequence[CompiledKernel]) -> str:
    """Return the rows and versions as JSON; seconds are left out, so that runs can be compared."""
    names = ("gdn_ops", "torch", *backend.requires)
    # Metadata of wheels from PyPI leave out the build of torch.
    versions = {name: installed_version(name) for name in names} | {"torch": torch.__version__}
    head = {
        "backend": backend.name,
        "date": datetime.date.today().isoformat(),
        "versions": versions | backend.tools("cuda"),
    }
    launches, totals = [], []
    for target in dict.fromkeys(row.target for row in rows):
        places = [i for i, row in enumerate(rows) if row.target == target]
        for (sample, direction), own in grouped([rows[i] for i in places]).items():
            where = {"target": target, "sample": sample, "direction": direction}
            totals.append(where | {"us": total_us(own)})
            launches += [where | _launch_values(x) | {"row": places[x.row]} for x in own]
    lists = {"kernels": [*map(_kernel_values, rows)], "launches": launches, "totals": totals}
    # An entry a line, so that a change of one is a change of a line.
    text = "".join(
        f",\n {json.dumps(name)}: [\n  {_LINES.join(map(json.dumps, entries))}\n ]"
        for name, entries in lists.items()
    )
    return f"{json.dumps(head, indent=1)[:-2]}{text}\n}}\n"


_LINES = ",\n  "


def _kernel_values(row: CompiledKernel) -> dict[str, Any]:
    left_out = ("seconds", "launches")
    own = {name: value for name, value in asdict(row).items() if name not in left_out}
    return own | {"code": row.code.values()}


def _launch_values(x: Timed) -> dict[str, Any]:
    launch, trips = x.launch, x.launch.trips
    own: dict[str, Any] = {
        "kernel": x.kernel.kernel,
        **{name: getattr(launch, name) for name in ("order", "grid", "bytes", "read", "written")},
        "trips": None if trips is None else _in_order(trips, len(x.kernel.code.loops)),
    }
    if x.hot is not None:
        own["hot_loop"] = {"trips": x.hot[1]} | values(x.hot[0])
    if launch.work is not None and launch.prediction is not None:
        own |= {"executed": launch.work.instructions} | asdict(launch.prediction)
    return own


def _in_order(trips: Mapping[int, int], count: int) -> list[int | None]:
    """Return the trips of all loops of a code, None for those that only wait."""
    return [trips.get(i) for i in range(count)]
