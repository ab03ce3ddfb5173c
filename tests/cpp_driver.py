"""Run the kernels in a process of its own: for another machine, emulated, or under a sanitizer.

A `Driver` has the doors of the library. What the backend hands to them, structs with pointers, is
sent to `tests/backends/cpp/driver.cc` together with the memory that the pointers mean, and what
comes back is written to where it belongs. So every test that runs the backend can run elsewhere.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import struct
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cpp_structs import DOORS, REPEATED, Packed, Region, fields
from gdn_ops.backends.cpp import build
from gdn_ops.backends.cpp.build import BuildError

SOURCE = Path(__file__).parent / "backends" / "cpp" / "driver.cc"


def compile_driver(
    folder: Path, environment: Mapping[str, str] = os.environ, link: Sequence[str] = ()
) -> Path:
    """Compile the kernels and the driver into a program.

    Args:
        folder: where it lies, with its objects.
        environment: CXX is the compiler, CXXFLAGS are more arguments for it.
        link: more arguments where the program is linked.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    compiler, machine = build.find_compiler(environment)
    more = (*build.FLAGS, *shlex.split(environment.get("CXXFLAGS", "")), f"-I{build.SOURCES}")

    def run(*arguments: object) -> str:
        done = build._run([*compiler, *more, *map(str, arguments)], environment)
        return done.stderr if done.returncode else ""

    def compile_level(level: build.Level) -> str:
        to = folder / f"{level.name}.o"
        if not run(*level.arguments(), "-c", build.SOURCES / "level.cc", "-o", to):
            return ""
        # A compiler that does not know a level leaves it out.
        absent = folder / f"{level.name}.cc"
        absent.write_text(build._absent(level.name))
        return run("-c", absent, "-o", to)

    levels = build.LEVELS.get(machine, build.OTHER)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        failed = "".join(pool.map(compile_level, levels))
    program, objects = folder / "driver", [folder / f"{level.name}.o" for level in levels]
    doors = build.SOURCES / "library.cc"
    failed = failed or run(*link, SOURCE, doors, *objects, "-o", program)
    if failed:
        raise BuildError(failed)
    return program


class Driver:
    """Stand in for the loaded library: the same doors, behind which a program runs.

    Args:
        command: what runs the program, and the program.
        level: the level that it runs.

    Attributes:
        calls: the names of the doors that were called.
    """

    def __init__(self, command: Sequence[str], level: str = "") -> None:
        self.command = (*command, level)
        self.calls: list[str] = []
        # No methods: the types of their arguments may be set.
        for door in DOORS:
            setattr(self, door, functools.partial(self._call, door))
        self.gdn_decode_repeated = functools.partial(self._decode_again)

    def has_level(self) -> bool:
        """Return whether the processor that the program runs on has the level."""
        done = subprocess.run(self.command, input=b"", capture_output=True)
        return b"there is no such level" not in done.stderr

    def _call(self, door: str, *given: bytes) -> int:
        """Run a door on its structs."""
        structs: list[Packed] = []
        for (name, describe), data in zip(DOORS[door], given, strict=True):
            structs.append(Packed(name, data))
            describe(structs[-1], structs[0])
        return self._run(door, *structs)

    def _decode_again(self, earlier: bytes, threads: int, *pointers: int | None) -> int:
        """Run `gdn_decode_repeated`, its pointers sent within the steps of its struct."""
        filled = bytearray(earlier)
        for name, address in zip(REPEATED, pointers, strict=True):
            struct.pack_into("=q", filled, 8 * fields("GdnSteps")[name], address or 0)
        return self._call("gdn_decode_repeated", bytes(filled))

    def _run(self, door: str, *structs: Packed) -> int:
        """Send structs and the memory that they point at, and write back what comes."""
        pointers: list[tuple[int, Region]] = []
        start = 0
        for one in structs:
            pointers += [(start + 8 * field, region) for field, region in one.regions.items()]
            start += len(one.data)
        regions = list(dict.fromkeys(region for _, region in pointers))
        numbers = {region: i for i, region in enumerate(regions)}
        head = [list(DOORS).index(door), len(regions), len(pointers), start]
        head += [size for _, size in regions]
        head += [number for place, region in pointers for number in (place, numbers[region])]
        sent = [struct.pack(f"={len(head)}q", *head), *(one.data for one in structs)]
        sent += [ctypes.string_at(address, size) for address, size in regions]
        done = subprocess.run(self.command, input=b"".join(sent), capture_output=True)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        self.calls.append(door)
        (status,) = struct.unpack_from("=q", done.stdout)
        at = 8
        for address, size in regions:
            ctypes.memmove(address, done.stdout[at : at + size], size)
            at += size
        assert at == len(done.stdout)
        return int(status)
