"""Kernels are compiled once, kept by all that they are made of, and found again on disk."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errors import message_of
from paths import ROOT
from processes import python

tilelang = pytest.importorskip("tilelang")

from gdn_ops.backends.tilelang.host import cache, launcher, toolchain  # noqa: E402
from gdn_ops.backends.tilelang.host.launcher import launch  # noqa: E402
from tilelang_kernels import tiny  # noqa: E402
from tilelang_kernels.launching import CONSTANTS, NAME, forget, needs_compiler, run  # noqa: E402

# Once in memory, once on disk.


@needs_compiler
def test_the_first_launch_says_what_it_has_compiled_and_the_second_nothing(
    cold: Path, said: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    level = logging.getLogger("tilelang").level
    run()
    (line,) = said()
    assert re.fullmatch(rf"tilelang: {re.escape(NAME)} compiled in \d+\.\d\d s", line)
    run()
    run(dict(reversed(CONSTANTS.items())))
    assert len(said()) == 1
    run({**CONSTANTS, "N": 16})
    assert len(said()) == 2
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("tilelang").level == level
    assert len([path for path in cold.iterdir() if path.is_dir()]) == 2


@needs_compiler
def test_what_is_on_disk_is_not_compiled_again(
    cold: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    forget(monkeypatch)
    run()
    _, line = said()
    assert re.fullmatch(rf"tilelang: {re.escape(NAME)} taken from disk in \d+\.\d\d s", line)


@needs_compiler
@pytest.mark.parametrize("file", ["kernel.so", "kernel.json"])
def test_what_is_broken_on_disk_is_compiled_again(
    file: str, cold: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    (entry,) = cold.iterdir()
    # Elsewhere: a library that is loaded is not opened again.
    elsewhere = cold.parent / "elsewhere"
    broken = elsewhere / "gdn_ops" / entry.name
    shutil.copytree(entry, broken)
    (broken / file).write_text("half of it")
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(elsewhere))
    for expected in ("compiled", "taken from disk"):
        forget(monkeypatch)
        run()
        assert f"{NAME} {expected} in " in said()[-1]


@needs_compiler
def test_a_process_that_finds_its_kernels_on_disk_imports_no_tilelang(cold: Path) -> None:
    run()
    code = f"""
import logging, sys, torch
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from tilelang_kernels import tiny
from gdn_ops.backends.tilelang.host.launcher import launch
x, y = torch.ones(2, 8), torch.zeros(2, 8)
launch(tiny.scaled, {CONSTANTS!r}, x, y, 5.0, 2)
print(y.sum().item(), "tilelang" in sys.modules, "tvm" in sys.modules)
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = python(
        *("-W", "error", "-c", code), PYTHONPATH=path, TILELANG_CACHE_DIR=str(cold.parent)
    )
    assert done.returncode == 0, done.stderr
    line, result = done.stdout.splitlines()
    assert re.fullmatch(rf"tilelang: {re.escape(NAME)} taken from disk in \d+\.\d\d s", line)
    assert result == "80.0 False False"


def test_importing_tilelang_and_the_modules_of_the_backend_warns_of_nothing() -> None:
    code = """
import sys
from gdn_ops.backends.tilelang.host import launcher
from gdn_ops.backends.tilelang.host import cache
from gdn_ops.backends.tilelang.emulation import programs
from gdn_ops.backends.tilelang.emulation import language
from gdn_ops.backends.tilelang.host import toolchain
assert "tilelang" not in sys.modules
from gdn_ops.backends.tilelang.emulation.language import CPU
CPU.prim_func
assert "tilelang" in sys.modules
"""
    done = python("-W", "error", "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_kernel_is_kept_by_all_that_it_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("key_kernel", "key_helper", "key_stranger")
    kernel, helper, stranger = (tmp_path / f"{name}.py" for name in names)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "key_package.py").write_text("y = 1\n")
    kernel.write_text("import key_package\nfrom key_helper import x\ndef make(T): ...\n")
    helper.write_text("x = 1\n")
    stranger.write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(elsewhere))
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in (*names, "key_package"):
        monkeypatch.setitem(sys.modules, name, importlib.import_module(name))
    make = sys.modules["key_kernel"].make

    def key(constants: dict[str, Any] | None = None, *more: Any) -> str:
        cache._sources.cache_clear()
        return cache.key(make, constants or {"a": 1, "b": "2"}, *more)

    first = key()
    assert key() == first
    assert key({"b": "2", "a": 1}) == first
    assert key({"a": 1, "b": 2}) != first
    assert key({"a": 1, "b": "2"}, "-O2") != first

    stranger.write_text("x = 2\n")
    (elsewhere / "key_package.py").write_text("y = 2\n")
    assert key() == first
    helper.write_text("x = 2\n")
    second = key()
    assert second != first
    kernel.write_text(kernel.read_text() + "# changed\n")
    assert key() not in (first, second)

    before = key()
    copied = tmp_path / "emulation"
    shutil.copytree(cache.EMULATION, copied, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "EMULATION", copied)
    assert key() == before
    modules = sorted(copied.glob("*.py"))
    assert {"programs.py", "rounding.py"} <= {path.name for path in modules}
    for path in modules:
        path.write_text("changed")
        after = key()
        assert after != before
        before = after


