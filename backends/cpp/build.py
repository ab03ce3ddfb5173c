"""Compile the kernels of src/ into one shared library, with GCC or Clang and nothing else.

`level.cc` is compiled once for each level of the processor, `library.cc` once. This file needs the
standard library only and imports nothing of gdn_ops: setup.py runs it before torch is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

NAME = "libgdn_ops_cpp.so"
"""The file name of the library; macOS loads it under this name too."""

SOURCES = Path(__file__).resolve().parent / "src"

COMPILERS = ("c++", "g++", "clang++")
"""The commands that are tried where CXX is not set."""

# No -ffast-math: -inf stays -inf, and sums stay in order.
FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"),
)

SECONDS = 600
"""Seconds that one run of the compiler may take."""


class Level(NamedTuple):
    """Describe one level: what `level.cc` is compiled with for one kind of processor.

    Attributes:
        name: as GDN_OPS_CPP_LEVEL takes it.
        lanes: floats of a vector.
        rows: rows of a tile of a product.
        features: the number by which `level.cc` knows what it may use.
        flags: what lets the compiler use it.
    """

    name: str
    lanes: int
    rows: int
    features: int
    flags: tuple[str, ...] = ()

    def arguments(self) -> tuple[str, ...]:
        """Return the arguments of the compiler."""
        macros = {
            "LEVEL": self.name,
            "LANES": self.lanes,
            "ROWS": self.rows,
            "FEATURES": self.features,
        }
        defined = (f"-DGDN_{name}={value}" for name, value in macros.items())
        # A weak symbol of exceptions would be shared by all levels.
        return (*self.flags, "-fno-exceptions", *defined)


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "-mprefer-vector-width=512",
)

LEVELS = {
    "x86_64": (
        Level("avx512bf16", 16, 8, 4, (*_AVX512, "-mavx512bf16")),
        Level("avx512", 16, 8, 3, _AVX512),
        Level("avx2", 8, 4, 2, _AVX2),
        Level("baseline", 4, 4, 1),
    ),
    "aarch64": (Level("baseline", 4, 8, 1),),
}
"""The levels of each machine, best first; the last one is `baseline`, which all of its kind run."""

OTHER = (Level("baseline", 4, 4, 1),)
"""The levels of any other machine."""


class BuildError(Exception):
    """Report why the library cannot be built here, in one line."""


class CompileError(BuildError):
    """Report that the compiler failed on the kernels.

    Attributes:
        lines: what it said first.
    """

    def __init__(self, text: str, lines: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.lines = tuple(lines)


class Door(NamedTuple):
    """Describe how the kernels of a library are called: what is compiled beside their levels.

    Attributes:
        name: the file name of the library.
        source: the file, relative to that of the kernels.
        flags: for that file alone.
    """

    name: str
    source: str
    flags: tuple[str, ...] = ()


TORCH = Door(NAME, "library.cc")
"""The library of the backend `cpp`; `native/build.py` has that of onnxruntime."""


class Built(NamedTuple):
    """Describe a library that was built.

    Attributes:
        path: the library.
        compiler: the command that compiled it.
        levels: the names of its levels, best first.
        left_out: why a level is not in it, by name.
    """

    path: Path
    compiler: str
    levels: tuple[str, ...]
    left_out: dict[str, str]


def source_hash(sources: Path = SOURCES) -> str:
    """Return 16 hex digits that change with the sources, the levels and the flags."""
    digest = hashlib.sha256(repr((FLAGS, LEVELS, OTHER)).encode())
    for path in sorted(sources.glob("*.*")):
        if path.suffix in (".cc", ".h"):
            data = path.read_bytes()
            digest.update(f"{path.name}\0{len(data)}\0".encode())
            digest.update(data)
    return digest.hexdigest()[:16]


def build(
    folder: Path,
    sources: Path = SOURCES,
    environment: Mapping[str, str] = os.environ,
    door: Door = TORCH,
) -> Built:
    """Build the library into a folder, where it replaces another one at once.

    Args:
        folder: made if it is missing.
        sources: the folder of level.cc and library.cc.
        environment: CXX is the compiler, CXXFLAGS and LDFLAGS are more arguments for it.
        door: what else is compiled into which library.

    Raises:
        BuildError: there is no compiler of C++17, the folder cannot be written, or the sources are
            not there.
        CompileError: the compiler failed on them.
    """
    for name in ("level.cc", door.source):
        if not (sources / name).is_file():
            raise BuildError(f"{sources / name} is not there: install gdn_ops again")
    compiler, machine = find_compiler(environment)
    _check_writable(folder)
    with _scratch() as scratch:
        work = _Work(compiler, scratch, sources, environment, door)
        levels = LEVELS.get(machine, OTHER)
        left_out = work.probe(levels)
        kept = [level for level in levels if level.name not in left_out]
        work.compile(kept, left_out)
        _replace(work.library, folder / door.name)
    names = tuple(level.name for level in kept)
    return Built(folder / door.name, shlex.join(compiler), names, left_out)


def find_compiler(environment: Mapping[str, str] = os.environ) -> tuple[list[str], str]:
    """Return the command of the compiler, and the machine that it compiles for.

    Raises:
        BuildError: there is none, or the one that CXX names is none.
    """
    given, command = environment.get("CXX", ""), _words(environment, "CXX")
    if command:
        if shutil.which(command[0], path=environment.get("PATH")) is None:
            raise BuildError(f"CXX is {given!r}, and there is no such command")
        machine = _machine(command, environment)
        if machine is None:
            raise BuildError(f"CXX is {given!r}, should be a C++ compiler: GCC or Clang")
        return command, machine
    for name in COMPILERS:
        path = shutil.which(name, path=environment.get("PATH"))
        if path and (machine := _machine([path], environment)):
            return [path], machine
    raise BuildError(f"no C++ compiler ({', '.join(COMPILERS)}): install GCC or Clang, or set CXX")


def _words(environment: Mapping[str, str], name: str) -> list[str]:
    """Return the words of an environment variable, as a shell splits them."""
    text = environment.get(name, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BuildError(f"{name} is {text!r}: {error}") from error


def _machine(compiler: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """Return the machine that a compiler compiles for, or None if it is no GCC and no Clang."""
    done = _run([*compiler, "-dumpmachine"], environment)
    machine, _, system = done.stdout.strip().partition("-")
    if done.returncode or not system:
        return None
    if any(name in system for name in ("mingw", "windows", "cygwin")):
        raise BuildError("the C++ kernels are for Linux and macOS, not for Windows")
    return "aarch64" if machine.startswith("arm64") else machine


def is_writable(folder: Path) -> bool:
    """Return whether a library can be written into a folder, which is made if it is missing."""
    try:
        _check_writable(folder)
    except BuildError:
        return False
    return True


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BuildError(f"{folder} cannot be written: {error.strerror}") from error


def _replace(library: Path, target: Path) -> None:
    """Move a library to where it belongs; a process that has the old one loaded keeps it."""
    beside = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        shutil.copy(library, beside)
        os.replace(beside, target)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise BuildError(f"{target} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """Make a temporary folder, which goes with what is in it.

    Raises:
        BuildError: it cannot be made or written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="gdn_ops-") as folder:
            yield Path(folder)
    except OSError as error:
        raise BuildError(f"the temporary folder cannot be written: {error.strerror}") from error


