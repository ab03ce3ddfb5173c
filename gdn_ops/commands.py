"""The commands of `gdn-ops`. Each reads its arguments, calls the library and prints."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.table import Table

import gdn_ops
from gdn_ops import info as facts
from gdn_ops import registry
from gdn_ops.bench import report, suite
from gdn_ops.bench.inputs import Setting
from gdn_ops.bench.tune import tune as run_tune
from gdn_ops.bench.verify import RefusedError
from gdn_ops.demo import show
from gdn_ops.errors import SpecError
from gdn_ops.spec import FLOAT_DTYPES

app = typer.Typer(
    help="The gated delta rule: inspect, certify, measure and show the backends of gdn_ops.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEMO_LIMIT = 16384


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"gdn-ops: {message}", file=sys.stderr)
    raise typer.Exit(code)


def _names(text: str) -> tuple[str, ...]:
    """Split a comma-separated option."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


@contextlib.contextmanager
def _progress(console: Console, *, quiet: bool = False) -> Iterator[Progress]:
    """Show a progress bar; a quiet one has no thread that would disturb what is timed."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, auto_refresh=not quiet) as progress:
        yield progress


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, devices, threads, and what every backend can run here."""
    found = facts.collect()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = Console()
    for name, version in found["versions"].items():
        console.print(f"{name:<13} {version or 'not installed'}", highlight=False)
    threads = found["threads"]
    console.print(f"{'platform':<13} {found['platform']}", highlight=False)
    for device in found["devices"]:
        text = f"{device['device']:<13} {device['name']} {device['capability']}"
        console.print(escape(text), highlight=False)
    console.print(f"{'threads':<13} {threads['torch']} of {threads['cores']} cores\n")
    table = Table("backend", "version", "status", "can run")
    for backend in gdn_ops.backends():
        limits = facts.limits_text(backend.limits)
        cells = (backend.name, backend.version or "-", backend.status, limits)
        table.add_row(*map(escape, cells))
    console.print(table)


def _checkable(name: str) -> list[str]:
    """Return the backends that `check` is about, or end with the reason why there is none."""
    if name != "all":
        try:
            backend = registry.get_backend(name)
        except SpecError as error:
            _fail(str(error))
        if isinstance(backend, str):
            _fail(f"backend {name!r} is not available: {backend}")
        status = next(i.status for i in gdn_ops.backends() if i.name == name)
        if status.startswith("no supported device"):
            _fail(f"backend {name!r} is not available: {status}")
        return [name]
    return [i.name for i in gdn_ops.backends() if i.status == "available"]


@app.command()
def check(
    backend: Annotated[str, typer.Option(help='Name of a backend, or "all".')] = "all",
    seconds: Annotated[float, typer.Option(help="Time for each backend.", min=0.1)] = 60.0,
    seed: Annotated[int | None, typer.Option(help="Repeat the same random calls.")] = None,
) -> None:
    """Certify backends on this machine: random calls against the definition in float64."""
    try:
        from gdn_ops.testing.conformance import check as run_check
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        _fail("check needs the testing extra: pip install 'gdn_ops[testing]'")
    console = Console()
    passed = True
    for name in _checkable(backend):
        with _progress(console) as progress:
            task = progress.add_task(name, total=1.0)

            def on_progress(share: float, text: str) -> None:
                progress.update(task, completed=share, description=f"{name}: {text}")  # noqa: B023

            report = run_check(name, seconds, on_progress=on_progress, seed=seed)
        table = Table("subject", "examples", "worst error / allowance", "", title=f"backend {name}")
        for row in report.rows:
            verdict = "[green]pass[/green]" if row.passed else "[red]FAIL[/red]"
            table.add_row(escape(row.subject), str(row.examples), f"{row.worst:.3g}", verdict)
        console.print(table)
        for row in report.rows:
            if row.failure is not None:
                console.print(f"\n[red]{escape(row.subject)}[/red]: the smallest call that fails")
                console.print(Syntax(row.failure, "python", word_wrap=True))
        verdict = "[green]passed[/green]" if report.passed else "[red]failed[/red]"
        console.print(f"{name}: {report.examples} calls in {report.seconds:.0f} s, {verdict}\n")
        passed = passed and report.passed
    if not passed:
        raise typer.Exit(1)


@app.command()
def bench(
    cases: Annotated[
        list[str] | None,
        typer.Argument(help="Named cases; the reference table for qwen-16-32 without."),
    ] = None,
    backend: Annotated[str, typer.Option(help="Backends, comma-separated.")] = "",
    peer: Annotated[str, typer.Option(help='Peers, comma-separated, or "none".')] = "transformers",
    what: Annotated[str, typer.Option(help="Measurements, comma-separated; all without.")] = "",
    threads: Annotated[int | None, typer.Option(help="Threads torch computes with.", min=1)] = None,
    repeats: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 7,
    dtype: Annotated[str, typer.Option(help="Of q, k and v.")] = "float32",
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder for JSON and PNG.")] = None,
    tune: Annotated[str | None, typer.Option(help="Measure a backend's configurations.")] = None,
) -> None:
    """Measure backends against peers: checked, interleaved, in one process."""
    if dtype not in FLOAT_DTYPES:
        _fail(f"unknown dtype {dtype!r}, known: {', '.join(FLOAT_DTYPES)}")
    if threads is not None:
        torch.set_num_threads(threads)
    peers = () if peer == "none" else _names(peer)
    try:
        setting = Setting(dtype, device, repeats)
        if tune is not None:
            for line in run_tune(tune, cases or [], setting):
                print(line)
            return
        backends = _names(backend) or suite.default_backends()
        plan = suite.make_plan(cases or [], _names(what) or suite.WHAT, backends, peers, setting)
        _run_bench(plan, out)
    except RefusedError as error:
        _fail(str(error), 1)
    except (ValueError, gdn_ops.BackendUnsupportedError) as error:
        _fail(str(error))


def _run_bench(plan: suite.Plan, out: Path | None) -> None:
    console = Console()
    with _progress(console, quiet=True) as progress:
        task = progress.add_task("starting", total=plan.count() + 1)

        def tell(text: str) -> None:
            progress.update(task, description=text, advance=1, refresh=True)

        result = suite.run(plan, tell)
    report.show(result, console)
    for path in report.write(result, out) if out is not None else ():
        console.print(str(path), markup=False)


@app.command()
def demo(
    file: Annotated[
        Path | None,
        typer.Argument(help="A text; the one that ships without.", exists=True, dir_okay=False),
    ] = None,
    backend: Annotated[str, typer.Option(help="Backend for the reading.")] = "auto",
    limit: Annotated[int, typer.Option(help="Read at most so many bytes.")] = DEMO_LIMIT,
) -> None:
    """Read a text with an associative memory that was never trained, then continue it."""
    text = show.shipped_text() if file is None else file.read_bytes()
    try:
        show.run(text[:limit], Console(), backend)
    except (ValueError, gdn_ops.BackendUnsupportedError) as error:
        _fail(str(error))
