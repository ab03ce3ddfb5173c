"""Run the benchmarks of `gdn-ops bench`, and show and write their results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from gdn_ops.bench import report, suite
from gdn_ops.bench.inputs import Setting
from gdn_ops.bench.tune import tune


def quiet_progress(console: Console) -> Progress:
    """Return a progress bar without a thread that would disturb what is timed."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, auto_refresh=False)


def run_tune(backend: str, cases: Sequence[str], setting: Setting) -> None:
    """Print the rows of `bench --tune`.

    Raises:
        ValueError: the backend cannot be tuned, or a case is unknown.
    """
    for line in tune(backend, cases, setting):
        print(line, flush=True)


def run_cases(plan: suite.Plan, out: Path | None) -> None:
    """Run the benchmark over named cases.

    Raises:
        RefusedError: a comparator computes something else.
    """
    console = Console()
    with quiet_progress(console) as progress:
        task = progress.add_task("starting", total=plan.count() + 1)

        def log(text: str) -> None:
            progress.update(task, description=text, advance=1, refresh=True)

        result = suite.run(plan, log)
    print(report.text(result))
    for path in report.write(result, out) if out is not None else ():
        print(path)
