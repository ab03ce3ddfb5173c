"""Store emulated kernels on disk, by a key of everything that shapes their code.

TileLang's own cache asks for the traced function. Emulated kernels have a folder of their own
beside it, whose key is everything that the traced function is made of: the source of the kernels
and of the emulation, the constants, the versions, the compiler. So a kernel that was compiled once
runs again without TileLang being imported.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
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


DISK_ERRORS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of a disk that is full, of one that is read-only, and of a folder of someone else."""

CURE: Final = "set TILELANG_CACHE_DIR to a folder that can be written"

_log = logging.getLogger("gdn_ops")
_given_up: dict[Path, Path] = {}
"""Folders that could not be written, and those for temporary files that took their place."""


def configured() -> Path:
    """Return TILELANG_CACHE_DIR, or ~/.tilelang/cache, TileLang's own folder."""
    return Path(os.environ.get("TILELANG_CACHE_DIR") or "~/.tilelang/cache").expanduser()


def folder() -> Path:
    """Return the folder of emulated kernels and of the logs of failed compilations.

    "gdn_ops" in `configured()`; where that cannot be written, a folder for temporary files.
    """
    path = configured() / "gdn_ops"
    if path not in _given_up:
        try:
            _check(path)
        except OSError as error:
            return instead_of(path, error)
    return _given_up.get(path, path)


@functools.cache
def _check(path: Path) -> None:
    """Make a folder and write to it.

    Raises:
        OSError: that is not possible.
    """
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path) as file:
        file.write(bytes(4096))
        file.flush()


def instead_of(path: Path, error: OSError) -> Path:
    """Return a folder for temporary files, from now on taken instead of one that failed.

    Raises:
        OSError: there is none either.
    """
    given_up = next((own for own, other in _given_up.items() if other == path), path)
    _given_up[given_up] = Path(tempfile.mkdtemp(prefix="gdn_ops-tilelang-"))
    reason = error.strerror or error
    _log.warning("tilelang: kernels are not kept: %s: %s; %s", given_up, reason, CURE)
    return _given_up[given_up]


@contextlib.contextmanager
def writable() -> Iterator[None]:
    """Let TileLang itself write to the folder that took the place of one that failed."""
    path, own = configured() / "gdn_ops", folder()
    if own == path:
        yield
        return
    given = os.environ.get("TILELANG_CACHE_DIR")
    os.environ["TILELANG_CACHE_DIR"] = str(own)
    try:
        yield
    finally:
        if given is None:
            del os.environ["TILELANG_CACHE_DIR"]
        else:
            os.environ["TILELANG_CACHE_DIR"] = given


def disk_error(text: str) -> OSError | None:
    """Return the error of a disk that a compiler reports in its own words, or None."""
    number = next((n for n in DISK_ERRORS if os.strerror(n) in text), None)
    return None if number is None else OSError(number, os.strerror(number))


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
    """Return the folder of a cache entry, or None if there is none.

    A disk that cannot be written may still hold it.
    """
    for own in (configured() / "gdn_ops", folder()):
        # A path may be too long for a disk.
        with contextlib.suppress(OSError):
            if (own / name / "kernel.json").is_file():
                return own / name
    return None


def description(entry: Path) -> dict[str, Any]:
    """Return the description that a cache entry was stored with."""
    facts: dict[str, Any] = json.loads((entry / "kernel.json").read_text())
    return facts


def store(name: str, library: Path, description: dict[str, Any], where: Path | None = None) -> Path:
    """Store a library and its description under a name, atomically; `where`: not in `folder()`."""
    own = folder() if where is None else where
    entry, scratch = own / name, own / f".{name}-{uuid.uuid4().hex}"
    scratch.mkdir()
    shutil.move(library, scratch / "kernel.so")
    (scratch / "kernel.json").write_text(json.dumps(description))
    try:
        scratch.rename(entry)
    except OSError:
        # Another process was faster, with the same.
        shutil.rmtree(scratch, ignore_errors=True)
    return entry


def keep_log(name: str, text: str) -> Path | None:
    """Write the text of a failed compilation to a log file; None where that is not possible."""
    with contextlib.suppress(OSError):
        logs = folder() / "failed"
        logs.mkdir(exist_ok=True)
        path = logs / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.log"
        path.write_text(text)
        return path
    return None
