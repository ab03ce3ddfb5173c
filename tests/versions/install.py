"""Install a cell: what differs from the locked environment, into a folder of its own.

pip says what would change in the environment that runs this; that alone goes into the folder,
which then comes first on PYTHONPATH. So torch is shared by every cell that does not ask for
another. A cell of another Python gets a whole environment, made by `make venv`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from versions.cells import ROOT, Cell
from versions.process import NotRunError

FOLDER = ROOT / ".versions"
MARKER = ".installed.json"
OLDEST_MINOR = 11

Runner = Callable[[list[str], dict[str, str]], None]
"""Runs a command with additions to the environment; raises NotRunError when it fails."""


@dataclass(frozen=True)
class Installed:
    """Say how a cell is run: its interpreter, what comes first on its path, what pip chose."""

    python: str
    path: Path | None = None
    versions: tuple[tuple[str, str], ...] = ()


def environment_hash() -> str:
    """Return a hash of every package that is installed where this runs, and of the Python."""
    found = {(d.name, d.version) for d in importlib.metadata.distributions()}
    text = json.dumps([platform.python_version(), *sorted(found)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def resolve(cell: Cell, run: Runner) -> dict[str, str]:
    """Return what pip would install for a cell into the locked environment, by name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--quiet", "--report", str(report)]
        options += [] if cell.group.deps else ["--no-deps"]
        options += ["--upgrade"] if cell.version == "newest" else []
        run([sys.executable, "-m", "pip", "install", *options, *cell.requirements], {})
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {normalized(entry["metadata"]["name"]): entry["metadata"]["version"] for entry in found}


def normalized(name: str) -> str:
    """Return the name of a package as the lock spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def install(cell: Cell, run: Runner) -> Installed:
    """Install what a cell needs, unless it is there, and return how it is run."""
    if cell.group.package == "python":
        return install_python(cell.version, run)
    if not cell.requirements:
        return Installed(sys.executable)
    folder = FOLDER / cell.name
    marker = folder / MARKER
    asked = {"requirements": list(cell.requirements), "environment": environment_hash()}
    there = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else {}
    if cell.version == "newest" or any(there.get(key) != value for key, value in asked.items()):
        versions = resolve(cell, run)
        if there != {**asked, "versions": versions}:
            fill(folder, versions, run)
            there = {**asked, "versions": versions}
            marker.write_text(json.dumps(there, indent=1), encoding="utf-8")
    return Installed(sys.executable, folder, tuple(there["versions"].items()))


def fill(folder: Path, versions: dict[str, str], run: Runner) -> None:
    """Install exactly these versions into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if versions:
        pins = [f"{name}=={version}" for name, version in versions.items()]
        options = ["--quiet", "--no-deps", "--no-compile", "--target", str(folder)]
        run([sys.executable, "-m", "pip", "install", *options, *pins], {})


def install_python(version: str, run: Runner) -> Installed:
    """Return the environment of a Python: this one, or one that `make venv` makes of the lock."""
    here = sys.version_info[:2]
    found = find_pythons()
    if version == "newest":
        newer = {minor: python for minor, python in found.items() if minor > here}
        if not newer:
            raise NotRunError(f"no Python newer than {'.'.join(map(str, here))}", excused=True)
        wanted = max(newer)
    else:
        wanted = tuple(map(int, version.split(".")[:2]))
    if wanted == here:
        return Installed(sys.executable)
    if wanted not in found:
        raise NotRunError(f"no Python {version}")
    folder = FOLDER / f"python-{'.'.join(map(str, wanted))}"
    command = ["make", "--no-print-directory", "venv", f"VENV={folder}", f"PYTHON={found[wanted]}"]
    run(command, {"MAKEFLAGS": ""})
    return Installed(str(folder / "bin" / "python"))


def _candidates() -> Iterable[Path]:
    """Yield interpreters on the PATH, then those of pyenv."""
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        yield from Path(folder).glob("python3.[0-9][0-9]")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from pyenv.glob("versions/*/bin/python3.[0-9][0-9]")


def find_pythons() -> dict[tuple[int, ...], str]:
    """Return an interpreter for each Python that is there, from 3.11 on, by its version."""
    found: dict[tuple[int, ...], str] = {}
    for path in _candidates():
        minor = int(path.name.removeprefix("python3."))
        # pyenv's shims are there for versions that it then refuses to run.
        if minor >= OLDEST_MINOR and path.parent.name != "shims":
            found.setdefault((3, minor), str(path))
    return found
