"""How TileLang kernels are compiled, kept, called and noted, and what is said when they are not."""

from __future__ import annotations

import importlib
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from paths import ROOT

tilelang = pytest.importorskip("tilelang")

from gdn_ops.backends.tilelang.host import cache, launcher, toolchain  # noqa: E402
from gdn_ops.backends.tilelang.host.launcher import launch  # noqa: E402
from gdn_ops.kernel_support.launches import Launch, recorded_target, recording  # noqa: E402
from tilelang_kernels import tiny  # noqa: E402

CONSTANTS = {"N": 8, "dtype": "float32"}
NAME = "scaled (N=8, dtype=float32) for cpu"

needs_compiler = pytest.mark.skipif(
    toolchain.compiler() is None, reason="; ".join(toolchain.cpu_reasons())
)


@pytest.fixture
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is compiled, in memory or on disk; the folder of the disk cache."""
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launcher, "_launched", {})
    monkeypatch.setattr(launcher, "_built", {})
    yield tmp_path / "gdn_ops"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    """What the logger of the package says, from now on."""
    caplog.set_level(logging.INFO, "gdn_ops")
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("gdn_ops")]


def run(constants: dict[str, Any] = CONSTANTS, scale: float = 3.0) -> None:
    x = torch.arange(4.0 * constants["N"]).view(4, -1)
    y = torch.full_like(x, float("nan"))
    launch(tiny.scaled, constants, x, y, scale, 4)
    assert torch.equal(y, scale * x)


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
    monkeypatch.setattr(launcher, "_launched", {})
    monkeypatch.setattr(launcher, "_built", {})
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
        monkeypatch.setattr(launcher, "_launched", {})
        monkeypatch.setattr(launcher, "_built", {})
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
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": path, "TILELANG_CACHE_DIR": str(cold.parent)},
        capture_output=True,
        text=True,
        timeout=300,
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
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
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
    found = cache.folder()
    assert found.is_dir() and tmp_path not in found.parents
    assert cache.folder() == found
    found.rmdir()


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
    barrier, errors = threading.Barrier(4), []

    def work(scale: float) -> None:
        barrier.wait()
        try:
            run(scale=scale)
            run({**CONSTANTS, "N": 16}, scale=scale)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
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

    def work() -> None:
        x = torch.ones(2, 8, requires_grad=True)
        Scaled.apply(x).sum().backward()
        assert x.grad is not None
        seen.append(x.grad.sum().item())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen[1] == 48.0
    assert seen[0] != threading.get_ident()
    assert len(said()) == 1


# What goes wrong.


@needs_compiler
def test_a_kernel_that_cannot_be_traced_is_named(cold: Path) -> None:
    with pytest.raises(RuntimeError) as raised:
        launch(tiny.broken, {"N": 8}, torch.ones(8))
    (log,) = (cold / "failed").iterdir()
    assert re.fullmatch(r"broken-[0-9a-f]{16}\.log", log.name)
    assert str(raised.value) == (
        "tilelang: cannot compile broken (N=8) for cpu: T.copy: X gives (8,) elements and a tile "
        f"takes (9,), should be the same but for axes of 1; see {log}"
    )
    text = log.read_text()
    assert text.startswith("broken (N=8) for cpu\n\nTraceback (most recent call last):\n")
    assert "tiny.py" in text
    assert isinstance(raised.value.__cause__, ValueError)


def test_a_compiler_that_fails_is_named(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = cold.parent / "failing-g++"
    failing.write_text("#!/bin/sh\necho some words\necho more words >&2\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(RuntimeError) as raised:
        run()
    (log,) = (cold / "failed").iterdir()
    assert str(raised.value) == (
        f"tilelang: cannot compile {NAME}: {failing} exits with 3; see {log}"
    )
    text = log.read_text()
    assert text.startswith(f"{NAME}\n\n{failing} -std=c++17 -O3 ")
    assert "\nsome words\nmore words\n" in text
    assert "gdn_ops_call(" in text
    # A failure is not remembered.
    monkeypatch.delenv("CXX")
    if toolchain.compiler() is not None:
        run()


def test_a_missing_compiler_is_named(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(cold))
    with pytest.raises(RuntimeError) as raised:
        run()
    (log,) = (cold / "failed").iterdir()
    assert str(raised.value) == (
        f"tilelang: cannot compile {NAME}: no C++ compiler, which emulation needs: install g++, "
        f"or set CXX; see {log}"
    )


@needs_compiler
@pytest.mark.parametrize(
    ("position", "value", "error", "text"),
    [
        (0, torch.ones(4, 7), ValueError, "X has shape (4, 7), should be (M = 4, 8)"),
        (0, torch.ones(32), ValueError, "X has shape (32,), should be (M, 8)"),
        (1, torch.ones(5, 8), ValueError, "Y has shape (5, 8), should be (M = 4, 8)"),
        (1, torch.ones(8, 4).T, ValueError, "Y has strides (1, 4), should be contiguous"),
        (1, torch.ones(4, 8).double(), TypeError, "Y is float64, should be float32"),
        (1, torch.ones(4, 8, device="meta"), ValueError, "Y is on meta, should be on cpu"),
        (1, 2.0, TypeError, "Y is float, should be a tensor"),
        (2, torch.ones(()), TypeError, "scale is Tensor, should be a number of float32"),
        (3, 2.0, TypeError, "rows is float, should be a number of int32"),
        (3, 2**31, ValueError, "rows is 2147483648, which is no int32"),
    ],
)
def test_an_argument_that_the_kernel_does_not_take_is_an_error(
    position: int, value: Any, error: type[Exception], text: str
) -> None:
    arguments: list[Any] = [torch.ones(4, 8), torch.ones(4, 8), 1.0, 4]
    arguments[position] = value
    with pytest.raises(error) as raised:
        launch(tiny.scaled, CONSTANTS, *arguments)
    assert str(raised.value) == f"scaled: {text}"


@needs_compiler
def test_a_wrong_number_of_arguments_is_an_error() -> None:
    with pytest.raises(TypeError) as raised:
        launch(tiny.scaled, CONSTANTS, torch.ones(4, 8))
    assert str(raised.value) == "scaled: 1 arguments, should be 4: X, Y, scale, rows"


# Launches are noted.


def test_launches_on_meta_tensors_are_noted() -> None:
    x, y = torch.empty(4, 8, device="meta"), torch.empty(4, 8, device="meta")
    with recording("sm_90a") as launches:
        assert recorded_target() == "sm_90a"
        launch(tiny.scaled, CONSTANTS, x, y, 2.0, 4)
    assert launches == [Launch(tiny.scaled, (), (x, y, 2.0, 4), CONSTANTS)]
    with pytest.raises(ValueError) as raised:
        launch(tiny.scaled, CONSTANTS, x, y, 2.0, 4)
    assert str(raised.value) == (
        "scaled: the first tensor is on the meta device, should be on cuda or cpu"
    )


# For a GPU.


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100a"),
        ((12, 0), "sm_120a"),
    ],
)
def test_from_hopper_on_the_architecture_has_the_letter_that_wgmma_needs(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher.arch.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert launcher.arch(0) == expected
    launcher.arch.cache_clear()


class OnGPU:
    """What `launch` asks of a tensor on a GPU."""

    is_meta = False

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)


def test_gpus_of_one_kind_share_a_kernel(
    cold: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, called = [], []

    def compile(function: Any, **options: Any) -> Any:
        compiled.append((function.attrs["global_symbol"], options))
        logging.getLogger("tilelang").info("chatter")
        module = SimpleNamespace(main=lambda *args: called.append(args))
        adapter = SimpleNamespace(get_exportable_executable=lambda: module)
        return SimpleNamespace(adapter=adapter, artifact="made now")

    monkeypatch.setattr(tilelang, "compile", compile)
    monkeypatch.setattr(launcher, "arch", lambda index: "sm_80" if index == 2 else "sm_90a")
    for index in (0, 1, 0, 2):
        launch(tiny.scaled, CONSTANTS, OnGPU(index), index)
    options = [
        {"target": {"kind": "cuda", "arch": arch}, "execution_backend": "tvm_ffi"}
        for arch in ("sm_90a", "sm_80")
    ]
    assert compiled == [("scaled", option) for option in options]
    assert [args[1] for args in called] == [0, 1, 0, 2]
    name = "tilelang: scaled (N=8, dtype=float32) for"
    assert [line.partition(" in ")[0] for line in said()] == [
        f"{name} sm_90a compiled",
        f"{name} sm_80 compiled",
    ]


def test_a_kernel_that_fails_on_a_gpu_is_named(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(function: Any, **options: Any) -> Any:
        raise RuntimeError("nvcc says no\nand more")

    monkeypatch.setattr(tilelang, "compile", compile)
    monkeypatch.setattr(launcher, "arch", lambda index: "sm_90a")
    with pytest.raises(RuntimeError) as raised:
        launch(tiny.scaled, CONSTANTS, OnGPU(0))
    (log,) = (cold / "failed").iterdir()
    assert str(raised.value) == (
        f"tilelang: cannot compile scaled (N=8, dtype=float32) for sm_90a: nvcc says no; see {log}"
    )
    assert "and more" in log.read_text()


@pytest.mark.slow
@pytest.mark.skipif(toolchain.nvcc() is None, reason="; ".join(toolchain.gpu_reasons()))
def test_nvcc_compiles_and_an_index_has_64_bits() -> None:
    kernel, origin = launcher._compiled(tiny.scaled, CONSTANTS, "sm_90a")
    assert origin in ("compiled", "taken from disk")
    with pytest.raises(RuntimeError, match="X device_type mismatch, expected cuda"):
        kernel(torch.ones(4, 8), torch.ones(4, 8), 1.0, 4)
    function = launcher.trace(tiny.scaled, CONSTANTS)
    target = tilelang.tvm.target.Target({"kind": "cuda", "arch": "sm_90a"})
    with target:
        source = tilelang.lower(function, target=target).kernel_source
    accesses = [line for line in source.splitlines() if re.search(r"\b[XY]\b.*blockIdx", line)]
    assert accesses and all("(int64_t)((int)blockIdx.x)" in line for line in accesses)


# Compilers and versions.


@pytest.fixture
def no_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is installed, and no variable says where it would be; an empty folder."""
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(toolchain, "_packaged", lambda: None)
    monkeypatch.setattr(toolchain, "DEFAULT_CUDA", tmp_path / "none")
    return tmp_path


