"""Launch a kernel: compiled for the GPU that the tensors are on, or emulated on the CPU.

    launch(make, constants, *args)

`make(T, **constants)` is traced with `tilelang.language` for a GPU and with `language.CPU` for CPU
tensors, compiled, and called with the tensors and numbers. All of that but the call happens once
for each (make, constants, target): the second launch finds the kernel in a dict. Compiled kernels
are kept on disk too, by TileLang for a GPU, by `cache` for the CPU.

Where the first tensor is on the meta device, nothing runs: the launch is recorded.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch

from gdn_ops.backends.tilelang.emulation.language import CPU
from gdn_ops.backends.tilelang.emulation.programs import Emulated, Parameter, Program, program
from gdn_ops.backends.tilelang.host import cache, toolchain
from gdn_ops.kernel_support.launches import Launch, note
from gdn_ops.kernel_support.sources import reading

FLAGS: Final = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w"),
    # A product and a sum stay two operations; nobody reads errno, or traps.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
"""Flags of the compiler for emulated kernels: fast, every operation rounded as it is written."""

GCC_FLAGS: Final = (
    *("-fno-unswitch-loops", "-fno-peel-loops", "-fno-split-loops"),
    "-fno-version-loops-for-strides",
)
"""Optimisations that GCC leaves out: a third of its time, for code that is a tenth faster."""

Function = Callable[..., Any]
Constants = dict[str, Any]

_log = logging.getLogger("gdn_ops")
_launched: dict[Any, Function] = {}
"""Kernels by (make, device, *constants), which a launch looks up."""
_built: dict[Any, Function] = {}
"""Kernels by (make, target, constants in order), the same on every GPU of a kind."""
_building = threading.RLock()


def launch(make: Function, constants: Constants, *args: Any) -> None:
    """Launch a kernel.

    Args:
        make: the factory of the kernel: `make(T, **constants)` is a prim_func.
        constants: what is known when it is compiled; hashable.
        args: the parameters of the prim_func, inputs and outputs: tensors and numbers. The first
            is a tensor, whose device is that of the launch. Where a tensor has so many elements
            that an index does not fit 32 bits, TileLang itself computes it in 64.

    Raises:
        RuntimeError: the kernel cannot be compiled; arguments that it does not take, on a GPU.
        TypeError, ValueError: arguments that the kernel does not take, on CPU tensors; tensors on
            the meta device outside of `recording`.
        IndexError: the kernel has indexed outside of a tile, on CPU tensors.
    """
    key = (make, args[0].device, *constants.items())
    kernel = _launched.get(key)
    if kernel is None:
        if args[0].is_meta:
            note(Launch(make, (), args, dict(constants)))
            return
        kernel = _launched[key] = _kernel(make, constants, args[0].device)
    kernel(*args)


def trace(make: Function, constants: Constants, language: Any = None) -> Any:
    """Return the prim_func of a kernel; `T` is `tilelang.language` unless another is given."""
    if language is None:
        import tilelang.language

        language = tilelang.language
    return make(language, **constants)


@functools.cache
def arch(index: int) -> str:
    """Return the architecture of a GPU: "sm_90a"; from 9.0 on with the `a` that wgmma needs."""
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def _kernel(make: Function, constants: Constants, device: torch.device) -> Function:
    """Return the kernel for the architecture of a device, built on first use."""
    target = "cpu" if device.type == "cpu" else arch(device.index)
    key = (make, target, *sorted(constants.items()))
    with _building:
        if key not in _built:
            start = time.perf_counter()
            with _explained(make, constants, target):
                build = _emulated if target == "cpu" else _compiled
                _built[key], origin = build(make, constants, target)
            seconds = time.perf_counter() - start
            _log.info("tilelang: %s %s in %.2f s", _named(make, constants, target), origin, seconds)
        return _built[key]


def _named(make: Function, constants: Constants, target: str) -> str:
    shape_class = ", ".join(f"{name}={value}" for name, value in constants.items())
    return f"{make.__name__} ({shape_class}) for {target}"


class _CompilerError(Exception):
    """Report that a compiler failed: a summary in one line, and all that it said."""

    def __init__(self, summary: str, output: str) -> None:
        super().__init__(summary)
        self.output = output


@contextlib.contextmanager
def _explained(make: Function, constants: Constants, target: str) -> Iterator[None]:
    """Turn any error of a compilation into a RuntimeError, and write its details to a log file."""
    try:
        yield
    except Exception as error:
        name = _named(make, constants, target)
        if isinstance(error, OSError) and error.errno in cache.DISK_ERRORS:
            path = error.filename or cache.configured()
            what = f"tilelang: cannot write {name} to disk: {path}: {error.strerror}; {cache.CURE}"
            raise RuntimeError(what) from error
        output = error.output if isinstance(error, _CompilerError) else traceback.format_exc()
        summary = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        log = cache.keep_log(make.__name__, f"{name}\n\n{output}")
        see = "" if log is None else f"; see {log}"
        raise RuntimeError(f"tilelang: cannot compile {name}: {summary}{see}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence TileLang's log messages below a warning while it compiles; let it write its files."""
    with cache.writable():
        import tilelang  # noqa: F401, it sets the level of its logger

        logger = logging.getLogger("tilelang")
        level = logger.level
        logger.setLevel(max(level, logging.WARNING))
        try:
            yield
        finally:
            logger.setLevel(level)


