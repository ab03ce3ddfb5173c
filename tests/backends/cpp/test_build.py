"""The library is built by any compiler that can, and whoever cannot says why."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

import pytest

from cpp_libraries import (
    LEVEL,
    compiler,
    compiler_without,
    levels_here,
    needs_compiler,
    script,
    write_sources,
)
from gdn_ops.backends.cpp import build, library
from gdn_ops.backends.cpp.build import BuildError, CompileError
from processes import printed

pytestmark = needs_compiler


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return write_sources(tmp_path / "sources")


# List what is built.


def test_the_kernels_are_built_with_every_level_of_this_machine(tmp_path: Path) -> None:
    built = build.build(tmp_path, environment={**os.environ, "CXXFLAGS": "-O0"})
    assert built.path == tmp_path / "libgdn_ops_cpp.so"
    assert (built.levels, built.left_out) == (levels_here(), {})
    loaded = library.open_library(built.path, build.source_hash())
    usable = [name for name in built.levels if loaded.gdn_choose_level(name.encode())]
    assert usable[-1] == "baseline"
    for name in usable:
        library.choose_level(loaded, name)
        assert loaded.gdn_level().decode() == name
    library.choose_level(loaded, "")
    # Where pairs of bfloat16 are slow, their level is there and is not chosen.
    slow = () if _is_by_amd() else ("avx512bf16",)
    assert loaded.gdn_level().decode() == next(name for name in usable if name not in slow)


def _is_by_amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()


@pytest.mark.parametrize("name", ["g++", "clang++"])
def test_no_compiler_warns_of_the_kernels(name: str, tmp_path: Path) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"no {name}")
    said = tmp_path / "said"
    cxx = script(tmp_path / "cxx", f'{name} "$@" 2>>{said}\n')
    built = build.build(tmp_path / "out", environment={**os.environ, "CXX": cxx})
    assert built.left_out == {}
    # GCC 12 warns of its own headers.
    warnings = [
        line
        for line in said.read_text().splitlines()
        if "warning:" in line and str(build.SOURCES) in line
    ]
    assert warnings == []


def test_a_level_is_compiled_with_its_own_numbers(sources: Path, tmp_path: Path) -> None:
    level = LEVEL + (
        'static_assert((GDN_LANES == 16) == (GDN_FEATURES >= 3), "");\n'
        "#if defined(__AVX512F__) != (GDN_FEATURES >= 3)\n#error AVX-512\n#endif\n"
        "#if defined(__AVX512BF16__) != (GDN_FEATURES == 4)\n#error BF16\n#endif\n"
        "#if defined(__AVX2__) != (GDN_FEATURES >= 2)\n#error AVX2\n#endif\n"
    )
    write_sources(sources, level=level)
    assert build.build(tmp_path, sources).levels == levels_here()


def test_the_levels_of_arm_are_compiled_for_its_128_bits() -> None:
    assert build.LEVELS["aarch64"] == (build.Level("baseline", 4, 8, 1),)
    for levels in (*build.LEVELS.values(), build.OTHER):
        assert levels[-1].name == "baseline" and levels[-1].flags == ()


def test_no_object_of_a_level_has_code_that_the_linker_may_give_to_another(tmp_path: Path) -> None:
    # An inline function that is not static is merged: AVX-512 would run on any processor.
    kept = tmp_path / "kept"
    kept.mkdir()
    keep = 'for x; do case "$x" in *.o) last=$x;; esac; done\n$real "$@" || exit\n'
    keep += f'[ -f "$last" ] && cp "$last" {kept}\nexit 0\n'
    environment = compiler(tmp_path / "cxx", keep)
    build.build(tmp_path / "out", environment=environment)
    objects = [kept / f"{name}.o" for name in levels_here()]
    for path in objects:
        done = build._run(["nm", "--defined-only", str(path)], os.environ)
        assert done.returncode == 0, done.stderr
        kinds = {line.split()[1]: line for line in done.stdout.splitlines()}
        assert kinds and not kinds.keys() & set("wWvVu"), kinds


def test_a_library_is_replaced_at_once_and_nothing_is_left_beside_it(
    sources: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = build.build(out, sources).path.stat().st_ino
    assert build.build(out, sources).path.stat().st_ino != first
    assert [path.name for path in out.iterdir()] == [build.NAME]
    assert stat.S_IMODE(build.build(out, sources).path.stat().st_mode) & 0o500 == 0o500


def test_a_build_that_fails_leaves_the_old_library(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = build.build(out, sources).path.read_bytes()
    write_sources(sources, doors="int f( {")
    with pytest.raises(CompileError):
        build.build(out, sources)
    assert [(path.name, path.read_bytes()) for path in out.iterdir()] == [(build.NAME, before)]


def test_the_hash_changes_with_every_source_and_with_nothing_else(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = [build.source_hash(sources)]
    assert re.fullmatch("[0-9a-f]{16}", hashes[0])
    (sources / "notes.txt").write_text("nothing")
    (sources / "level.o").write_text("nothing")
    assert build.source_hash(sources) == hashes[0]
    for name in ("level.h", "level.cc", "library.cc", "new.h"):
        path = sources / name
        path.write_text((path.read_text() if path.exists() else "") + "\n")
        hashes.append(build.source_hash(sources))
    (sources / "new.h").rename(sources / "newer.h")
    hashes.append(build.source_hash(sources))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    hashes.append(build.source_hash(sources))
    assert len(set(hashes)) == 7


# Refuse to build.


def test_without_a_compiler_the_reason_says_what_to_install(sources: Path, tmp_path: Path) -> None:
    text = "no C++ compiler (c++, g++, clang++): install GCC or Clang, or set CXX"
    with pytest.raises(BuildError, match=f"^{re.escape(text)}$"):
        build.build(tmp_path / "out", sources, {"PATH": str(tmp_path)})
    assert not (tmp_path / "out").exists()


def test_the_first_command_that_is_a_compiler_is_taken(tmp_path: Path) -> None:
    (real, *_), machine = build.find_compiler()
    script(tmp_path / "c++", "exit 1\n")
    script(tmp_path / "clang++", f'exec {real} "$@"\n')
    found = build.find_compiler({"PATH": str(tmp_path)})
    assert found == ([str(tmp_path / "clang++")], machine)


@pytest.mark.parametrize(
    ("cxx", "text"),
    {
        "nowhere": "CXX is 'nowhere', and there is no such command",
        "false": "CXX is 'false', should be a C++ compiler: GCC or Clang",
        "g++ '": 'CXX is "g++ \'": No closing quotation',
    }.items(),
)
def test_a_wrong_cxx_is_told(cxx: str, text: str) -> None:
    with pytest.raises(BuildError, match=f"^{re.escape(text)}$"):
        build.find_compiler({**os.environ, "CXX": cxx})


def test_windows_is_told_that_there_are_no_kernels_for_it(tmp_path: Path) -> None:
    cxx = script(tmp_path / "g++", "echo x86_64-w64-mingw32\n")
    text = "the C++ kernels are for Linux and macOS, not for Windows"
    with pytest.raises(BuildError, match=f"^{re.escape(text)}$"):
        build.find_compiler({**os.environ, "CXX": cxx})


def test_cxx_may_have_arguments(sources: Path, tmp_path: Path) -> None:
    (real, *_), _ = build.find_compiler()
    built = build.build(tmp_path / "out", sources, {**os.environ, "CXX": f"env {real} -g0"})
    assert (built.compiler, built.levels) == (f"env {real} -g0", levels_here())


def test_of_an_old_compiler_the_reason_has_its_own_words(sources: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "CXXFLAGS": "-std=c++11"}
    text = r"is too old or broken, should know C\+\+17: probe.cc:3:2: error: #error C\+\+17$"
    with pytest.raises(BuildError, match=text):
        build.build(tmp_path / "out", sources, environment)


@pytest.mark.parametrize("name", levels_here()[:-1])
def test_a_level_that_the_compiler_does_not_know_is_left_out(
    name: str, sources: Path, tmp_path: Path
) -> None:
    built = build.build(tmp_path / "out", sources, compiler_without(name, tmp_path / "cxx"))
    assert built.left_out == {name: f"{tmp_path}/cxx does not know it: error: what is {name}"}
    assert built.levels == tuple(other for other in levels_here() if other != name)
    loaded = library.open_library(built.path, build.source_hash(sources))
    for level in levels_here():
        assert loaded.gdn_choose_level(level.encode()) == (level != name)


@pytest.mark.skipif(len(levels_here()) < 2, reason="this machine has one level")
def test_the_kernels_link_without_a_level_that_was_left_out(tmp_path: Path) -> None:
    environment = compiler_without(levels_here()[0], tmp_path / "cxx") | {"CXXFLAGS": "-O0"}
    built = build.build(tmp_path / "out", environment=environment)
    loaded = library.open_library(built.path, build.source_hash())
    assert loaded.gdn_choose_level(levels_here()[0].encode()) == 0
    assert loaded.gdn_choose_level(b"baseline") == 1


def test_a_compiler_that_fails_is_quoted_from_its_first_error_on(
    sources: Path, tmp_path: Path
) -> None:
    said = "In file included from a.h\\na.h:1: error: no luck\\n"
    fail = f'case "$*" in *library.cc*) printf "{said}" >&2; exit 3;; esac'
    environment = compiler(tmp_path / "cxx", fail)
    with pytest.raises(CompileError) as raised:
        build.build(tmp_path / "out", sources, environment)
    assert str(raised.value) == f"{tmp_path}/cxx failed on the kernels: a.h:1: error: no luck"
    assert raised.value.lines == ("a.h:1: error: no luck",)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_compiler_that_dies_in_silence_is_told(sources: Path, tmp_path: Path) -> None:
    environment = compiler(tmp_path / "cxx", 'case "$*" in *-shared*) kill -9 $$;; esac')
    with pytest.raises(CompileError, match=r"cxx failed on the kernels: it says nothing$"):
        build.build(tmp_path / "out", sources, environment)


def test_a_folder_that_cannot_be_written_is_named(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "out"
    text = f"^{re.escape(str(folder))} cannot be written: Not a directory$"
    with pytest.raises(BuildError, match=text):
        build.build(folder, sources)
    assert not build.is_writable(folder)
    assert build.is_writable(tmp_path / "new")


def test_a_temporary_folder_that_cannot_be_written_is_told(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    text = "^the temporary folder cannot be written: No such file or directory$"
    with pytest.raises(BuildError, match=text):
        build.build(tmp_path / "out", sources)


def test_a_package_without_its_sources_says_so(tmp_path: Path) -> None:
    text = f"^{re.escape(str(tmp_path))}/level.cc is not there: install gdn_ops again$"
    with pytest.raises(BuildError, match=text):
        build.build(tmp_path / "out", tmp_path)


def test_building_needs_nothing_but_the_standard_library() -> None:
    code = """
import importlib.util, sys
before = set(sys.modules)
spec = importlib.util.spec_from_file_location("build", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names)))
"""
    assert printed(code, build.__file__) == "[]"
