"""Run `gdn-ops check`: judge a backend, show the verdict, record it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.table import Table

from gdn_ops.dispatch import registry
from gdn_ops.dispatch.backend import Backend
from gdn_ops.environment import certificate

if TYPE_CHECKING:
    from gdn_ops.testing.conformance import CheckReport


def run(name: str, seconds: float, seed: int | None, device: str, console: Console) -> bool:
    """Check one backend and record the result; return whether it passed.

    Args:
        name: of a backend that is available.
        seconds: how long.
        seed: of the random calls; random if None.
        device: torch device; where the backend runs best if empty.
        console: to print on.
    """
    # The kit needs hypothesis, which is looked for before.
    from gdn_ops.testing.conformance import check

    backend = registry.get_backend(name)
    assert not isinstance(backend, str)
    where = device or best_device(backend)
    # A kernel that takes the process with it, or hangs, must not keep its certificate.
    try:
        certificate.suspend(type(backend), where)
    except OSError as error:
        console.print(f"the old certificate could not be taken back: {error}", markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=1.0)

        def on_progress(share: float, text: str) -> None:
            progress.update(task, completed=share, description=f"{name}: {text}")

        report = check(name, seconds, on_progress=on_progress, seed=seed, device=where)
    show(report, console)
    console.print(record(backend, report) + "\n", markup=False, highlight=False)
    return report.passed


def best_device(backend: Backend) -> str:
    """Return the GPU where a backend can run on one, else the CPU."""
    on_gpu = torch.cuda.is_available() and {"*", "cuda"} & set(backend.limits.devices)
    return "cuda" if on_gpu else "cpu"


def show(report: CheckReport, console: Console) -> None:
    """Print a row per subject, and the smallest failing calls as code."""
    title = f"backend {report.backend} on {report.device}"
    table = Table("subject", "examples", "worst error / allowance", "", title=title)
    for row in report.rows:
        verdict = "[green]pass[/green]" if row.passed else "[red]FAIL[/red]"
        table.add_row(escape(row.subject), str(row.examples), f"{row.worst:.3g}", verdict)
    console.print(table)
    for row in report.rows:
        if row.failure is not None:
            console.print(f"\n[red]{escape(row.subject)}[/red]: the smallest call that fails")
            console.print(Syntax(row.failure, "python", word_wrap=True))
    verdict = "[green]passed[/green]" if report.passed else "[red]failed[/red]"
    calls = f"{report.examples} calls in {report.seconds:.0f} s"
    console.print(f"{report.backend}: {calls}, {verdict}")


def record(backend: Backend, report: CheckReport) -> str:
    """Record the result of a check; return a line that says where, or why it could not be."""
    result = certificate.issue(
        type(backend),
        report.device,
        passed=report.passed,
        examples=report.examples,
        seconds=report.seconds,
        seed=report.seed,
    )
    kind = "certificate" if result.passed else "failure, no certificate,"
    try:
        path = certificate.record(result)
    except OSError as error:
        return f"the {kind} for {result.device} could not be recorded: {error}"
    return f"{kind} for {result.device} recorded in {path}"
