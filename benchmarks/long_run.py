"""Check a backend on thousands of drawn calls: `python benchmarks/long_run.py triton`.

It runs the conformance kit again and again, each time on other calls, until the summary
`results/check-BACKEND.json` has as many as are wanted. It may be stopped at any time and started
again: the summary is added to, and says of each run which sources were checked.

`--level` names a level of `cpp`, `--dtype` dtypes of q, k and v, and `--only` a part of the names
of subjects: "equal the definition" is of those that compare outputs, states and every gradient
with the definition. The calls are counted for each choice of these by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gdn_ops.backends.cpp import library
from gdn_ops.bench.child import call
from gdn_ops.bench.rows import describe_system, write_json
from gdn_ops.dispatch.registry import Backend, get_backend
from gdn_ops.environment.provenance import source_hash
from gdn_ops.testing import conformance

RESULTS = Path(__file__).parent / "results"

Part = dict[str, str]
"""Hold what was drawn: level, dtype and only, "" where nothing was named."""


def read(path: Path, backend: str) -> dict[str, Any]:
    """Return the summary in a file, or an empty one."""
    if not path.exists():
        summary: dict[str, Any] = {"backend": backend, "calls": 0, "passed": True}
        return summary | {"system": {}, "parts": [], "subjects": {}, "runs": []}
    summary = json.loads(path.read_text())
    if "parts" not in summary:
        everything = {"level": "", "dtype": "", "only": ""}
        summary["parts"] = [everything | {"calls": summary["calls"], "passed": summary["passed"]}]
    return summary


def part_of(summary: dict[str, Any], part: Part) -> dict[str, Any]:
    """Return the entry of a part in a summary, which is made if it is missing."""
    parts: list[dict[str, Any]] = summary["parts"]
    found = next((kept for kept in parts if part.items() <= kept.items()), None)
    if found is None:
        found = part | {"calls": 0, "passed": True}
        parts.append(found)
    return found


def add(summary: dict[str, Any], report: conformance.CheckReport, part: Part, sources: str) -> None:
    """Add the report of a check to a summary."""
    for row in report.rows:
        kept = summary["subjects"].setdefault(row.subject, {"calls": 0, "worst": 0.0})
        kept["calls"] += row.examples
        if row.failure is None:
            kept["worst"] = max(kept["worst"], row.worst)
        else:
            kept.setdefault("failures", []).append(row.failure)
    for counted in (summary, part_of(summary, part)):
        counted["calls"] += report.examples
        counted["passed"] &= report.passed
    summary["system"] = describe_system(device=report.device)
    run: dict[str, Any] = {"date": summary["system"]["date"], "sources": sources, **part}
    run |= {name: getattr(report, name) for name in ("seed", "seconds", "examples", "passed")}
    summary["runs"].append(run)


def main() -> int:
    """Run checks until the part has enough calls; return 1 if any in it failed, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("backend", help="its name")
    parser.add_argument("--calls", type=int, default=10_000, help="how many in all (10000)")
    parser.add_argument("--seconds", type=float, default=600, help="of one check (600)")
    parser.add_argument("--processes", type=int, default=1, help="checks side by side (1)")
    parser.add_argument("--level", default="", help="of cpp (the fastest)")
    parser.add_argument("--dtype", default="", help="dtypes of q, k and v, with commas (all)")
    parser.add_argument("--only", default="", help="a part of the names of subjects (all)")
    options = parser.parse_args()
    if options.level:
        # Read by the processes that check.
        os.environ[library.LEVEL] = options.level
    backend = get_backend(options.backend)
    if not isinstance(backend, Backend):
        parser.error(f"backend {options.backend!r}: {backend}")
    if backend.absence():
        parser.error(f"backend {options.backend!r}: {backend.absence()}")
    part = {"level": options.level, "dtype": options.dtype, "only": options.only}
    part["level"] = type(backend).tools("cpu").get("level", "")
    dtypes = options.dtype.split(",") if options.dtype else None
    path, sources = RESULTS / f"check-{options.backend}.json", source_hash(type(backend))
    summary = read(path, options.backend)
    while part_of(summary, part)["calls"] < options.calls:

        def check(seed: int) -> conformance.CheckReport | str:
            named = {"seed": seed, "only": options.only, "dtypes": dtypes}
            found: conformance.CheckReport | str = call(
                conformance.check, options.backend, options.seconds, **named
            )
            return found

        seeds = [secrets.randbelow(2**31) for _ in range(options.processes)]
        with ThreadPoolExecutor(options.processes) as pool:
            reports = list(pool.map(check, seeds))
        for report in reports:
            if isinstance(report, str):
                print(report, file=sys.stderr)
                return 2
            add(summary, report, part, sources)
        write_json(summary, path)
        kept = part_of(summary, part)
        verdict = "passed" if kept["passed"] else "FAILED"
        print(f"{kept['calls']} calls, {verdict}", flush=True)
    return 0 if part_of(summary, part)["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
