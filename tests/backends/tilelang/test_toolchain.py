"""Which compilers and versions are found, and what is said where they do not fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kernel_backends import check_reason, linear_arguments, reasons_on_a_gpu

tilelang = pytest.importorskip("tilelang")

from gdn_ops.backends.tilelang.host import toolchain  # noqa: E402

NO_CPP = "no C++ compiler, which emulation needs: install g++, or set CXX"
NO_NVCC = "no nvcc, which TileLang compiles with: pip install 'tilelang[nvcc]', or set CUDA_HOME"


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
    assert toolchain.cpu_reasons() == [NO_CPP]
    other = program_at(no_tools / "bin" / "clang++")
    assert toolchain.compiler() == str(other)
    first = program_at(no_tools / "bin" / "g++")
    assert toolchain.compiler() == str(first)
    assert toolchain.cpu_reasons() == []
    monkeypatch.setenv("CXX", "nowhere/g++")
    assert toolchain.compiler() is None
    assert toolchain.cpu_reasons() == [f"{NO_CPP}; CXX is 'nowhere/g++', which is no program"]
    monkeypatch.setenv("CXX", "clang++")
    assert toolchain.compiler() == str(other)


@pytest.mark.usefixtures("no_tools", "fresh_reasons")
def test_missing_compilers_are_reasons_on_a_cpu_and_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_reason("tilelang", linear_arguments(), NO_CPP)
    assert reasons_on_a_gpu("tilelang", monkeypatch) == [NO_NVCC]


def test_nvcc_is_looked_for_where_tilelang_looks(
    no_tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert toolchain.nvcc() is None
    assert toolchain.gpu_reasons() == [NO_NVCC]
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
        assert toolchain.gpu_reasons() == [f"{NO_NVCC}; it is {str(home)!r}, which has no bin/nvcc"]
        assert toolchain.nvcc() is None
        program_at(home / "bin" / "nvcc")
        assert toolchain.nvcc() == home / "bin" / "nvcc"
        assert toolchain.gpu_reasons() == []


def test_the_nvcc_of_a_wheel_is_a_program_in_its_bin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def file(path: str) -> Any:
        program = tmp_path / path
        return SimpleNamespace(name=program.name, parent=program.parent, locate=lambda: program)

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
    installed = wanted if requires is None else requires
    monkeypatch.setattr(toolchain.importlib.metadata, "version", version)
    monkeypatch.setattr(toolchain.importlib.metadata, "requires", lambda name: installed)
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
