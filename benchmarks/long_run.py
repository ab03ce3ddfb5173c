"""Check a backend on thousands of drawn calls: `python benchmarks/long_run.py triton`.

It runs `gdn-ops check` again and again, each time on other calls, until the summary
`results/check-BACKEND.json` has as many as are wanted. It may be stopped at any time and started
again: the summary is added to, and says of each run which sources were checked.
"""

from __future__ import annotations

import argparse
import json
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

from gdn_ops.bench.rows import describe_system, write_json
from gdn_ops.dispatch.registry import Backend, get_backend
from gdn_ops.environment.provenance import source_hash

RESULTS = Path(__file__).parent / "results"


def start(backend: str, seconds: float) -> subprocess.Popen[str]:
    """Start a check of a backend in a process of its own, with a seed of its own."""
    seed = str(secrets.randbelow(2**31))
    command = [sys.executable, "-m", "gdn_ops", "check", "--backend", backend, "--json"]
    return subprocess.Popen(
        [*command, "--seconds", str(seconds), "--seed", seed], stdout=subprocess.PIPE, text=True
    )


def add(path: Path, report: dict[str, Any], sources: str) -> dict[str, Any]:
    """Add the report of a check to the summary in a file, and return the summary."""
    if path.exists():
        summary = json.loads(path.read_text())
    else:
        summary = {"backend": report["backend"], "calls": 0, "passed": True}
        summary |= {"system": {}, "subjects": {}, "runs": []}
    for row in report["rows"]:
        kept = summary["subjects"].setdefault(row["subject"], {"calls": 0, "worst": 0.0})
        kept["calls"] += row["examples"]
        if row["failure"] is None:
            kept["worst"] = max(kept["worst"], row["worst"])
        else:
            kept.setdefault("failures", []).append(row["failure"])
    summary["calls"] += report["examples"]
    summary["passed"] &= report["passed"]
    summary["system"] = describe_system(device=report["device"])
    kept = {"date": summary["system"]["date"], "sources": sources}
    summary["runs"].append(kept | {n: report[n] for n in ("seed", "seconds", "examples", "passed")})
    write_json(summary, path)
    return summary  # type: ignore[no-any-return]


def main() -> int:
    """Run checks until the summary has enough calls; return 1 if any in it failed, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("backend", help="its name")
    parser.add_argument("--calls", type=int, default=10_000, help="how many in all (10000)")
    parser.add_argument("--seconds", type=float, default=600, help="of one check (600)")
    parser.add_argument("--processes", type=int, default=1, help="checks side by side (1)")
    options = parser.parse_args()
    backend = get_backend(options.backend)
    if not isinstance(backend, Backend):
        parser.error(f"backend {options.backend!r}: {backend}")
    path, sources = RESULTS / f"check-{options.backend}.json", source_hash(type(backend))
    summary = json.loads(path.read_text()) if path.exists() else {"calls": 0, "passed": True}
    while summary["calls"] < options.calls:
        checks = [start(options.backend, options.seconds) for _ in range(options.processes)]
        outputs = [check.communicate()[0] for check in checks]
        for check, output in zip(checks, outputs, strict=True):
            if check.returncode not in (0, 1):
                return check.returncode
            (report,) = json.loads(output)["reports"]
            summary = add(path, report, sources)
        verdict = "passed" if summary["passed"] else "FAILED"
        print(f"{summary['calls']} calls, {verdict}", flush=True)
    return 0 if summary["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
