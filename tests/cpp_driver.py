"""Run the kernels in a process of its own: for another machine, emulated, or under a sanitizer.

A `Driver` has the doors of the library. What the backend hands to them, structs with pointers, is
sent to `tests/backends/cpp/driver.cc` together with the memory that the pointers mean, and what
comes back is written to where it belongs. So every test that runs the backend can run elsewhere.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shlex
import struct
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gdn_ops.backends.cpp import build, calls
from gdn_ops.backends.cpp.build import BuildError

SOURCE = Path(__file__).parent / "backends" / "cpp" / "driver.cc"

FORWARD, BACKWARD, DECODE = range(3)
"""Doors, as in `driver.cc`."""

_BYTES = {0: 4, 1: 2, 2: 2, 3: 8}
"""Bytes of an element, by the numbers of `GdnType`."""

_ARRAY = ("data", "row", "token", "head", "type")
"""Fields of `GdnArray`."""

_REFUSED = 2
"""What `gdn_decode_repeated` returns where a call has to go by `gdn_decode`."""

Region = tuple[int, int]
"""An address and a number of bytes."""


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
    """

    def __init__(self, command: Sequence[str], level: str = "") -> None:
        self.command = (*command, level)
        self.calls = 0
        # A function, not a method: the types of its arguments are set.
        self.gdn_decode_repeated = lambda *arguments: _REFUSED

    def has_level(self) -> bool:
        """Return whether the processor that the program runs on has the level."""
        done = subprocess.run(self.command, input=b"", capture_output=True)
        return b"there is no such level" not in done.stderr

    def gdn_forward(self, call: bytes) -> int:
        sequences = _Packed("GdnSequences", call)
        _describe_sequences(sequences)
        return self._run(FORWARD, sequences)

    def gdn_backward(self, call: bytes, gradients: bytes) -> int:
        sequences, to = _Packed("GdnSequences", call), _Packed("GdnGradients", gradients)
        _describe_sequences(sequences)
        _describe_gradients(to, sequences)
        return self._run(BACKWARD, sequences, to)

    def gdn_decode(self, call: bytes) -> int:
        steps = _Packed("GdnSteps", call)
        _describe_steps(steps)
        return self._run(DECODE, steps)

    def _run(self, door: int, *structs: _Packed) -> int:
        """Send structs and the memory that they point at, and write back what comes."""
        pointers: list[tuple[int, Region]] = []
        start = 0
        for one in structs:
            pointers += [(start + 8 * field, region) for field, region in one.regions.items()]
            start += len(one.data)
        regions = list(dict.fromkeys(region for _, region in pointers))
        numbers = {region: i for i, region in enumerate(regions)}
        head = [door, len(regions), len(pointers), start, *(size for _, size in regions)]
        head += [number for place, region in pointers for number in (place, numbers[region])]
        sent = [struct.pack(f"={len(head)}q", *head), *(one.data for one in structs)]
        sent += [ctypes.string_at(address, size) for address, size in regions]
        done = subprocess.run(self.command, input=b"".join(sent), capture_output=True)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        self.calls += 1
        (status,) = struct.unpack_from("=q", done.stdout)
        at = 8
        for address, size in regions:
            ctypes.memmove(address, done.stdout[at : at + size], size)
            at += size
        assert at == len(done.stdout)
        return int(status)


@functools.cache
def _fields(name: str) -> dict[str, int]:
    """Return the numbers of the fields of a struct of `interface.h`, each of eight bytes."""
    text = re.sub(r"//.*", "", (build.SOURCES / "interface.h").read_text())
    found = re.search(rf"struct {name} \{{(.*?)\}};", text, re.DOTALL)
    assert found is not None, name
    fields: dict[str, int] = {}
    count = 0
    for declared in found[1].split(";"):
        kind, *names = re.findall(r"\w+", declared.replace("const", "")) or ("",)
        for field in names:
            for part in [f"{field}.{part}" for part in _ARRAY] if kind == "GdnArray" else [field]:
                fields[part] = count
                count += 1
    return fields


class _Packed:
    """Hold the bytes of a struct, and the regions of memory that its pointers mean."""

    def __init__(self, name: str, data: bytes) -> None:
        self.data, self.numbers = data, _fields(name)
        self.regions: dict[int, Region] = {}

    def __getitem__(self, name: str) -> int:
        return int(struct.unpack_from("=q", self.data, 8 * self.numbers[name])[0])

    def add(self, name: str, size: int) -> None:
        """Note the bytes behind a pointer, if it is one."""
        if self[name]:
            self.regions[self.numbers[name]] = (self[name], size)

    def add_array(self, name: str, *sizes: int) -> None:
        """Note the bytes of an array (rows, tokens, heads, width)."""
        strides = [self[f"{name}.{axis}"] for axis in _ARRAY[1:4]]
        last = [(n - 1) * stride for n, stride in zip(sizes, strides, strict=False)]
        # Of no tokens there is nothing.
        count = sum(last) + sizes[-1] if all(sizes) else 0
        self.add(f"{name}.data", count * _BYTES[self[f"{name}.type"]])

    def add_tokens(self, rows: int) -> None:
        """Note the arrays of q, k, v and o, and of gates."""
        T, H, HV, K, V = (self[name] for name in ("T", "H", "HV", "K", "V"))
        for name, heads, width in (("q", H, K), ("k", H, K), ("v", HV, V), ("o", HV, V)):
            self.add_array(name, rows, T, heads, width)
        for name in ("decay", "beta"):
            self.add_array(name, rows, T, HV, 1)


def _rows(p: _Packed) -> int:
    """Return the rows of a call of sequences."""
    return 1 if p["starts"] else p["N"]


def _state(p: _Packed) -> int:
    """Return the numbers of a state."""
    return p["HV"] * p["K"] * p["V"]


def _describe_sequences(p: _Packed) -> None:
    """Note the memory of `GdnSequences`."""
    p.add_tokens(_rows(p))
    p.add("initial", 4 * p["N"] * _state(p))
    p.add("final", 4 * p["N"] * _state(p))
    p.add("states", 4 * _rows(p) * (p["T"] // (calls.CHUNK * p["chunks_per_state"])) * _state(p))
    p.add("starts", 8 * (p["N"] + 1))


def _describe_gradients(p: _Packed, of: _Packed) -> None:
    """Note the memory of `GdnGradients` of sequences."""
    T, H, HV, K, V = (of[name] for name in ("T", "H", "HV", "K", "V"))
    for name, heads, width in (("d_o", HV, V), ("d_q", H, K), ("d_k", H, K), ("d_v", HV, V)):
        p.add_array(name, _rows(of), T, heads, width)
    for name in ("d_decay", "d_beta"):
        p.add_array(name, _rows(of), T, HV, 1)
    for name in ("d_final", "d_initial"):
        p.add(name, 4 * of["N"] * _state(of))


def _describe_steps(p: _Packed) -> None:
    """Note the memory of `GdnSteps`."""
    B, T, HV, element = p["B"], p["T"], p["HV"], _BYTES[p["state_type"]]
    p.add_tokens(B)
    p.add("slots", 8 * B)
    rows = B
    if p["slots"]:
        rows = 1 + max(struct.unpack(f"={B}q", ctypes.string_at(p["slots"], 8 * B)))
    for name in ("state", "new_state"):
        last = (rows - 1) * p[f"{name}_row"] + (HV - 1) * p[f"{name}_head"]
        p.add(name, element * (last + p["K"] * p["V"] if rows else 0))
    p.add("states", element * B * T * _state(p))
    for name in ("A_log", "dt_bias"):
        if name in p.numbers:
            p.add(name, 4 * HV)
