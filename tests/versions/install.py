"""Install a cell: what differs from the locked environment, into a folder of its own.

pip says what would change in the environment that runs this; that alone goes into the folder,
which then comes first on PYTHONPATH. So torch is shared by every cell that does not ask for
another. A cell of another Python gets a whole environment, made by `make venv`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from packaging.utils import canonicalize_name

from versions.cells import ROOT, Cell, NotRunError
from versions.lock import resolve

FOLDER = ROOT / ".versions"

Runner = Callable[[list[str], dict[str, str]], None]
"""Runs a command with additions to the environment; raises NotRunError when it fails."""


def environment() -> list[str]:
    """Return the Python that runs this, and every package that is installed for it."""
    installed = {f"{d.name}=={d.version}" for d in importlib.metadata.distributions()}
    return [platform.python_version(), *sorted(installed)]


def install(cell: Cell, run: Runner) -> dict[str, str]:
    """Install what a cell needs unless it is there; return its versions by name."""
    if not cell.requirements:
        return {}
    folder = FOLDER / cell.name
    marker = folder / ".installed.json"
    asked = {"requirements": list(cell.requirements), "environment": environment()}
    there = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else {}
    if cell.version == "newest" or there != {**there, **asked}:
        options = [] if cell.deps else ["--no-deps"]
        options += ["--upgrade"] if cell.version == "newest" else []
        packages = resolve(*options, *cell.requirements, run=lambda command: run(command, {}))
        versions = {canonicalize_name(entry["name"]): entry["version"] for entry in packages}
        wanted = {**asked, "versions": versions}
        if there != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            if versions:
                pins = [f"{name}=={version}" for name, version in versions.items()]
                options = ["--quiet", "--no-deps", "--no-compile", "--target", str(folder)]
                run([sys.executable, "-m", "pip", "install", *options, *pins], {})
            marker.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
            there = wanted
    return there["versions"]


def interpreter(cell: Cell, run: Runner) -> str:
    """Return the Python that runs a cell: this one, or of a venv that `make venv` makes.

    Raises:
        NotRunError: there is no such Python.
    """
    if cell.package != "python":
        return sys.executable
    here = sys.version_info[:2]
    pythons = {**find_pythons(), here: sys.executable}
    wanted = max(pythons)
    if cell.version != "newest":
        wanted = tuple(map(int, cell.version.split(".")[:2]))
    elif wanted == here:
        raise NotRunError(f"no Python newer than {here[0]}.{here[1]}", excused=True)
    if wanted not in pythons:
        # A newer one need not be here; an older one is this library's own lower bound.
        raise NotRunError(f"no Python {cell.version}", excused=wanted > here)
    if wanted == here:
        return sys.executable
    beside = [text.replace("==", "-").removesuffix(".*") for text in cell.beside]
    folder = FOLDER / "-".join(["python", ".".join(map(str, wanted)), *beside])
    command = [
        "make",
        "--no-print-directory",
        "venv",
        f"VENV={folder}",
        f"PYTHON={pythons[wanted]}",
        *(f"TORCH={torch}" for torch in cell.beside),
    ]
    run(command, {"MAKEFLAGS": ""})
    return str(folder / "bin" / "python")


def find_pythons() -> dict[tuple[int, ...], str]:
    """Return an interpreter for each Python from 3.11 on, of the PATH or of pyenv, by version."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    pythons: dict[tuple[int, ...], str] = {}
    for folder in (*map(Path, os.get_exec_path()), *pyenv.glob("versions/*/bin")):
        for path in folder.glob("python3.[0-9][0-9]"):
            minor = int(path.name.removeprefix("python3."))
            # pyenv's shims are there for versions that it then refuses to run.
            if minor >= 11 and folder.name != "shims":
                pythons.setdefault((3, minor), str(path))
    return pythons
