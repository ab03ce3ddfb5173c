"""Run the benchmarks of `gdn-ops bench`, and show and write their results."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from gdn_ops.bench import report, suite
from gdn_ops.bench.inputs import Setting


def run_cases(plan: suite.Plan, out: Path | None) -> None:
    """Run the benchmark over named cases.

    Raises:
        RefusedError: a comparator computes something else.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # A thread that refreshes it would disturb what is timed.
    with Progress(*columns, console=Console(), transient=True, auto_refresh=False) as progress:
        task = progress.add_task("starting", total=plan.count() + 1)

        def log(text: str) -> None:
            progress.update(task, description=text, advance=1, refresh=True)

        result = suite.run(plan, log)
    print(report.text(result))
    for path in report.write(result, out) if out is not None else ():
        print(path)


def run_decode(library: str | None, setting: Setting, out: Path | None) -> None:
    """Run the benchmark of decode steps; its one peer is the path of a custom-op library.

    Raises:
        RefusedError, SpecError: as `decode.run`.
        ModuleNotFoundError: onnx or onnxruntime is not installed.
    """
    from gdn_ops.bench import decode

    result = decode.run(setting, None if library == "none" else library, print)
    print(f"onnxruntime {result.system['versions']['onnxruntime']}, one thread")
    report.publish(result, "decode", out)