def test_what_emulates_imports_nothing_of_the_backend_that_is_not_part_of_the_key() -> None:
    prefix = "gdn_ops.backends.tilelang."
    imported = {
        name.removeprefix(prefix).partition(".")[0]
        for path in cache.EMULATION.glob("*.py")
        for name in cache._imported(path)
        if name.startswith(prefix)
    }
    assert imported == {"emulation"}


def test_a_cache_that_cannot_be_written_is_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "file"))
    folder = cache.folder()
    assert folder.is_dir() and tmp_path not in folder.parents
    assert cache.folder() == folder
    folder.rmdir()


@needs_compiler
@pytest.mark.parametrize("where", ["file", "file/below", "a" * 300], ids=["file", "below", "long"])
def test_a_cache_that_cannot_be_a_folder_costs_no_call(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    # Import TileLang too, which writes files of its own as it starts.
    code = """
import logging, os, sys, torch
from gdn_ops import gated_delta
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
x = torch.ones(3, 1, 2, 1, 16)
gated_delta(*x, rule="linear", backend="tilelang")
print(os.environ["TILELANG_CACHE_DIR"])
"""
    done = python("-c", code, TILELANG_CACHE_DIR=str(tmp_path / where), TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    warning, given = done.stdout.splitlines()
    assert warning.startswith(f"tilelang: kernels are not kept: {tmp_path / where}/gdn_ops: ")
    assert given == str(tmp_path / where)


@needs_compiler
def test_a_full_disk_costs_the_cache_and_no_call(
    tmp_path: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmp_path / "full"
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(full))
    compiler = tmp_path / "compiler"
    error = "/usr/bin/ld: final link failed: No space left on device"
    own = toolchain.compiler()
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *{full}*) echo "{error}" >&2; exit 1;; esac\nexec {own} "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    forget(monkeypatch)
    run()
    run({**CONSTANTS, "N": 16})
    warning, *lines = said()
    assert warning == (
        f"tilelang: kernels are not kept: {full}/gdn_ops: No space left on device; "
        f"set TILELANG_CACHE_DIR to a folder that can be written"
    )
    assert [line.partition(" in ")[0] for line in lines] == [
        f"tilelang: {NAME} compiled",
        "tilelang: scaled (N=16, dtype=float32) for cpu compiled",
    ]
    assert not list((full / "gdn_ops").iterdir())
    shutil.rmtree(cache.folder())


@needs_compiler
def test_a_cache_that_can_only_be_read_is_read(
    cold: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    forget(monkeypatch)
    monkeypatch.setattr(cache, "_given_up", {cold: cold.parent / "elsewhere"})
    run()
    assert f"{NAME} taken from disk in " in said()[-1]


def test_a_disk_that_cannot_be_written_at_all_is_named(
    cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere")

    monkeypatch.setattr(launcher, "_emulated", full)
    assert message_of(RuntimeError, run) == (
        f"tilelang: cannot write {NAME} to disk: /somewhere: No space left on device; "
        f"set TILELANG_CACHE_DIR to a folder that can be written"
    )
    monkeypatch.setattr(cache, "folder", full)
    assert cache.keep_log("name", "text") is None


def test_two_processes_may_keep_the_same_kernel(cold: Path) -> None:
    for text in ("first", "second"):
        library = cache.folder() / "library"
        library.write_text(text)
        entry = cache.store("name", library, {"parameters": [], "order": [], "tiles": [text]})
    assert cache.stored("name") == entry
    assert cache.description(entry)["tiles"] == ["first"]
    assert (entry / "kernel.so").read_text() == "first"
    assert [path.name for path in cold.iterdir()] == ["name"]
    assert cache.stored("another") is None


# Threads.


@needs_compiler
def test_threads_that_want_one_kernel_compile_it_once(cold: Path, said: Any) -> None:
    barrier = threading.Barrier(4)

    def work(scale: float) -> None:
        barrier.wait()
        run(scale=scale)
        run({**CONSTANTS, "N": 16}, scale=scale)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, (0.0, 1.0, 2.0, 3.0)))
    assert sorted(line.partition(" compiled")[0] for line in said()) == [
        "tilelang: scaled (N=16, dtype=float32) for cpu",
        "tilelang: scaled (N=8, dtype=float32) for cpu",
    ]


@needs_compiler
def test_a_backward_pass_compiles_on_its_own_thread(cold: Path, said: Any) -> None:
    seen = []

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 3 * x

        @staticmethod
        def backward(ctx: Any, d_y: Tensor) -> Tensor:
            seen.append(threading.get_ident())
            d_x = torch.empty_like(d_y)
            launch(tiny.scaled, CONSTANTS, d_y.contiguous(), d_x, 3.0, 2)
            return d_x

    def work() -> float:
        x = torch.ones(2, 8, requires_grad=True)
        Scaled.apply(x).sum().backward()
        assert x.grad is not None
        return x.grad.sum().item()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == 48.0
    assert len(seen) == 1 and seen[0] != threading.get_ident()
    assert len(said()) == 1
