"""Compare backends with the definition on few calls: `python short_check.py SECONDS BACKEND ...`.

Each backend gets an equal share of the time, and a process of its own, so that one that crashes
costs no other its check.
"""

from __future__ import annotations

import os
import subprocess
import sys

DEVICE = os.environ.get("KIT_DEVICE", "cuda")


def check(backend: str, seconds: float) -> int:
    """Check one backend in this process, print how far it came; return 1 if it is wrong."""
    from gdn_ops.bench.gpu.conformance import short_check

    last = None
    for last in short_check(backend, DEVICE, seconds):
        print(f"{backend}: {last}", flush=True)
    return 0 if last is not None and last.passed else 1


def main(words: list[str]) -> int:
    """Check each backend in a process; return 1 if any is wrong."""
    seconds, *backends = words
    if len(backends) == 1:
        return check(backends[0], float(seconds))
    share = str(float(seconds) / len(backends))
    codes = {}
    for name in backends:
        codes[name] = subprocess.run([sys.executable, __file__, share, name]).returncode
        print(f"{name}: {'passed' if codes[name] == 0 else f'exit code {codes[name]}'}", flush=True)
    return 1 if any(codes.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
