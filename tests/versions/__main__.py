"""Run the tests with other versions: `python tests/versions [CELL ...]`, as `make versions`."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from versions import report
from versions.cells import UnknownCellError, in_order, select
from versions.run import Result, default_jobs, log_of, run_cells

STATES = {"passed": "passed", "failed": "RED", "not run": "NOT RUN"}
FAILURES_SHOWN = 3


def line(place: str, result: Result) -> str:
    """Return what is printed when a cell ends; a red one with its first failures and its log."""
    counts = f"{result.passed} passed, {result.skipped} skipped"
    if result.failures:
        counts = f"{len(result.failures)} failed, {counts}"
    if result.state == "not run":
        counts = "no fault of gdn_ops" if result.excused else "counts as failed"
    minutes, seconds = divmod(round(result.seconds), 60)
    time = f"{minutes} min {seconds:2} s" if minutes else f"{seconds} s"
    state = STATES[result.state]
    lines = [f"{place} {state:<7} {result.cell:<18} {result.ran_with:<44} {counts}, {time}"]
    if result.state != "passed":
        lines += [result.reason] if result.reason else []
        lines += result.failures[:FAILURES_SHOWN]
        left = len(result.failures) - FAILURES_SHOWN
        lines += [f"and {left} more"] if left > 0 else []
        lines += [f"log: {log_of(result.cell)}"]
    return "\n    ".join(lines)


def summary(results: list[Result]) -> str:
    """Return the table at the end, in the order of the table of cells."""
    by_name = {result.cell: result for result in results}
    rows = [("", "cell", "passed", "skipped", "failed", "ran with")]
    for name in in_order(by_name):
        r = by_name[name]
        counts = (r.passed, r.skipped, len(r.failures))
        rows.append((STATES[r.state], name, *map(str, counts), r.ran_with))
    lines = [f"{s:<7} {c:<18} {p:>7} {k:>8} {f:>7}  {v}" for s, c, p, k, f, v in rows]
    green = sum(result.is_green for result in results)
    return "\n".join(["", *lines, "", f"{green} of {len(results)} cells are green"])


def arguments_of(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python tests/versions", description=__doc__)
    parser.add_argument("cells", nargs="*", metavar="CELL", help="names or patterns (default: all)")
    parser.add_argument("--list", action="store_true", help="name the cells and end")
    parser.add_argument("--jobs", type=int, help="cells at once (default: by cores and memory)")
    parser.add_argument("--minutes", type=float, default=120, help="time limit of a cell")
    parser.add_argument("--record", action="store_true", help="record also what was named")
    parser.add_argument("--render", action="store_true", help="write the page of what is recorded")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run cells, print a line for each and a table; return 1 if any is red."""
    asked = arguments_of(arguments)
    if asked.render:
        report.record([])
        return 0
    try:
        cells = select(asked.cells)
    except UnknownCellError as error:
        print(error, file=sys.stderr)
        return 2
    if asked.list:
        print("\n".join(cell.name for cell in cells))
        return 0
    # A time limit from outside ends this as Ctrl-C does, with all that was started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    jobs = min(asked.jobs or default_jobs(), len(cells))
    print(f"{len(cells)} cells, {jobs} at once", flush=True)
    results: list[Result] = []
    try:
        for result in run_cells(cells, jobs, asked.minutes * 60):
            results.append(result)
            print(line(f"[{len(results):>2}/{len(cells)}]", result), flush=True)
    except KeyboardInterrupt:
        print("interrupted: nothing is recorded", file=sys.stderr)
        return 130
    print(summary(results))
    if asked.record or not asked.cells:
        report.record(results)
        print(f"wrote {report.PAGE.relative_to(report.ROOT)}")
    return 0 if all(result.is_green for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
