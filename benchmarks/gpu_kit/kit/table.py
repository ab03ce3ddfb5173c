"""Put measured rows into a table of configurations, for the stages that follow."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

MOST_SECONDS = 30.0


def add_rows(path: Path, rows: Sequence[str], environment: Mapping[str, str]) -> str:
    """Append rows to a module of tables, unless it then cannot be read; return what was done.

    Rows of decode ops go into its dict STEP, all others into SEQUENCE.
    """
    try:
        before = path.read_text(encoding="utf-8")
        entries = [entry(row) for row in rows]
        lines = [f"{'STEP' if 'StepConfig(' in e else 'SEQUENCE'} |= {{{e}}}\n" for e in entries]
        path.write_text(f"{before}\n\n# Measured on this machine.\n{''.join(lines)}")
    except (OSError, SyntaxError, ValueError) as error:
        return f"{path.name}: rows are not used: {error}"
    module = ".".join(["gdn_ops", *path.with_suffix("").parts[-4:]])
    error = import_error(module, environment)
    if error:
        path.write_text(before, encoding="utf-8")
        return f"{path.name}: rows are not used: {error}"
    return f"{path.name}: the stages that follow use {len(rows)} measured rows"


def import_error(module: str, environment: Mapping[str, str]) -> str:
    """Return why a fresh process cannot import a module, or ""."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=MOST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"it takes longer than {MOST_SECONDS:.0f} s to import"
    lines = done.stderr.strip().splitlines() or ["no output"]
    return lines[-1] if done.returncode else ""


def entry(row: str) -> str:
    """Return a row without the comma at its end.

    Raises:
        ValueError, SyntaxError: it is no entry of a dict.
    """
    text = row.strip().rstrip(",")
    tree = ast.parse(f"{{{text}}}", mode="eval")
    if not isinstance(tree.body, ast.Dict) or len(tree.body.keys) != 1:
        raise ValueError(f"this is no row: {row}")
    return text
