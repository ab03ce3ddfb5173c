"""The library is loaded on first use, at the level that is asked for, or a reason is told."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cpp_libraries import (
    LEVEL,
    LIBRARY,
    compiler_without,
    levels_here,
    needs_compiler,
    write_sources,
)
from gdn_ops.backends.cpp import build, library
from gdn_ops.backends.cpp.library import LibraryError
from processes import printed

pytestmark = needs_compiler

NOT_BUILT = "not built: run gdn-ops build, with a C++ compiler (GCC or Clang) installed"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def built(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that has the doors of the kernels, and no kernels."""
    return build.build(tmp_path_factory.mktemp("built"), sources).path


@pytest.fixture(autouse=True)
def package(tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a package that has no library yet."""
    folder = tmp_path / "package"
    folder.mkdir()
    monkeypatch.setattr(library, "PACKAGE", folder)
    monkeypatch.setattr(library, "_own_hash", lambda: build.source_hash(sources))
    monkeypatch.setenv("GDN_OPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(library.LEVEL, raising=False)
    monkeypatch.setattr(library, "_opened", None)
    return folder


def copy(built: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / build.NAME
    path.write_bytes(built.read_bytes())
    return path


def reason() -> str:
    """Return why there is no library, which `library` raises too."""
    text = library.missing()
    assert text is not None
    with pytest.raises(LibraryError, match=f"^{re.escape(text)}$"):
        library.library()
    return text


# Find it.


def test_the_best_level_is_loaded_once(built: Path, package: Path) -> None:
    copy(built, package)
    assert library.missing() is None
    assert library.library() is library.library()
    assert library.level() == levels_here()[0]


def test_a_library_in_the_users_cache_is_found_too(
    built: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy(built, library.user_folder())
    assert path.parent.parent == package.parent / "cache" / "cpp"
    assert library.missing() is None
    # One in the package that is of other sources does not stand in its way.
    monkeypatch.setattr(library, "_opened", None)
    (package / build.NAME).write_bytes(b"no library")
    assert library.missing() is None


def test_what_is_not_built_is_told_with_what_to_do() -> None:
    assert reason() == NOT_BUILT


def test_asking_compiles_nothing(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.subprocess, "run", None)
    assert reason() == NOT_BUILT
    assert not list(package.iterdir())
    assert not library.user_folder().exists()


def test_importing_loads_nothing() -> None:
    code = """
from gdn_ops.backends.cpp import library
print(library._opened, library.team.cache_info().currsize)
print("libgdn_ops_cpp" in open("/proc/self/maps").read())
"""
    if os.path.exists("/proc/self/maps"):
        assert printed(code) == "None 0\nFalse"


def test_threads_that_ask_at_once_open_it_once(
    built: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(built, package)
    opened = []
    original = library.open_library
    monkeypatch.setattr(library, "open_library", lambda *a: opened.append(a) or original(*a))
    start = threading.Barrier(8)

    def ask(_: int) -> object:
        start.wait()
        return library.library()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(map(id, pool.map(ask, range(8))))) == 1
    assert len(opened) == 1


# Refuse to use it.


def test_a_library_of_other_sources_is_refused(tmp_path: Path, package: Path) -> None:
    other = write_sources(tmp_path / "other", doors=LIBRARY + "// changed\n")
    path = build.build(package, other).path
    assert reason() == f"{path} was built from other sources: run gdn-ops build"


def test_a_library_of_somebody_elses_making_is_refused(tmp_path: Path, package: Path) -> None:
    (real, *_), _ = build.find_compiler()
    empty = tmp_path / "empty.cc"
    empty.write_text("int nothing;\n")
    path = package / build.NAME
    done = build._run([real, "-shared", "-fPIC", str(empty), "-o", str(path)], os.environ)
    assert done.returncode == 0, done.stderr
    assert reason() == f"{path} was built from other sources: run gdn-ops build"


def test_a_file_that_is_no_library_is_refused_with_the_systems_words(package: Path) -> None:
    path = package / build.NAME
    path.write_bytes(b"no library at all")
    assert re.fullmatch(
        f"{re.escape(str(path))} cannot be loaded \\(.+\\): run gdn-ops build", reason()
    )


def test_a_library_of_another_user_is_refused(
    built: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(os, "chown") or os.getuid() != 0:
        pytest.skip("only root can give a file away")
    path = copy(built, package)
    os.chown(path, 12345, -1)
    assert reason() == f"{path} belongs to another user: run gdn-ops build"


def test_a_folder_that_cannot_even_be_asked_is_no_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GDN_OPS_CACHE", "/" + "x" * 300)
    assert reason() == NOT_BUILT


def test_a_library_for_better_processors_is_refused(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doors = LIBRARY.replace("!one->is_there()", "true")
    sources = write_sources(tmp_path / "better", doors=doors)
    path = build.build(package, sources).path
    monkeypatch.setattr(library, "_own_hash", lambda: build.source_hash(sources))
    assert reason() == (
        f"{path} was built for processors that can do more than this one: run gdn-ops build"
    )


# Levels.


@pytest.mark.parametrize("name", levels_here())
def test_a_level_is_forced(
    name: str, built: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(built, package)
    monkeypatch.setenv("GDN_OPS_CPP_LEVEL", name)
    assert library.missing() is None
    assert library.level() == name


def test_an_unknown_level_is_told_with_those_that_are_known(
    built: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(built, package)
    monkeypatch.setenv("GDN_OPS_CPP_LEVEL", "baselin")
    known = ", ".join(levels_here())
    assert reason() == (
        f"GDN_OPS_CPP_LEVEL: unknown level 'baselin', known: {known}; did you mean 'baseline'?"
    )


@pytest.mark.skipif(len(levels_here()) < 2, reason="this machine has one level")
def test_a_level_that_is_slower_here_is_taken_where_it_is_named_and_not_by_itself(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, *others = levels_here()
    # The doors of the kernels, and levels without kernels that any processor has.
    sources, is_best = tmp_path / "slow", f'std::strcmp(GDN_TEXT(GDN_LEVEL), "{slow}") != 0'
    write_sources(sources, level=LEVEL.replace("GDN_LANES}", f"[] {{ return int({is_best}); }}}}"))
    level = (sources / "level.cc").read_text()
    (sources / "level.cc").write_text(f"#include <cstring>\n{level}")
    for path in (*build.SOURCES.glob("*.h"), build.SOURCES / "library.cc"):
        (sources / path.name).write_text(path.read_text())
    environment = {**os.environ, "CXXFLAGS": "-Wno-missing-field-initializers"}
    build.build(package, sources, environment)
    monkeypatch.setattr(library, "_own_hash", lambda: build.source_hash(sources))
    assert library.level() == others[0]
    monkeypatch.setattr(library, "_opened", None)
    monkeypatch.setenv("GDN_OPS_CPP_LEVEL", slow)
    assert library.level() == slow


@pytest.mark.skipif(len(levels_here()) < 2, reason="this machine has one level")
def test_a_level_that_the_processor_lacks_is_told_with_those_it_has(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best, *others = levels_here()
    text = LIBRARY.replace("!one->is_there()", f'!std::strcmp(one->name, "{best}")')
    sources = write_sources(tmp_path / "lacking", doors=text)
    build.build(package, sources)
    monkeypatch.setattr(library, "_own_hash", lambda: build.source_hash(sources))
    monkeypatch.setenv("GDN_OPS_CPP_LEVEL", best)
    assert reason() == (
        f"GDN_OPS_CPP_LEVEL is '{best}', which this processor does not have "
        f"(it has {', '.join(others)})"
    )
    monkeypatch.setattr(library, "_opened", None)
    monkeypatch.delenv("GDN_OPS_CPP_LEVEL")
    assert library.level() == others[0]


@pytest.mark.skipif(len(levels_here()) < 2, reason="this machine has one level")
def test_a_level_that_the_compiler_left_out_is_told(
    sources: Path, tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best, *others = levels_here()
    build.build(package, sources, compiler_without(best, tmp_path / "cxx"))
    monkeypatch.setenv("GDN_OPS_CPP_LEVEL", best)
    assert reason() == (
        f"GDN_OPS_CPP_LEVEL is '{best}', which the compiler of the library did not know "
        f"(it has {', '.join(others)})"
    )


# Threads.


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_the_library_computes_with_the_threads_of_torch(built: Path, package: Path) -> None:
    copy(built, package)
    assert (library.team().parallel is None) == (library.team().note is not None)
    if library.team().parallel is None:
        pytest.skip(str(library.team().note))
    assert library.threads() == 2
    assert library.library().gdn_count(library.threads()) == 2


@pytest.mark.usefixtures("two_threads")
def test_without_openmp_there_is_one_thread_and_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.team.cache_clear()
    try:
        monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
        note = f"no OpenMP in {tmp_path}/lib: the kernels run with one thread"
        assert library.team() == library.Team(None, True, note)
        assert library.threads() == 1
    finally:
        monkeypatch.undo()
        library.team.cache_clear()


FORK = """
import os, sys
from pathlib import Path
import torch
import gdn_ops
from gdn_ops.backends.cpp import library

torch.set_num_threads(2)
loaded = library.open_library(Path(sys.argv[1]), sys.argv[2])
library.choose_level(loaded, "")
loaded.gdn_set_parallel(library.team().parallel)
found = library.team()
library.team = lambda: found._replace(survives_forks=sys.argv[3] == "survives")
print(library.threads(), loaded.gdn_count(library.threads()), flush=True)
child = os.fork()
if not child:
    print(library.threads(), loaded.gdn_count(library.threads()), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(library.threads(), loaded.gdn_count(library.threads()), flush=True)
"""


@pytest.mark.parametrize("fate", ["survives", "dies"])
def test_after_a_fork_a_child_computes_with_as_many_threads_as_it_can_have(
    fate: str, built: Path, sources: Path
) -> None:
    if library.team().parallel is None:
        pytest.skip(str(library.team().note))
    in_child = library.team().survives_forks and fate == "survives"
    threads = 2 if in_child else 1
    shown = printed(FORK, built, build.source_hash(sources), fate if in_child else "dies")
    assert shown.split("\n") == ["2 2", f"{threads} {threads}", "2 2"]


def test_the_address_is_that_of_the_openmp_that_torch_has_loaded() -> None:
    maps = Path("/proc/self/maps")
    if library.team().parallel is None or not maps.exists():
        pytest.skip("no OpenMP, or no list of loaded libraries")
    address = library.team().parallel
    owner = [
        line.split()[-1]
        for line in maps.read_text().splitlines()
        if int(line.split("-")[0], 16) <= (address or 0) < int(line.split()[0].split("-")[1], 16)
    ]
    assert len(owner) == 1 and "omp" in owner[0], owner
    bundled = sorted((Path(torch.__file__).resolve().parent / "lib").glob("lib*omp*"))
    if bundled:
        assert Path(owner[0]).resolve() in bundled
