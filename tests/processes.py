"""Run code in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from paths import ROOT


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with arguments, in the repository and with more environment variables."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def printed(code: str, *arguments: object, **environment: str) -> str:
    """Run code in a fresh process, which should not fail, and return what it prints."""
    done = python("-c", code, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip()
