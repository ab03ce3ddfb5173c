"""Say where the repository is, what its package consists of, and what is built in it."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ORT_LIBRARY = ROOT / "native" / "build" / "libgdn_ops_ort.so"

FOLDERS = {"gdn_ops": "gdn_ops", "backends": "gdn_ops/backends", "export": "gdn_ops/export"}
"""Each folder of the package and where it stands in the wheel."""


def copy_package(to: Path) -> Path:
    """Copy the folders of the package, without what is built in them; return where to."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, to / folder, symlinks=True, ignore=ignore)
    return to


def copy_source(to: Path) -> Path:
    """Copy all that a build of the distribution reads; return where to."""
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, to)
    shutil.copytree(ROOT / "native", to / "native", ignore=shutil.ignore_patterns("build", "__*"))
    return copy_package(to)
