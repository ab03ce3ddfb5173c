"""Store emulated kernels on disk, by a key of everything that shapes their code.

TileLang's own cache asks for the traced function. Emulated kernels have a folder of their own
beside it, whose key is everything that the traced function is made of: the source of the kernels
and of the emulation, the constants, the versions, the compiler. So a kernel that was compiled once
runs again without TileLang being imported.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

EMULATION: Final = Path(__file__).resolve().parents[1] / "emulation"
"""The folder of the modules that decide what is emulated, and how."""


def folder() -> Path:
    """Return the folder of emulated kernels and of the logs of failed compilations.

    TILELANG_CACHE_DIR, or ~/.tilelang/cache, and "gdn_ops" in it; where that cannot be written, a
    folder for temporary files.
    """
    own = os.environ.get("TILELANG_CACHE_DIR") or "~/.tilelang/cache"
    return _writable(Path(own).expanduser() / "gdn_ops")


@functools.cache
def _writable(path: Path) -> Path:
    with contextlib.suppress(OSError):
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
    return Path(tempfile.mkdtemp(prefix="gdn_ops-tilelang-"))


def key(make: Callable[..., Any], constants: dict[str, Any], *more: Any) -> str:
    """Return the cache key of a kernel: its factory, its constants, what else it depends on."""
    described = (
        f"{make.__module__}.{make.__qualname__}",
        sorted((name, repr(value)) for name, value in constants.items()),
        _sources(make.__module__),
        *_machine(),
        *map(repr, more),
    )
    return hashlib.sha256(repr(described).encode()).hexdigest()[:32]


@functools.cache
def _sources(module: str) -> str:
    """Hash the sources of the emulation, of a module, and of the project's modules it imports."""
    files: set[Path] = set()
    _add(module, files)
    files |= set(EMULATION.glob("*.py"))
    digest = hashlib.sha256()
    # In the order of what is hashed, which does not depend on where it lies.
    for name, source in sorted((path.name, path.read_bytes()) for path in files):
        digest.update(name.encode() + b"\0" + source)
    return digest.hexdigest()


def _add(module: str, files: set[Path]) -> None:
    """Add the file of a module, and the files of the modules that it imports, to a set.

    Other modules are told by their versions, or are Python's own: only those of gdn_ops count, and
    those in the folder of a kernel that lives outside of it.
    """
    path = _file(module)
    if path.suffix != ".py" or path in files:
        return
    files.add(path)
    for name in _imported(path):
        if name.partition(".")[0] == "gdn_ops" or _file(name).parent == path.parent:
            _add(name, files)


def _file(module: str) -> Path:
    """Return the file of a module, loaded or not; an empty path where there is no such module."""
    loaded = sys.modules.get(module)
    if loaded is not None:
        return Path(getattr(loaded, "__file__", None) or "").resolve()
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return Path()
    return Path((spec and spec.origin) or "").resolve()


def _imported(path: Path) -> Iterator[str]:
    """Yield the names of modules that a file imports, and imported names that may be modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def _machine() -> tuple[str, ...]:
    """Return the versions and processor features that compiled code depends on."""
    versions = [importlib.metadata.version(name) for name in ("tilelang", "apache-tvm-ffi")]
    features = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return (*versions, platform.machine(), features)


def stored(name: str) -> Path | None:
    """Return the folder of a cache entry, or None if there is none."""
    path = folder() / name
    return path if (path / "kernel.json").is_file() else None


def description(entry: Path) -> dict[str, Any]:
    """Return the description that a cache entry was stored with."""
    facts: dict[str, Any] = json.loads((entry / "kernel.json").read_text())
    return facts


def store(name: str, library: Path, description: dict[str, Any]) -> Path:
    """Store a library and its description under a name, atomically."""
    entry = folder() / name
    scratch = folder() / f".{name}-{uuid.uuid4().hex}"
    scratch.mkdir()
    shutil.move(library, scratch / "kernel.so")
    (scratch / "kernel.json").write_text(json.dumps(description))
    try:
        scratch.rename(entry)
    except OSError:
        # Another process was faster, with the same.
        shutil.rmtree(scratch, ignore_errors=True)
    return entry


def keep_log(name: str, text: str) -> Path:
    """Write the text of a failed compilation to a log file, and return its path."""
    logs = folder() / "failed"
    logs.mkdir(exist_ok=True)
    path = logs / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.log"
    path.write_text(text)
    return path
