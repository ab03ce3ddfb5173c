"""Look for wrong accesses and races in tiny calls: `python sanitize.py BACKEND ...`.

compute-sanitizer is the program that KIT_TOOL names.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHECKS = ("memcheck", "racecheck")
FOUND = 99
SUMMARIES = ("ERROR SUMMARY", "RACECHECK SUMMARY", "=========     at", "Error")


def main(backends: list[str]) -> int:
    """Run each check on each backend, print what it says; return 1 if any finds something."""
    calls = Path(__file__).with_name("tiny_calls.py")
    wrong = 0
    # torch's own allocator would hide an access behind the end of a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check in CHECKS:
        for backend in backends:
            tool = [os.environ["KIT_TOOL"], "--tool", check, "--error-exitcode", str(FOUND)]
            done = subprocess.run(
                [*tool, sys.executable, str(calls), backend],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            lines = done.stdout.splitlines()
            shown = [line for line in lines if any(text in line for text in SUMMARIES)][-3:]
            verdict = {0: "nothing found", FOUND: "FOUND"}.get(done.returncode, "did not run")
            print(f"{check} {backend}: {verdict}: {' | '.join(shown or lines[-2:])}", flush=True)
            wrong += done.returncode != 0
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