class _Work:
    """Run the compiler in a temporary folder."""

    def __init__(
        self,
        compiler: Sequence[str],
        scratch: Path,
        sources: Path,
        environment: Mapping[str, str],
        door: Door,
    ) -> None:
        self.compiler, self.scratch, self.sources = compiler, scratch, sources
        self.environment, self.door = environment, door
        self.more = _words(environment, "CXXFLAGS")
        self.library = scratch / door.name

    def probe(self, levels: Sequence[Level]) -> dict[str, str]:
        """Return why levels cannot be compiled, by name.

        Raises:
            BuildError: the compiler knows no C++17, or cannot even compile the last level.
        """
        empty = self.scratch / "probe.cc"
        empty.write_text("#include <cstdint>\n#if __cplusplus < 201703L\n#error C++17\n#endif\n")
        left_out = {}
        for level in reversed(levels):
            flags = (*FLAGS, *self.more, *level.flags)
            done = self._run(*flags, "-c", empty, "-o", self.scratch / "probe.o")
            if done.returncode:
                said = (_errors(done) or ["it says nothing"])[0]
                command = shlex.join(self.compiler)
                if level is levels[-1]:
                    raise BuildError(f"{command} is too old or broken, should know C++17: {said}")
                left_out[level.name] = f"{command} does not know it: {said}"
        return left_out

    def compile(self, levels: Sequence[Level], left_out: Iterable[str]) -> None:
        """Compile every object, a few at a time, and link them.

        Raises:
            CompileError: the compiler failed.
        """
        about = self._write("about", _about(source_hash(self.sources), levels))
        jobs = [(level.name, "level.cc", level.arguments()) for level in levels]
        jobs += [("door", self.door.source, self.door.flags), ("about", str(about), ())]
        for name in left_out:
            # The door asks every level of the machine whether it is there.
            jobs.append((name, str(self._write(name, _absent(name))), ()))
        objects = [self.scratch / f"{name}.o" for name, *_ in jobs]

        def one(job: tuple[str, str, tuple[str, ...]], to: Path) -> None:
            _, source, arguments = job
            path = self.sources / source
            self._finish(*FLAGS, *self.more, *arguments, "-c", path, "-o", to)

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(one, jobs, objects))
        link = _words(self.environment, "LDFLAGS")
        self._finish("-shared", *self.more, *objects, *link, "-o", self.library)

    def _write(self, name: str, text: str) -> Path:
        path = self.scratch / f"{name}.cc"
        path.write_text(text)
        return path

    def _run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        more = (f"-I{self.sources}", *arguments)
        done = _run([*self.compiler, *map(str, more)], self.environment)
        done.stderr = done.stderr.replace(f"{self.scratch}{os.sep}", "")
        return done

    def _finish(self, *arguments: str | Path) -> None:
        done = self._run(*arguments)
        if done.returncode:
            lines = _errors(done)
            what = f"{shlex.join(self.compiler)} failed on the kernels"
            raise CompileError(f"{what}: {(lines or ['it says nothing'])[0]}", lines)


def _run(
    command: Sequence[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run the compiler and return how it ended; it speaks English."""
    try:
        return subprocess.run(
            command,
            env={**environment, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", f"error: {error}\n")


def _errors(done: subprocess.CompletedProcess[str], most: int = 8) -> list[str]:
    """Return the first lines of what a compiler said, from its first error on."""
    lines = [line.rstrip() for line in done.stderr.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if "error" in line.lower()), 0)
    return lines[first : first + most]


def _about(source: str, levels: Sequence[Level]) -> str:
    """Return C++ that says what a library was built from."""
    export = 'extern "C" __attribute__((visibility("default"))) const char*'
    names = " ".join(level.name for level in levels)
    return (
        f'{export} gdn_source() {{ return "{source}"; }}\n'
        f'{export} gdn_levels() {{ return "{names}"; }}\n'
    )


def _absent(name: str) -> str:
    """Return C++ of a level that no processor has."""
    return (
        '#include "level.h"\n'
        '#pragma GCC diagnostic ignored "-Wmissing-field-initializers"\n'
        f"extern const GdnLevel gdn_level_{name};\n"
        f'const GdnLevel gdn_level_{name} = {{"{name}", [] {{ return 0; }}}};\n'
    )
