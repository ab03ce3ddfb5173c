"""Keep the last result of every cell, and make docs/versions.md and the package's data of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.version import Version

from versions.cells import CELLS, ROOT
from versions.run import Result

RESULTS = Path(__file__).with_name("results.json")
PAGE = ROOT / "docs" / "versions.md"
DATA = ROOT / "gdn_ops" / "data" / "tested.json"

INTRO = """# Versions

`make test` runs everything with the versions of `constraints.txt`. `make versions` runs the tests
that another version of a package concerns with that version, and makes this page. Newest result:
{date}.

{table}

`gdn-ops info` warns about an installed version that is older or newer than these.

## Run them

```sh
make versions                                  # all, and write this page
make versions CELL=transformers-5.12           # one
make versions CELL='triton-* onnxruntime-1.25' # several, by pattern
make versions CELL=transformers-5.7            # any other version
make versions CELL=torch-newest RECORD=1       # one, and its row of this page
```

A cell is the locked environment with another version of one package, and of what that version
requires. It is red when a test fails, when another version than its own is imported, or when it
cannot be installed: then do not rely on that version, and read the log that the command names.
"""


def read_results(path: Path | None = None) -> dict[str, Result]:
    """Return the last recorded result of every cell by name."""
    path = path or RESULTS
    if not path.exists():
        return {}
    recorded = json.loads(path.read_text(encoding="utf-8"))
    return {name: Result(name, **fields) for name, fields in recorded.items()}


def results_text(results: dict[str, Result]) -> str:
    """Return the file of results: what is worth keeping of each, in the order of the table."""
    kept = {}
    for name in sorted_names(results):
        fields = dataclasses.asdict(results[name])
        kept[name] = {k: v for k, v in fields.items() if k not in ("cell", "seconds")}
    return json.dumps(kept, indent=1) + "\n"


def sorted_names(cells: Iterable[str]) -> list[str]:
    """Return names of cells as the table has them, those of no table after them."""
    names = [cell.name for cell in CELLS]
    return sorted(cells, key=lambda c: (names.index(c) if c in names else len(names), c))


def package_of(cell: str) -> str:
    """Return the package that a cell is about."""
    return cell.rpartition("-")[0]


def version_of(result: Result) -> str:
    """Return the version that a cell is about; of Python without the last number."""
    package = package_of(result.cell)
    version = result.versions.get(package, "")
    parts = 2 if package == "python" else None
    return ".".join(version.partition("+")[0].split(".")[:parts])


def tested_ranges(results: Iterable[Result]) -> dict[str, list[str]]:
    """Return the oldest and the newest version of each package that passed."""
    found = defaultdict(list)
    for result in results:
        if result.state == "passed":
            found[package_of(result.cell)].append(version_of(result))
    return {
        name: [min(versions, key=Version), max(versions, key=Version)]
        for name, versions in sorted(found.items())
    }


def data_text(results: dict[str, Result]) -> str:
    """Return the file that the package ships: the date, and what passed."""
    date = max((result.date for result in results.values()), default="")
    ranges = tested_ranges(results.values())
    return json.dumps({"date": date, "packages": ranges}, indent=1) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    texts = [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in texts)


def page_text(results: dict[str, Result]) -> str:
    """Return docs/versions.md."""
    ordered = [results[name] for name in sorted_names(results)]
    ranges = tested_ranges(ordered)
    packages = dict.fromkeys(package_of(result.cell) for result in ordered)
    rows = []
    for package in packages:
        low, high = ranges.get(package, ["none", "none"])
        bad = [r for r in ordered if package_of(r.cell) == package and r.state != "passed"]
        rows.append([package, low, high, ", ".join(f"`{r.cell}`" for r in bad) or "none"])
    head = ["package", "oldest that passes", "newest that passes", "cells that do not pass"]
    date = max((result.date for result in ordered), default="never")
    parts = [INTRO.format(date=date, table=table(head, rows))]
    for package, group in itertools.groupby(ordered, key=lambda r: package_of(r.cell)):
        parts.append(f"## {package}\n")
        for tests, same in itertools.groupby(group, key=lambda r: tuple(r.tests)):
            parts += _section(tests, list(same))
    return "\n".join(parts)


def _section(tests: tuple[str, ...], results: list[Result]) -> list[str]:
    """Return the part of the page on cells that ran the same tests."""
    head = ["cell", "ran with", "passed", "skipped", "result", "date"]
    rows = [
        [
            f"`{result.cell}`",
            versions_text(result) or "-",
            str(result.passed),
            str(result.skipped),
            outcome(result),
            result.date,
        ]
        for result in results
    ]
    parts = [f"Tests: {', '.join(f'`{name}`' for name in tests)}.\n", table(head, rows) + "\n"]
    skips = _skip_rows(results)
    return [*parts, table(["skipped because", "tests", "in"], skips) + "\n"] if skips else parts


def _skip_rows(results: list[Result]) -> list[list[str]]:
    """Return the reasons of skips, each count with the cells that have it."""
    ran = [result for result in results if result.state != "not run"]
    cells = defaultdict(list)
    for result in ran:
        for reason, count in result.skips.items():
            cells[reason, count].append(f"`{result.cell}`")
    return [
        [reason, str(count), "all" if len(names) == len(ran) else ", ".join(names)]
        for (reason, count), names in sorted(cells.items())
    ]


def outcome(result: Result) -> str:
    """Return how a cell ended, in words."""
    if result.state == "passed":
        return "passed"
    if result.reason:
        return f"{result.state}: {result.reason}"
    more = f" and {len(result.failures) - 1} more" if len(result.failures) > 1 else ""
    return f"failed: `{result.failures[0]}`{more}"


def versions_text(result: Result) -> str:
    """Return the versions that a cell ran with, its own package first."""
    own = package_of(result.cell)
    names = sorted(result.versions, key=lambda name: (name != own, name))
    return ", ".join(f"{name} {result.versions[name]}" for name in names)


def record(results: Iterable[Result]) -> None:
    """Put results in the place of older ones of the same cells, and write all three files."""
    kept = read_results() | {result.cell: result for result in results}
    RESULTS.write_text(results_text(kept), encoding="utf-8")
    PAGE.write_text(page_text(kept), encoding="utf-8")
    DATA.write_text(data_text(kept), encoding="utf-8")
