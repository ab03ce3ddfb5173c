"""The kernels compute the definition on another machine, emulated, and touch no other memory."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cpp_driver
import gdn_ops
from cpp_driver import Driver, compile_driver
from cpp_libraries import levels_here, needs_compiler
from gdn_ops.backends.cpp import build, library
from gdn_ops.testing import Example, conformance
from gdn_ops.testing.oracle import judge
from gdn_ops.testing.runs import installed

pytestmark = needs_compiler

RULES = ("gated_delta", "delta", "gated", "linear")
DTYPES = ("float32", "bfloat16", "float16")
ARM = "aarch64-linux-gnu-g++"
SANITIZED = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g1 -O1"

SHAPES = (
    Example(B=2, T=37, H=2, R=2, K=20, V=36, initial_state=True),
    Example(T=135, R=3, K=16, V=16, gate="extreme", beta="wide", log_gate=True),
    Example(T=33, K=7, V=5, gate="zero", qk_l2norm=True),
    Example(T=74, H=2, K=32, V=33, lengths=(0, 5, 64, 0, 5), strided=True),
)
"""Whole and cut chunks and panels, runs of chunks, zeros, empty sequences, memory with gaps."""


def emulator(*names: str) -> str:
    """Return an emulator; skip a test without."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no {names[0]} (on Debian: qemu-user)")
    return found


def for_arm(folder: Path) -> tuple[str, ...]:
    if shutil.which(ARM) is None:
        pytest.skip(f"no {ARM} (on Debian: g++-aarch64-linux-gnu)")
    emulated = emulator("qemu-aarch64", "qemu-aarch64-static")
    environment = {**os.environ, "CXX": ARM, "CXXFLAGS": "-Werror"}
    # The emulator finds no libraries of the other machine by itself.
    return emulated, str(compile_driver(folder, environment, ("-static",)))


def with_sanitizers(folder: Path) -> tuple[str, ...]:
    compiler, _ = build.find_compiler()
    empty = folder / "empty.cc"
    empty.write_text("int main() {}\n")
    program = str(folder / "empty")
    done = build._run([*compiler, *SANITIZED.split(), str(empty), "-o", program], os.environ)
    if done.returncode or build._run([program], os.environ).returncode:
        pytest.skip(f"{compiler[0]} has no sanitizers")
    return (str(compile_driver(folder, {**os.environ, "CXXFLAGS": SANITIZED})),)


def for_x86(folder: Path, flags: str = "-O1") -> tuple[str, ...]:
    if "avx2" not in levels_here():
        pytest.skip("this machine is no x86-64")
    emulated = emulator("qemu-x86_64", "qemu-x86_64-static")
    return emulated, "-cpu", str(compile_driver(folder, {**os.environ, "CXXFLAGS": flags}))


ELSEWHERE = {"arm": for_arm, "sanitized": with_sanitizers}
"""The kernels for ARM64 under an emulator; those for this machine under two sanitizers."""

COMMANDS = {
    **ELSEWHERE,
    "x86": for_x86,
    "more": functools.partial(for_x86, flags="-O1 -mavx2 -mfma"),
}
"""Beside these, for a processor that is emulated: the usual build, and one that asks for more."""


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[str, ...]]:
    """Commands by name, each compiled when it is first asked for; a test is skipped without."""

    class Commands(dict[str, tuple[str, ...]]):
        def __missing__(self, name: str) -> tuple[str, ...]:
            self[name] = COMMANDS[name](tmp_path_factory.mktemp(name))
            return self[name]

    return Commands()


def use(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Let the backend run on a driver."""
    # Every module of the backend that asks for the library.
    for name, module in list(sys.modules.items()):
        if name.startswith("gdn_ops.backends.cpp.") and module is not library:
            for door, stand_in in (("library", lambda: driver), ("missing", lambda: None)):
                if callable(getattr(module, door, None)):
                    monkeypatch.setattr(module, door, stand_in)
    return driver


LEVELS = [("arm", "baseline"), *(("sanitized", level) for level in levels_here())]


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_the_kernels_compute_the_definition_elsewhere(
    name: str,
    level: str,
    commands: Mapping[str, tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = use(Driver(commands[name], level), monkeypatch)
    if not driver.has_level():
        pytest.skip(f"this processor has no level {level}")
    for dtype in DTYPES:
        for rule in RULES:
            for example in SHAPES:
                drawn = replace(example, rule=rule, dtype=dtype)
                verdict = judge(drawn, "cpp")
                assert verdict.passed, (drawn, verdict)
    assert driver.calls >= 2 * len(DTYPES) * len(RULES) * len(SHAPES)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_whole_kit_passes_elsewhere(
    name: str, commands: Mapping[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = use(Driver(commands[name]), monkeypatch)
    for subject in conformance.subjects(installed("cpp")):
        row = conformance.run_subject("cpp", subject, examples=5, seed=0, shrink=False)
        assert row.passed and row.examples, row
    assert driver.calls > 100


def on(processor: str, command: tuple[str, ...], level: str = "") -> Driver:
    """Return a driver on an emulated processor."""
    *emulator, program = command
    return Driver((*emulator, processor, program), level)


def test_a_processor_below_avx2_runs_the_baseline(
    commands: Mapping[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {level: on("Nehalem", commands["x86"], level).has_level() for level in levels_here()}
    assert [level for level, is_there in old.items() if is_there] == ["baseline"]
    # A level that it lacks would end it by an illegal instruction.
    driver = use(on("Nehalem", commands["x86"]), monkeypatch)
    for dtype in DTYPES:
        verdict = judge(replace(SHAPES[0], dtype=dtype), "cpp")
        assert verdict.passed, (dtype, verdict)
    assert driver.calls >= 2 * len(DTYPES)


def test_a_library_that_asks_for_more_has_no_level_on_a_processor_with_less(
    commands: Mapping[str, tuple[str, ...]],
) -> None:
    assert not on("Nehalem", commands["more"]).has_level()


def test_a_sanitizer_ends_the_program_that_reads_beside_an_array(
    commands: Mapping[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(Driver(commands["sanitized"]), monkeypatch)
    whole = cpp_driver._Packed.add

    def cut(packed: cpp_driver._Packed, name: str, size: int) -> None:
        # The last element of v.
        whole(packed, name, size - 4 * (name == "v.data"))

    q, k, v = torch.randn(3, 1, 5, 2, 8)
    gates = torch.rand(2, 1, 5, 2)
    gdn_ops.gated_delta(q, k, v, *gates, backend="cpp")
    monkeypatch.setattr(cpp_driver._Packed, "add", cut)
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        gdn_ops.gated_delta(q, k, v, *gates, backend="cpp")
