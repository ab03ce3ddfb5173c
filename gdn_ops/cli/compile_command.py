"""Run `gdn-ops compile`: compile and judge kernels for GPUs, show and write the results."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gdn_ops.aot.gpu_limits import refusal
from gdn_ops.aot.results import CompiledKernel, CompilesAhead
from gdn_ops.aot.sampling import samples
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.backend import Backend, installed_version
from gdn_ops.spec.language import Case
from gdn_ops.spec.ops import OPS

COLUMNS = ("kernel", "launched by", "options", "shared", "registers", "spills", "stack", "matrix")


def run(
    backend_name: str,
    targets: Sequence[str],
    cases: Sequence[str],
    *,
    everything: bool,
    path: Path | None,
) -> bool:
    """Compile kernels, print a table per target, and return whether every kernel passes.

    Args:
        backend_name: a backend with `targets`.
        targets: names of some of those `targets`; all if empty.
        cases: names of cases of any op; all if there is none.
        everything: also what the public API allows beside the defaults.
        path: a file for the rows as JSON.

    Raises:
        ValueError: a backend, target or case is unknown, or the backend is not available.
    """
    backend = registry.get_backend(backend_name)
    if isinstance(backend, str):
        raise ValueError(f"backend {backend_name!r} is not available: {backend}")
    if not isinstance(backend, CompilesAhead):
        raise ValueError(f"backend {backend_name!r} compiles nothing ahead of time")
    chosen = targets or backend.targets
    for target in chosen:
        if target not in backend.targets:
            raise ValueError(refusal(target, backend.targets))
    named = find_cases(cases)
    console = Console()
    rows: list[CompiledKernel] = []
    for target in chosen:
        own: list[CompiledKernel] = []
        with console.status(f"compiling for {target}") as status:
            for row in backend.compile_ahead(target, samples(named, everything=everything)):
                own.append(row)
                status.update(f"compiling for {target}: {len(own)} kernels, {row.kernel}")
        show(own, target, console)
        rows += own
    if path is not None:
        path.write_text(as_json(backend, rows), encoding="utf-8")
        console.print(str(path), markup=False, highlight=False)
    return not any(row.failures for row in rows)


def find_cases(names: Sequence[str]) -> list[Case]:
    """Return the cases with the given names, or all cases of every op if none is given.

    Raises:
        ValueError: no case has that name.
    """
    known = {case.name: case for op in OPS for case in op.cases}
    for name in names:
        if name not in known:
            raise ValueError(f"unknown case {name!r}, known: {', '.join(known)}")
    return [known[name] for name in names] or list(known.values())


def show(rows: Iterable[CompiledKernel], target: str, console: Console) -> None:
    """Print a table of the kernels of one target, then the text of every failure."""
    table = Table(title=f"compiled for {target}")
    for column in (*COLUMNS, ""):
        table.add_column(column, no_wrap=column not in ("launched by", "options"))
    for row in rows:
        verdict = "[red]FAIL[/red]" if row.failures else "[green]pass[/green]"
        verdict = "[yellow]granted[/yellow]" if row.note and not row.failures else verdict
        table.add_row(*map(escape, cells(row)), verdict)
    console.print(table)
    for row in rows:
        where = escape(f"{row.kernel} ({row.sample}, {target})")
        for failure in row.failures:
            console.print(f"[red]{where}[/red]: {escape(failure)}", highlight=False, soft_wrap=True)
        if row.note:
            console.print(f"[yellow]{where}[/yellow]: {escape(row.note)}", highlight=False)


def cells(row: CompiledKernel) -> tuple[str, ...]:
    """Return the table cells of a kernel as text."""
    matrix = ", ".join(f"{name} {count}" for name, count in sorted(row.instructions.items()))
    options = ", ".join(filter(None, (_option(*item) for item in row.options.items())))
    numbers = map(str, (row.shared, row.registers, row.spills, row.stack))
    return row.kernel, row.sample, options, *numbers, matrix or "-"


def _option(name: str, value: int | bool | str) -> str:
    """Return a launch option in short; nothing for one that is off or only sets up compiling."""
    if name.startswith("enable_") or value is False:
        return ""
    if value is True:
        return name
    return value if isinstance(value, str) else f"{name.removeprefix('num_')} {value}"


def as_json(backend: Backend, rows: Iterable[CompiledKernel]) -> str:
    """Return the rows and the versions behind them as JSON; without seconds, for comparing."""
    names = ("gdn_ops", "torch", *backend.requires)
    head = {
        "backend": backend.name,
        "date": datetime.date.today().isoformat(),
        "versions": {name: installed_version(name) for name in names} | backend.tools("cuda"),
    }
    values = [{n: x for n, x in asdict(row).items() if n != "seconds"} for row in rows]
    # A kernel a line, so that a change of one is a change of a line.
    kernels = ",\n  ".join(map(json.dumps, values))
    return f'{json.dumps(head, indent=1)[:-2]},\n "kernels": [\n  {kernels}\n ]\n}}\n'
