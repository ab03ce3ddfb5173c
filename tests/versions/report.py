"""Keep the last result of every cell, and make docs/versions.md and the package's data of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.version import Version

from versions.cells import ROOT, in_order
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


def read_results() -> dict[str, Result]:
    """Return the last recorded result of every cell by name."""
    recorded = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return {name: Result(name, **fields) for name, fields in recorded.items()}


def results_text(results: dict[str, Result]) -> str:
    """Return the file of results: what is worth keeping of each, in the order of the table."""
    kept = {name: dataclasses.asdict(results[name]) for name in in_order(results)}
    for fields in kept.values():
        del fields["cell"], fields["seconds"]
    return json.dumps(kept, indent=1) + "\n"


def tested_ranges(results: Iterable[Result]) -> dict[str, list[str]]:
    """Return the oldest and the newest version of each package that passed."""
    results_of = defaultdict(list)
    for result in results:
        if result.state == "passed":
            version = result.versions[result.package].partition("+")[0]
            if result.package == "python":
                version = version.rpartition(".")[0]
            results_of[result.package].append(version)
    return {
        name: [min(versions, key=Version), max(versions, key=Version)]
        for name, versions in sorted(results_of.items())
    }


def data_text(results: dict[str, Result]) -> str:
    """Return the file that the package ships: the date, and what passed."""
    date = max((result.date for result in results.values()), default="")
    ranges = tested_ranges(results.values())
    return json.dumps({"date": date, "packages": ranges}, indent=1) + "\n"


def page_text(results: dict[str, Result]) -> str:
    """Return docs/versions.md."""
    packages = defaultdict(list)
    for name in in_order(results):
        packages[results[name].package].append(results[name])
    ranges = tested_ranges(results.values())
    rows, parts = [], []
    for package, group in packages.items():
        bad = ", ".join(f"`{result.cell}`" for result in group if result.state != "passed")
        rows.append([package, *ranges.get(package, ["none", "none"]), bad or "none"])
        parts.append(f"## {package}\n")
        for tests, same in itertools.groupby(group, key=lambda result: result.tests):
            parts.append(f"Tests: {', '.join(f'`{name}`' for name in tests)}.\n")
            parts += tables(list(same))
    head = ["package", "oldest that passes", "newest that passes", "cells that do not pass"]
    date = max((result.date for result in results.values()), default="never")
    return "\n".join([INTRO.format(date=date, table=table(head, rows)), *parts])


def tables(results: list[Result]) -> list[str]:
    """Return the table of cells that ran the same tests, and that of what they skipped, if any."""
    head = ["cell", "ran with", "passed", "skipped", "result", "date"]
    rows = [
        [f"`{r.cell}`", r.ran_with, str(r.passed), str(r.skipped), outcome(r), r.date]
        for r in results
    ]
    ran = [result for result in results if result.state != "not run"]
    cells = defaultdict(list)
    for result in ran:
        for reason, count in result.skips.items():
            cells[reason, count].append(f"`{result.cell}`")
    skips = [
        [reason, str(count), "all" if len(names) == len(ran) else ", ".join(names)]
        for (reason, count), names in sorted(cells.items())
    ]
    sections = [(head, rows), (["skipped because", "tests", "in"], skips)]
    return [table(head, rows) + "\n" for head, rows in sections if rows]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    texts = [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in texts)


def outcome(result: Result) -> str:
    """Return how a cell ended, in words."""
    if result.state == "passed":
        return "passed"
    if result.reason:
        return f"{result.state}: {result.reason}"
    more = f" and {len(result.failures) - 1} more" if len(result.failures) > 1 else ""
    return f"failed: `{result.failures[0]}`{more}"


def record(results: Iterable[Result]) -> None:
    """Put results in the place of older ones of the same cells, and write all three files."""
    kept = read_results() | {result.cell: result for result in results}
    for path, text in ((RESULTS, results_text), (PAGE, page_text), (DATA, data_text)):
        path.write_text(text(kept), encoding="utf-8")
