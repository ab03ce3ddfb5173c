"""No file, function or kernel is longer than a reader can hold."""

from __future__ import annotations

import ast
from pathlib import Path

from paths import ROOT

FILE, FUNCTION, KERNEL = 450, 60, 120
"""The most lines of a file, of a function, and of a function in a folder `kernels`."""

FOLDERS = ("gdn_ops", "backends", "export", "tests", "benchmarks", "examples", "docs")


def sources() -> dict[Path, str]:
    """Return the text of every Python file, by its path in the repository."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 250
    return {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in files}


def test_no_file_is_too_long() -> None:
    lengths = {path: text.count("\n") for path, text in sources().items()}
    assert [f"{path}: {lines}" for path, lines in lengths.items() if lines > FILE] == []


def test_no_function_is_too_long() -> None:
    # A factory counts with the kernel that it holds.
    too_long = []
    for path, text in sources().items():
        most = KERNEL if "kernels" in path.parts else FUNCTION
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > most:
                    too_long.append(f"{path}:{node.lineno} {node.name}: {lines}")
    assert too_long == []
