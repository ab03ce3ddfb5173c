"""Run the kernels in a process of its own: for another machine, emulated, or under a sanitizer.

A `Driver` has the doors of the library. What the backend hands to them, structs with pointers, is
sent to `tests/backends/cpp/driver.cc` together with the memory that the pointers mean, and what
comes back is written to where it belongs. So every test that runs the backend can run elsewhere.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from gdn_ops.backends.cpp import build, calls

SOURCE = Path(__file__).parent / "backends" / "cpp" / "driver.cc"

FORWARD, BACKWARD, DECODE = range(3)
"""Kinds of calls, as in `driver.cc`."""

_BYTES = {0: 4, 1: 2, 2: 2}
"""Bytes of an element, by the numbers of `GdnType`."""


def compile_driver(
    folder: Path, environment: Mapping[str, str] = os.environ, link: Sequence[str] = ()
) -> Path:
    """Compile the kernels and the driver into a program; the objects lie in the folder too.

    Args:
        folder: made if it is missing.
        environment: CXX is the compiler, CXXFLAGS are more arguments for it.
        link: more arguments where the program is linked.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    compiler, machine = build.find_compiler(environment)
    work = build._Work(compiler, folder, build.SOURCES, environment)
    levels = build.LEVELS.get(machine, build.OTHER)
    left_out = work.probe(levels)
    work.compile([level for level in levels if level.name not in left_out], left_out)
    program = folder / "driver"
    objects = [path for path in sorted(folder.glob("*.o")) if path.name != "probe.o"]
    work._finish(*build.FLAGS, *work.more, *link, SOURCE, *objects, "-o", program)
    return program


class Driver:
    """Stand in for the loaded library: the same doors, behind which a program runs.

    Args:
        command: what runs the program, and the program.
        level: the level that it runs.
        environment: of the program.
    """

    def __init__(
        self, command: Sequence[str], level: str = "", environment: Mapping[str, str] = os.environ
    ) -> None:
        self.command, self.environment = (*command, level), dict(environment)
        self.calls = 0

    def has_level(self) -> bool:
        """Return whether the processor that the program runs on has the level."""
        head = struct.pack("=2q", DECODE, 0)
        done = subprocess.run(
            self.command, input=head, capture_output=True, env=self.environment, text=False
        )
        return b"there is no such level" not in done.stderr

    def gdn_forward(self, call: bytes) -> int:
        packed = _Packed(call, calls._SEQUENCES)
        _describe_sequences(packed)
        return self._run(FORWARD, packed)

    def gdn_backward(self, call: bytes, gradients: bytes) -> int:
        packed, to = _Packed(call, calls._SEQUENCES), _Packed(gradients, calls._GRADIENTS)
        sizes = _describe_sequences(packed)
        _describe_gradients(to, *sizes)
        return self._run(BACKWARD, packed, to)

    def gdn_decode(self, call: bytes) -> int:
        packed = _Packed(call, calls._STEPS)
        _describe_steps(packed)
        return self._run(DECODE, packed)

    def _run(self, kind: int, *structs: _Packed) -> int:
        """Send structs and the memory that they point at, and write back what comes."""
        regions = list(dict.fromkeys(region for one in structs for region in one.regions.values()))
        numbers = {region: i for i, region in enumerate(regions, 1)}
        head = struct.pack(f"={2 + len(regions)}q", kind, len(regions), *(n for _, n in regions))
        sent = [head, *(one.with_numbers(numbers) for one in structs)]
        sent += [ctypes.string_at(address, size) for address, size in regions]
        done = subprocess.run(
            self.command, input=b"".join(sent), capture_output=True, env=self.environment
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        self.calls += 1
        (status,) = struct.unpack_from("=q", done.stdout)
        at = 8
        for address, size in regions:
            ctypes.memmove(address, done.stdout[at : at + size], size)
            at += size
        assert at == len(done.stdout)
        return int(status)


class _Packed:
    """Hold the fields of a packed struct, and the regions of memory that its pointers mean."""

    def __init__(self, data: bytes, layout: struct.Struct) -> None:
        self.layout, self.fields = layout, list(layout.unpack(data))
        self.regions: dict[int, tuple[int, int]] = {}

    def add(self, field: int, size: int) -> None:
        """Note the bytes behind a pointer, if it is one."""
        if self.fields[field]:
            self.regions[field] = (self.fields[field], size)

    def add_array(self, field: int, *sizes: int) -> None:
        """Note the bytes of an array (rows, tokens, heads, width); its struct begins at a field."""
        _, *strides, kind = self.fields[field : field + 5]
        last = [(n - 1) * stride for n, stride in zip(sizes, strides, strict=False)]
        # Of no tokens there is nothing.
        count = sum(last) + sizes[-1] if all(sizes) else 0
        self.add(field, count * _BYTES[kind])

    def with_numbers(self, numbers: Mapping[tuple[int, int], int]) -> bytes:
        """Return the struct with the numbers of regions in the place of pointers."""
        fields = list(self.fields)
        for field, region in self.regions.items():
            fields[field] = numbers[region]
        return self.layout.pack(*fields)


def _describe_sequences(p: _Packed) -> tuple[int, int, int, int, int, int, int]:
    """Note the memory of `GdnSequences`; return rows, N, T, H, HV, K, V."""
    N, T, H, HV, K, V = p.fields[34:40]
    rows = 1 if p.fields[33] else N
    for field, heads, width in ((0, H, K), (5, H, K), (10, HV, V), (25, HV, V)):
        p.add_array(field, rows, T, heads, width)
    for field in (15, 20):
        p.add_array(field, rows, T, HV, 1)
    state = HV * K * V * 4
    p.add(30, N * state)
    p.add(31, N * state)
    p.add(32, rows * (T // (calls.CHUNK * p.fields[43])) * state)
    p.add(33, (N + 1) * 8)
    return rows, N, T, H, HV, K, V


def _describe_gradients(
    p: _Packed, rows: int, N: int, T: int, H: int, HV: int, K: int, V: int
) -> None:
    """Note the memory of `GdnGradients`."""
    for field, heads, width in ((0, HV, V), (6, H, K), (11, H, K), (16, HV, V)):
        p.add_array(field, rows, T, heads, width)
    for field in (21, 26):
        p.add_array(field, rows, T, HV, 1)
    for field in (5, 31):
        p.add(field, N * HV * K * V * 4)


def _describe_steps(p: _Packed) -> None:
    """Note the memory of `GdnSteps`."""
    B, T, H, HV, K, V = p.fields[39:45]
    for field, heads, width in ((0, H, K), (5, H, K), (10, HV, V), (25, HV, V)):
        p.add_array(field, B, T, heads, width)
    for field in (15, 20):
        p.add_array(field, B, T, HV, 1)
    slots, element = p.fields[33], _BYTES[p.fields[38]]
    p.add(33, B * 8)
    rows = B
    if slots:
        rows = 1 + max(struct.unpack(f"={B}q", ctypes.string_at(slots, 8 * B)))
    for field, row, head in ((30, *p.fields[34:36]), (31, *p.fields[36:38])):
        count = (rows - 1) * row + (HV - 1) * head + K * V if rows else 0
        p.add(field, count * element)
    p.add(32, B * T * HV * K * V * element)
