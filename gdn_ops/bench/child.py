"""Run measurements in processes of their own: an order in as JSON, an answer out as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gdn_ops


def child_environment() -> dict[str, str]:
    """Return environment variables with which a child process imports this same gdn_ops."""
    root = str(Path(gdn_ops.__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def ask(module: str, order: dict[str, Any]) -> Any:
    """Run `python -m module JSON`; return its last line, parsed, or a text that says why it failed.

    Args:
        module: its name; its answer must not be a string.
        order: its argument.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(order)],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines()
    return f"the measuring process ended with {done.returncode}: {lines[-1] if lines else ''}"