def program_at(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_a_cpp_compiler_is_what_cxx_names_or_the_first_on_the_path(
    no_tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert toolchain.compiler() is None
    assert toolchain.cpu_reasons() == [
        "no C++ compiler, which emulation needs: install g++, or set CXX"
    ]
    other = program_at(no_tools / "bin" / "clang++")
    assert toolchain.compiler() == str(other)
    first = program_at(no_tools / "bin" / "g++")
    assert toolchain.compiler() == str(first)
    assert toolchain.cpu_reasons() == []
    monkeypatch.setenv("CXX", "nowhere/g++")
    assert toolchain.compiler() is None
    assert toolchain.cpu_reasons() == [
        "no C++ compiler, which emulation needs: install g++, or set CXX; CXX is 'nowhere/g++', "
        "which is no program"
    ]
    monkeypatch.setenv("CXX", "clang++")
    assert toolchain.compiler() == str(other)


def test_nvcc_is_looked_for_where_tilelang_looks(
    no_tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = (
        "no nvcc, which TileLang compiles with: pip install 'tilelang[nvcc]', or set CUDA_HOME"
    )
    assert toolchain.nvcc() is None
    assert toolchain.gpu_reasons() == [missing]
    default = program_at(no_tools / "none" / "bin" / "nvcc")
    assert toolchain.nvcc() == default
    packaged = program_at(no_tools / "wheel" / "bin" / "nvcc")
    monkeypatch.setattr(toolchain, "_packaged", lambda: packaged)
    assert toolchain.nvcc() == packaged
    on_path = program_at(no_tools / "bin" / "nvcc")
    assert toolchain.nvcc() == on_path
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        home = no_tools / variable
        monkeypatch.setenv(variable, str(home))
        assert toolchain.gpu_reasons() == [f"{missing}; it is {str(home)!r}, which has no bin/nvcc"]
        assert toolchain.nvcc() is None
        program_at(home / "bin" / "nvcc")
        assert toolchain.nvcc() == home / "bin" / "nvcc"
        assert toolchain.gpu_reasons() == []


def test_the_nvcc_of_a_wheel_is_a_program_in_its_bin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def file(path: str) -> Any:
        found = tmp_path / path
        return SimpleNamespace(name=found.name, parent=found.parent, locate=lambda: found)

    paths = ["nvidia/cu13/bin/nvcc.profile", "doc/nvcc", "nvidia/cu13/bin/nvcc"]
    monkeypatch.setattr(toolchain.importlib.metadata, "files", lambda name: map(file, paths))
    assert toolchain._packaged() == tmp_path / "nvidia/cu13/bin/nvcc"
    monkeypatch.setattr(toolchain.importlib.metadata, "files", lambda name: [file("bin/ptxas")])
    assert toolchain._packaged() is None


@pytest.mark.parametrize(
    ("versions", "requires", "expected"),
    [
        ({"tilelang": "0.1.15", "apache-tvm-ffi": "0.1.12"}, None, []),
        ({"tilelang": "0.1.15.post1", "apache-tvm-ffi": "0.1.11"}, None, []),
        ({"tilelang": "0.1.15+cuda.git1234", "apache-tvm-ffi": "0.1.12.post2"}, None, []),
        ({}, None, []),
        (
            {"tilelang": "0.1.150", "apache-tvm-ffi": "0.1.13"},
            None,
            [
                "tilelang is 0.1.150, should be 0.1.15: pip install 'gdn_ops[tilelang]'",
                "apache-tvm-ffi is 0.1.13, tilelang 0.1.150 needs <0.1.13,>=0.1.11: pip install "
                "'apache-tvm-ffi<0.1.13,>=0.1.11'",
            ],
        ),
        (
            {"tilelang": "0.1.15"},
            None,
            [
                "apache-tvm-ffi is not installed, tilelang 0.1.15 needs it: pip install "
                "'apache-tvm-ffi<0.1.13,>=0.1.11'"
            ],
        ),
        ({"tilelang": "0.1.15", "apache-tvm-ffi": "9.9"}, [], []),
    ],
)
def test_versions_that_do_not_fit_are_reasons(
    versions: dict[str, str],
    requires: list[str] | None,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        if name in versions:
            return versions[name]
        raise toolchain.importlib.metadata.PackageNotFoundError(name)

    wanted = ["torch", "apache-tvm-ffi<0.1.13,>=0.1.11", "numpy>=1.23.5"]
    found = wanted if requires is None else requires
    monkeypatch.setattr(toolchain.importlib.metadata, "version", version)
    monkeypatch.setattr(toolchain.importlib.metadata, "requires", lambda name: found)
    assert toolchain.version_reasons() == expected


@pytest.mark.parametrize(
    ("clause", "inside", "outside"),
    [
        ("<0.1.13", ["0.1.12", "0.1.12.post1", "0.0.99"], ["0.1.13", "0.1.130", "0.2"]),
        ("<=0.1.12", ["0.1.12", "0.1.12.0"], ["0.1.13"]),
        (">=0.1.11", ["0.1.11", "0.2", "1"], ["0.1.10", "0.1.9"]),
        (">0.1.2", ["0.1.3"], ["0.1.2", "0.1.2.0"]),
        ("==0.1.11", ["0.1.11", "0.1.11.0"], ["0.1.12"]),
        ("==0.1.*", ["0.1.0", "0.1.12"], ["0.2", "0.12"]),
        ("!=0.1.12", ["0.1.11"], ["0.1.12"]),
        ("!=0.1.*", ["0.2"], ["0.1.3"]),
        ("~=0.1.9", ["0.1.9", "0.1.12"], ["0.1.8", "0.2.0"]),
    ],
)
def test_a_clause_of_a_range_of_versions_means_what_pip_takes_it_for(
    clause: str, inside: list[str], outside: list[str]
) -> None:
    assert [toolchain._allows(clause, version) for version in inside] == [True] * len(inside)
    assert [toolchain._allows(clause, version) for version in outside] == [False] * len(outside)
