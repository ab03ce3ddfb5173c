"""Fuzz backends for a long time: `python -m gdn_ops.testing.fuzz --seconds 600`.

Every subject of every installed backend is judged in turn on random examples; failures are kept in
hypothesis' example database and tried first the next time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque

from hypothesis import settings
from hypothesis.database import DirectoryBasedExampleDatabase

from gdn_ops.dispatch.registry import Backend, get_backend, known_backends
from gdn_ops.testing.conformance import Subject, run_subject, subjects


def main(arguments: list[str] | None = None) -> int:
    """Fuzz backends until the time is up; return 1 if one failed, else 0."""
    parser = argparse.ArgumentParser(description="Fuzz gdn_ops backends with random calls.")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long")
    parser.add_argument("--backend", action="append", help="name; every installed one by default")
    parser.add_argument("--database", default=".hypothesis/examples", help="folder of failures")
    options = parser.parse_args(arguments)
    profile = settings(database=DirectoryBasedExampleDatabase(options.database), derandomize=False)
    names = options.backend or known_backends()
    waiting: deque[tuple[str, Subject]] = deque()
    for name in names:
        backend = get_backend(name)
        if isinstance(backend, Backend):
            waiting += [(name, subject) for subject in subjects(backend)]
        else:
            print(f"{name}: {backend}")
    deadline = time.perf_counter() + options.seconds
    examples, failures = 0, 0
    while waiting and time.perf_counter() < deadline:
        name, subject = waiting.popleft()
        row = run_subject(name, subject, examples=40, deadline=deadline, profile=profile)
        examples += row.examples
        print(f"{'ok   ' if row.passed else 'WRONG'} {name}: {row.subject} ({row.examples})")
        if row.passed:
            waiting.append((name, subject))
        else:
            failures += 1
            print(row.failure)
    print(f"{examples} examples, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
