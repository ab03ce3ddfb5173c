"""Load the library of kernels, choose its level, and let it share the threads of torch.

Nothing is compiled here, and nothing is loaded before it is asked for: `missing` says why there is
no library, `library` returns it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from gdn_ops.backends.cpp import build
from gdn_ops.kernel_support.cache import cache_folder
from gdn_ops.spec.names import unknown

LEVEL = "GDN_OPS_CPP_LEVEL"
"""The environment variable that names the level to run; the fastest without. Read on first use."""

PACKAGE = Path(__file__).resolve().parent
"""The folder where an installation puts the library."""

CURE = "run gdn-ops build"

_opened: Opened | None = None
_lock = threading.Lock()
_is_child = False
"""True in a process that was forked since this module was loaded."""


class LibraryError(Exception):
    """Report why a library cannot be used, in one line."""


class Team(NamedTuple):
    """Describe the OpenMP that torch computes with.

    Attributes:
        parallel: the address of its GOMP_parallel, or None.
        survives_forks: whether a child of this process may run in parallel again.
        note: why there is none.
    """

    parallel: int | None
    survives_forks: bool = True
    note: str | None = None


class Opened(NamedTuple):
    """Hold the library, or the reason why there is none."""

    library: ctypes.CDLL | None
    reason: str | None


def missing() -> str | None:
    """Return why the kernels cannot run in this process, or None if they can."""
    return _open().reason


def library() -> ctypes.CDLL:
    """Return the library, its level chosen, ready to compute.

    Raises:
        LibraryError: there is none; `missing` returns the same reason.
    """
    opened = _open()
    if opened.library is None:
        raise LibraryError(opened.reason)
    return opened.library


def level() -> str:
    """Return the name of the level that the library runs.

    Raises:
        LibraryError: there is no library.
    """
    name: bytes = library().gdn_level()
    return name.decode()


def threads() -> int:
    """Return how many threads a call may use: those of torch, or 1 where there is no team.

    A child of a fork has one, where the OpenMP of torch cannot start its threads anew.
    """
    found = team()
    if found.parallel is None or (_is_child and not found.survives_forks):
        return 1
    return torch.get_num_threads()


def check_status(status: int) -> None:
    """Check what a kernel returns.

    Raises:
        MemoryError: a thread found no memory to work in.
    """
    if status:
        raise MemoryError('backend "cpp": no memory for a thread to work in')


def user_folder() -> Path:
    """Return the folder of the user's cache for a library of these sources and this machine."""
    return cache_folder() / "cpp" / f"{platform.machine() or 'unknown'}-{_own_hash()}"


@functools.cache
def team() -> Team:
    """Find the OpenMP that torch computes with.

    One process should have one team: two would take each other's cores.
    """
    folder = Path(torch.__file__).parent / "lib"
    # A search of a library goes through all that it depends on.
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        with contextlib.suppress(OSError, AttributeError):
            loaded = ctypes.CDLL(str(folder / name))
            address = ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value
            # gdn_ops.dispatch.forks ends the threads before a fork with this function.
            return Team(address, hasattr(loaded, "omp_pause_resource_all"))
    return Team(None, note=f"no OpenMP in {folder}: the kernels run with one thread")


def _after_fork() -> None:
    global _is_child
    _is_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _own_hash() -> str:
    return build.source_hash()


def _open() -> Opened:
    """Return what was opened, and open it the first time."""
    global _opened
    if _opened is None:
        # Two threads must not try levels at once.
        with _lock:
            if _opened is None:
                _opened = _open_first()
    return _opened


def _open_first() -> Opened:
    reasons = []
    for path in _candidates():
        try:
            opened = open_library(path, _own_hash())
            choose_level(opened, os.environ.get(LEVEL, ""))
        except LibraryError as error:
            reasons.append(str(error))
            continue
        opened.gdn_set_parallel(team().parallel)
        return Opened(opened, None)
    none = f"not built: {CURE}, with a C++ compiler (GCC or Clang) installed"
    return Opened(None, reasons[0] if reasons else none)


def _candidates() -> Iterator[Path]:
    """Yield the libraries that there are: the installed one, then the user's."""
    for folder in (PACKAGE, user_folder()):
        path = folder / build.NAME
        # Pass over folders that may not be read.
        if os.path.isfile(path):
            yield path


def open_library(path: Path, source: str) -> ctypes.CDLL:
    """Load a library and check what it was built from.

    Args:
        path: the library.
        source: the hash of the sources that it should be built from.

    Raises:
        LibraryError: it cannot be loaded, belongs to somebody else, or has other sources.
    """
    if path.stat().st_uid not in (0, os.getuid(), PACKAGE.stat().st_uid):
        raise LibraryError(f"{path} belongs to another user: {CURE}")
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"{path} cannot be loaded ({error}): {CURE}") from error
    try:
        for name in ("gdn_source", "gdn_levels", "gdn_level"):
            getattr(loaded, name).restype = ctypes.c_char_p
        loaded.gdn_choose_level.argtypes = [ctypes.c_char_p]
        loaded.gdn_set_parallel.argtypes = [ctypes.c_void_p]
        loaded.gdn_set_parallel.restype = None
        is_same = loaded.gdn_source().decode() == source
    except AttributeError:
        is_same = False
    if not is_same:
        raise LibraryError(f"{path} was built from other sources: {CURE}")
    return loaded


def choose_level(loaded: ctypes.CDLL, name: str) -> None:
    """Take a level of a library by its name, or the fastest on this processor for "".

    Raises:
        LibraryError: there is no such level, or not on this processor, or none for it at all.
    """
    if loaded.gdn_choose_level(name.encode()):
        return
    if not name:
        text = "was built for processors that can do more than this one"
        raise LibraryError(f"{loaded._name} {text}: {CURE}")
    known = [level.name for level in build.LEVELS.get(_machine(), build.OTHER)]
    if name not in known:
        raise LibraryError(f"{LEVEL}: {unknown('level', name, known)}")
    compiled = loaded.gdn_levels().decode().split()
    usable = ", ".join(x for x in compiled if loaded.gdn_choose_level(x.encode()))
    if name not in compiled:
        text = "which the compiler of the library did not know"
    else:
        text = "which this processor does not have"
    raise LibraryError(f"{LEVEL} is {name!r}, {text} (it has {usable})")


def _machine() -> str:
    """Return the name of this machine as compilers spell it."""
    machine = platform.machine()
    return {"arm64": "aarch64", "AMD64": "x86_64"}.get(machine, machine)
