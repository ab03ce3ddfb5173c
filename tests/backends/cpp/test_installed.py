"""A wheel carries the library and runs elsewhere; without a compiler it installs all the same."""

from __future__ import annotations

import json
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import command_line
from cpp_libraries import levels_here, needs_compiler, write_sources
from gdn_ops.backends.cpp import build, library
from paths import copy_source
from processes import build_distribution, install, output_of, python

pytestmark = needs_compiler

IN_WHEEL = f"gdn_ops/backends/cpp/{build.NAME}"
NOT_BUILT = "not built: run gdn-ops build, with a C++ compiler (GCC or Clang) installed"

ASK = """
import gdn_ops
from gdn_ops.backends.cpp import library
print(gdn_ops.__file__)
print(library.missing())
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return copy_source(tmp_path / "source")


def wheel(source: Path, to: Path, **environment: str) -> Path:
    to.mkdir()
    return build_distribution(source, to, "--wheel", CXXFLAGS="-O0", **environment)


def ask(target: Path, elsewhere: Path) -> str:
    """Return what an installed package says of its library, from another folder."""
    elsewhere.mkdir(exist_ok=True)
    printed = output_of("-c", ASK, cwd=elsewhere, PYTHONPATH=str(target))
    file, reason = printed.splitlines()
    assert Path(file).is_relative_to(target)
    return reason


def test_a_wheel_carries_the_library_and_names_its_platform_only(
    source: Path, tmp_path: Path
) -> None:
    file = wheel(source, tmp_path / "wheel", GDN_OPS_BUILD_CPP="1")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert file.name.endswith(f"-py3-none-{platform}.whl")
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    sources = [f"gdn_ops/backends/cpp/src/{path.name}" for path in build.SOURCES.glob("*.*")]
    assert {IN_WHEEL, *sources} <= set(names)
    target = tmp_path / "site"
    target.mkdir()
    install(target, file)
    assert ask(target, tmp_path / "elsewhere") == "None"


def test_without_a_compiler_it_installs_and_is_built_later(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    target.mkdir()
    # One that an earlier build has left is of other sources.
    tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    left = source / "build" / f"lib.{tag}" / IN_WHEEL
    left.parent.mkdir(parents=True)
    left.write_bytes(b"old")
    file = wheel(source, tmp_path / "wheel", CXX="false")
    assert file.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(file) as archive:
        assert IN_WHEEL not in archive.namelist()
    install(target, file)
    elsewhere = tmp_path / "elsewhere"
    assert ask(target, elsewhere) == NOT_BUILT
    told = output_of(
        *("-m", "gdn_ops", "build"), cwd=elsewhere, PYTHONPATH=str(target), CXXFLAGS="-O0"
    )
    assert told.splitlines() == [str(target / IN_WHEEL), f"levels: {', '.join(levels_here())}"]
    assert ask(target, elsewhere) == "None"


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        (
            {"GDN_OPS_BUILD_CPP": "1", "CXX": "false"},
            "GDN_OPS_BUILD_CPP=1: CXX is 'false', should be a C++ compiler: GCC or Clang",
        ),
        (
            {"GDN_OPS_BUILD_CPP": "yes"},
            "GDN_OPS_BUILD_CPP is 'yes', should be 0, 1 or not be set",
        ),
    ],
)
def test_an_installation_that_must_have_the_library_fails_without(
    source: Path, environment: dict[str, str], text: str
) -> None:
    done = python("setup.py", "build_ext", cwd=source, **environment)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == text


def test_an_installation_without_a_compiler_warns(source: Path) -> None:
    done = python("setup.py", "build_ext", cwd=source, CXX="false")
    assert done.returncode == 0
    assert (
        "gdn_ops is installed without its C++ kernels: CXX is 'false', should be a C++ compiler: "
        "GCC or Clang" in done.stderr
    )


def test_an_editable_installation_builds_beside_the_sources(source: Path) -> None:
    output_of("setup.py", "build_ext", "--inplace", cwd=source, CXXFLAGS="-O0")
    path = source / "backends" / "cpp" / build.NAME
    library.open_library(path, build.source_hash())
    assert not (source / "build" / "lib").exists()


# gdn-ops build.


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let `gdn-ops build` compile a few lines for a package in a folder of its own."""
    sources, package = write_sources(tmp_path / "small"), tmp_path / "package"
    monkeypatch.setattr(library, "PACKAGE", package)
    monkeypatch.setattr(build.build, "__defaults__", (sources, *build.build.__defaults__[1:]))
    monkeypatch.setenv("GDN_OPS_CACHE", str(tmp_path / "cache"))
    return package


def test_build_says_what_it_built(small: Path) -> None:
    result = command_line.run("build")
    levels = ", ".join(levels_here())
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{small / build.NAME}\nlevels: {levels}\n"
    result = command_line.run("build", "--json")
    told = json.loads(result.stdout)
    assert told["path"] == str(small / build.NAME)
    assert (told["schema"], told["levels"], told["left_out"]) == (1, list(levels_here()), {})


def test_build_takes_the_users_cache_where_the_package_cannot_be_written(small: Path) -> None:
    small.write_text("a file in its place")
    result = command_line.run("build")
    assert result.exit_code == 0
    path = library.user_folder() / build.NAME
    assert result.stdout.splitlines()[0] == str(path)
    assert path.is_relative_to(small.parent / "cache")


def test_build_names_the_folder_where_nothing_can_be_written(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.write_text("a file in its place")
    monkeypatch.setenv("GDN_OPS_CACHE", str(small / "cache"))
    result = command_line.run("build")
    assert result.exit_code == 2
    folder = library.user_folder()
    assert result.stderr == f"gdn-ops: {folder} cannot be written: Not a directory\n"


def test_build_without_a_compiler_is_a_line(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "nowhere")
    result = command_line.run("build")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "gdn-ops: CXX is 'nowhere', and there is no such command\n"


def test_build_shows_what_the_compiler_said(small: Path, tmp_path: Path) -> None:
    write_sources(tmp_path / "small", doors='#include "level.h"\nint f( {\n')
    result = command_line.run("build")
    assert (result.exit_code, result.stdout) == (1, "")
    first, *_, last = result.stderr.splitlines()
    assert first.startswith(f"{tmp_path}/small/library.cc:2:") and "error: " in first
    compiler, _ = build.find_compiler()
    assert last == f"gdn-ops: {compiler[0]} failed on the kernels: {first}"
