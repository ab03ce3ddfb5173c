"""Unpack the parts of a kit, and say which environment its stages get."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import lzma
import os
import platform
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHOWN = ("torch", "triton", "tilelang", "numpy", "fla-core", "flash-qla", "pytest", "hypothesis")
DONE = ".unpacked.json"


class NoTreeError(RuntimeError):
    """Report that the repository of a kit cannot be unpacked, without which nothing runs."""


@dataclass
class Kit:
    """Hold an unpacked kit.

    Attributes:
        root: where it is unpacked.
        manifest: what it consists of.
        paths: folders of packages.
        variables: of the environment, such as those of caches.
        trouble: which parts could not be unpacked.
    """

    root: Path
    manifest: dict[str, Any] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    trouble: list[str] = field(default_factory=list)

    @property
    def tree(self) -> Path:
        """Return the folder of the repository."""
        return self.root / "tree"

    def environment(self) -> dict[str, str]:
        """Return the environment of a stage: packages of the kit first, its caches, no network."""
        path = os.pathsep.join([str(self.tree), *self.paths])
        own = {"GDN_OPS_CACHE": str(self.root / "certificates"), "PYTHONUNBUFFERED": "1"}
        return {**os.environ, "PYTHONPATH": path, **own, **self.variables}


def unpack(archive: Path, root: Path) -> Kit:
    """Unpack the parts that lie beside run.py, side by side, unless they are there already.

    A part that the machine has already (`unless`) is left packed.

    Raises:
        NoTreeError: the repository cannot be unpacked.
    """
    manifest = json.loads((archive / "manifest.json").read_text(encoding="utf-8"))
    kit = Kit(root, manifest)
    root.mkdir(parents=True, exist_ok=True)
    done = root / DONE
    is_there = done.exists() and json.loads(done.read_text(encoding="utf-8")) == manifest
    wanted = [part for part in manifest["parts"] if not has_all(part.get("unless", []))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        errors = list(pool.map(lambda part: is_there or _unpack(archive, root, part), wanted))
    for part, error in zip(wanted, errors, strict=True):
        folder = str(root / part["folder"])
        if isinstance(error, str):
            kit.trouble.append(f"part {part['name']} is left out: {error}")
            if part["folder"] == "tree":
                raise NoTreeError(kit.trouble[-1])
        elif part.get("variable"):
            kit.variables[part["variable"]] = folder
            relocate(Path(folder))
        elif part["folder"] != "tree":
            kit.paths.append(folder)
    if not kit.trouble:
        done.write_text(json.dumps(manifest), encoding="utf-8")
    return kit


def relocate(cache: Path) -> None:
    """Let the groups of files in a cache of Triton name them where they lie now.

    Triton writes whole paths, and compiles again where they lead nowhere.
    """
    for group in cache.glob("*/__grp__*.json"):
        names = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
        paths = {name: str(group.parent / name) for name in names}
        group.write_text(json.dumps({"child_paths": paths}), encoding="utf-8")


def has_all(modules: list[str]) -> bool:
    """Return whether this Python has modules, of which at least one is named."""
    return bool(modules) and all(importlib.util.find_spec(name) for name in modules)


def _unpack(archive: Path, root: Path, part: dict[str, Any]) -> str | bool:
    """Unpack one part; return an error, or True."""
    try:
        with (archive / part["file"]).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != part["sha256"]:
                return "its checksum is another than in the manifest"
        with tarfile.open(archive / part["file"]) as tar:
            tar.extractall(root / part["folder"], filter="tar")
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
        return f"{type(error).__name__}: {error}"
    return True


def installed_versions(kit: Kit) -> dict[str, str]:
    """Return the versions that stages run with, by name; packages that are missing are left out."""
    versions = {"python": platform.python_version()}
    for found in importlib.metadata.distributions(path=[*sys.path[1:], *reversed(kit.paths)]):
        name = (found.metadata["Name"] or "").lower().replace("_", "-")
        if name in SHOWN:
            versions[name] = found.version
    return versions