def _compiled(make: Function, constants: Constants, target: str) -> tuple[Function, str]:
    """Return a kernel for a GPU, and whether it was compiled or taken from disk."""
    import tilelang

    with _quiet():
        kernel = tilelang.compile(
            trace(make, constants),
            target={"kind": "cuda", "arch": target},
            execution_backend="tvm_ffi",
        )
        # Its own caller looks at every argument in Python, and this function does so again.
        executable = kernel.adapter.get_exportable_executable()
        module = executable.jit() if hasattr(executable, "jit") else executable
    return module.main, "taken from disk" if kernel.artifact is None else "compiled"


def _emulated(make: Function, constants: Constants, target: str) -> tuple[Function, str]:
    """Return a kernel for the CPU, and whether it was compiled or taken from disk."""
    compiler = toolchain.compiler()
    if compiler is None:
        reason = toolchain.cpu_reasons()[0]
        raise _CompilerError(reason, reason)
    path, *identity = _identity(compiler)
    flags = FLAGS if "clang" in Path(path).name else (*FLAGS, *GCC_FLAGS)
    name = cache.key(make, constants, flags, path, *identity)
    entry = cache.stored(name)
    if entry is not None:
        try:
            return _loaded(make, entry), "taken from disk"
        except (OSError, ValueError):
            # A disk that was full, or a library of another system.
            shutil.rmtree(entry, ignore_errors=True)
    with reading, _quiet():
        source = program(trace(make, constants, CPU))
    folder = cache.folder()
    try:
        entry = _run([compiler, *flags], name, source, folder)
    except OSError as error:
        if error.errno not in cache.DISK_ERRORS:
            raise
        entry = _run([compiler, *flags], name, source, cache.instead_of(folder, error))
    return _loaded(make, entry), "compiled"


def _loaded(make: Callable[..., Any], entry: Path) -> Emulated:
    """Load a kernel from its entry in the disk cache."""
    description = cache.description(entry)
    description["parameters"] = [Parameter(*values) for values in description["parameters"]]
    return Emulated(str(entry / "kernel.so"), make.__name__, **description)


@functools.cache
def _identity(compiler: str) -> tuple[str, int, int]:
    """Return the path, size and modification time of a compiler, to tell when it changes."""
    path = Path(compiler).resolve()
    return str(path), path.stat().st_size, path.stat().st_mtime_ns


def _run(compiler: list[str], name: str, source: Program, folder: Path) -> Path:
    """Compile a program by a compiler with its flags; return its entry in a folder of the cache.

    Raises:
        OSError: the folder cannot be written.
        _CompilerError: the compiler fails.
    """
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
        file, library = Path(scratch, "kernel.cpp"), Path(scratch, "kernel.so")
        file.write_text(source.text)
        command = [*compiler, str(file), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            disk_error = cache.disk_error(done.stderr)
            if disk_error is not None:
                raise disk_error
            said = f"{' '.join(command)}\n{done.stdout}{done.stderr}\n{source.text}"
            raise _CompilerError(f"{compiler[0]} exits with {done.returncode}", said)
        kept = {field: getattr(source, field) for field in ("parameters", "order", "tiles")}
        return cache.store(name, library, kept, folder)
