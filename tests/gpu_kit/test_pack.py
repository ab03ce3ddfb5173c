"""The archive of the GPU kit holds what fits, in order, and its manifest says the rest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from gdn_ops.backends.tilelang.host.toolchain import gpu_reasons
from gpu_kit_runs import SCRIPTS, run_plan
from kit.unpack import relocate
from packing import build
from packing.archive import LIMIT, KitTooLargeError, pack
from packing.build import Builder, Made, NotMadeError, TooLargeError, pinned
from packing.parts import PARTS, TILELANG_CACHE, TRITON_CACHE, Part
from paths import ROOT
from processes import output_of
from versions.install import find_pythons

KIB = 1 << 10


class Stub:
    """Makes parts of given sizes; one without a size cannot be had."""

    def __init__(self, folder: Path, **sizes: int) -> None:
        self.folder, self.sizes = folder, sizes
        self.rooms: dict[str, int] = {}

    def make(self, part: Part, room: int) -> Made:
        self.rooms[part.name] = room
        if part.name not in self.sizes:
            raise NotMadeError("it cannot be downloaded")
        size = self.sizes[part.name] * KIB
        if size > room:
            raise TooLargeError(f"{size} bytes, {room} are left")
        file = self.folder / part.name
        file.write_bytes(os.urandom(size))
        facts = {"commit": "0123abc"} if part.name == "tree" else {"versions": {part.name: "1"}}
        return Made(file, facts)


TREE = Part("tree", "tree", is_required=True)
ALL = (TREE, Part("cache", "cache", variable="CACHE"), Part("large", "large"), Part("b", "b"))


def test_every_part_that_still_fits_goes_in(tmp_path: Path) -> None:
    out = tmp_path / "dist" / "kit.tar"
    stub = Stub(tmp_path, tree=100, cache=300, large=900, b=200)
    manifest = pack(stub, out, 1 << 20, ALL)
    assert [part["name"] for part in manifest["parts"]] == ["tree", "cache", "b"]
    (left_out,) = manifest["left_out"]
    assert left_out["name"] == "large" and "are left" in left_out["reason"]
    assert stub.rooms["b"] < stub.rooms["cache"] - 300 * KIB
    assert 600 * KIB < out.stat().st_size <= 1 << 20
    with tarfile.open(out) as tar:
        names = tar.getnames()
        file = tar.extractfile("gpu-kit/manifest.json")
        assert file is not None
        assert json.load(file) == manifest
    assert {"gpu-kit/run.py", "gpu-kit/kit/schedule.py", "gpu-kit/parts/b.tar.xz"} <= set(names)
    assert manifest["commit"] == "0123abc"
    assert manifest["parts"][1]["variable"] == "CACHE"
    assert manifest["parts"][1]["versions"] == {"cache": "1"}
    assert manifest["parts"][0]["bytes"] == 100 * KIB


def test_what_cannot_be_had_is_named(tmp_path: Path) -> None:
    manifest = pack(Stub(tmp_path, tree=1, b=1), tmp_path / "kit.tar", 1 << 20, ALL)
    assert [part["name"] for part in manifest["parts"]] == ["tree", "b"]
    assert {part["reason"] for part in manifest["left_out"]} == {"it cannot be downloaded"}


def test_a_kit_that_is_too_large_says_its_size_and_its_largest_parts(tmp_path: Path) -> None:
    out = tmp_path / "kit.tar"
    parts = (TREE, Part("testing", "testing", is_required=True))
    with pytest.raises(KitTooLargeError) as error:
        pack(Stub(tmp_path, tree=900, testing=500), out, 1 << 20, parts)
    # With the scripts and the manifest.
    assert "the kit has 1.5 MiB, should be at most 1.0 MiB" in str(error.value)
    assert str(error.value).endswith("largest: tree 0.9 MiB, testing 0.5 MiB")
    assert not out.exists()


def test_a_required_part_that_cannot_be_had_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotMadeError, match="cannot be downloaded"):
        pack(Stub(tmp_path), tmp_path / "kit.tar", 1 << 20, ALL)


def wheel(folder: Path, name: str, **files: str) -> None:
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        for path, text in files.items():
            file.writestr(path.replace("__", "/").replace("_py", ".py"), text)


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    return Builder(tmp_path, None, log=lambda text: None)


def test_wheels_become_one_folder_without_what_is_not_wanted(
    tmp_path: Path, builder: Builder
) -> None:
    wheel(tmp_path / "wheels" / "one==1.0", "one", one__core_py="x = 1", one__docs__big_py="y")
    wheel(tmp_path / "wheels" / "two==1.0", "two", two_py="x = 2")
    part = Part("both", "site", wheels=("one==1.0", "two==1.0"), without=("one/docs",))
    made = builder.make(part, 1 << 20)
    with tarfile.open(made.file) as tar:
        assert sorted(tar.getnames()) == ["one/core.py", "two.py"]
    assert made.facts == {"versions": {"one": "1.0", "two": "1.0"}}
    assert builder.make(part, 1 << 20).file == made.file
    with pytest.raises(TooLargeError, match=r"MiB are left"):
        builder.make(part, 100)


def test_what_cannot_fit_is_not_compressed(tmp_path: Path, builder: Builder) -> None:
    folder = tmp_path / "wheels" / "large==1.0"
    folder.mkdir(parents=True)
    (folder / "large-1.0-py3-none-any.whl").write_bytes(bytes(4 << 20))
    with pytest.raises(TooLargeError, match=r"its wheels have 4\.0 MiB, 1\.0 MiB are left"):
        builder.make(Part("large", "site", wheels=("large==1.0",)), 1 << 20)


def test_a_wheel_that_is_not_there_says_what_pip_says(
    builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(NotMadeError, match=r"nothing-of-this-name==1\.0 cannot be downloaded"):
        builder.make(Part("p", "site", wheels=("nothing-of-this-name==1.0",)), 1 << 20)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one committed file, and one that is not."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "kept.py").write_text("x = 1\n")
    (folder / "constraints.txt").touch()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "First"]):
        subprocess.run([*git, *words], cwd=folder, check=True)
    (folder / "untracked.py").write_text("x = 2\n")
    monkeypatch.setattr(build, "ROOT", folder)
    return folder


def test_the_tree_is_what_is_committed(builder: Builder, repository: Path) -> None:
    made = builder.make(PARTS[0], LIMIT)
    with tarfile.open(made.file) as tar:
        assert tar.getnames() == ["constraints.txt", "kept.py"]
    assert len(made.facts["commit"]) == 40 and made.facts["changes_left_out"]


def test_kernels_are_not_compiled_without_the_versions_of_the_gpu_machine(
    builder: Builder,
) -> None:
    for part in (TRITON_CACHE, TILELANG_CACHE):
        with pytest.raises(NotMadeError, match=r"no Python 3\.12 with"):
            builder.make(part, LIMIT)


def test_the_parts_are_named_once_and_have_known_versions() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
    folders = [part.folder for part in PARTS]
    assert len(set(folders)) == len(folders)
    for part in PARTS:
        assert all("==" in text for text in pinned(part.wheels))


def test_an_archive_is_unpacked_elsewhere_and_runs_with_the_python_of_the_gpu_machine(
    tmp_path: Path, builder: Builder, repository: Path
) -> None:
    python = find_pythons().get((3, 12))
    if python is None:
        pytest.skip("no python3.12")
    wheel(tmp_path / "wheels" / "one==1.0", "one", one__core_py="x = 'imported'")
    parts = (PARTS[0], Part("one", "site-one", wheels=("one==1.0",)))
    pack(builder, tmp_path / "kit.tar", 1 << 20, parts)
    elsewhere = tmp_path / "elsewhere"
    with tarfile.open(tmp_path / "kit.tar") as tar:
        tar.extractall(elsewhere, filter="data")
    look = "import kept, one.core, sys; print(kept.x, one.core.x, sys.version_info[:2])"
    stages = (
        {"name": "kernel", "command": ["false"], "needs_gpu": True},
        {"name": "crash", "command": ["sh", "-c", "kill -11 $$"]},
        {"name": "look", "command": ["{python}", "-c", look]},
    )
    ran = run_plan(elsewhere / "gpu-kit", stages, python=python)
    assert ran.statuses == ["no GPU", "crashed", "passed"]
    assert ran.stage("look")["tail"] == "1 imported (3, 12)"
    assert ran.results["parts"] == ["tree", "one"]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_launchers_are_compiled_without_a_driver(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith("3.6."):
        pytest.skip("only the Triton of the GPU machine is known to compile launchers so")
    fill = SCRIPTS / "kit" / "fill.py"
    environment = {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    counts = json.loads(
        output_of(fill, "triton", "steps", "--most", "1", "--launchers", **environment)
    )
    assert (counts["compiled"], counts["failed"]) == (1, [])
    libraries = {path.name.partition(".")[0] for path in tmp_path.glob("*/*.so")}
    assert libraries == {"__triton_launcher", "cuda_utils"}


@pytest.mark.parametrize(
    ("backend", "variable"),
    [
        ("triton", "TRITON_CACHE_DIR"),
        pytest.param("tilelang", "TILELANG_CACHE_DIR", marks=pytest.mark.slow),
    ],
)
def test_a_second_process_with_the_cache_compiles_nothing(
    tmp_path: Path, backend: str, variable: str
) -> None:
    pytest.importorskip(backend)
    if backend == "tilelang" and gpu_reasons():
        pytest.skip(gpu_reasons()[0])
    fill = SCRIPTS / "kit" / "fill.py"
    environment = {"PYTHONPATH": str(ROOT), variable: str(tmp_path / "first")}
    first = json.loads(output_of(fill, backend, "steps", "--most", "1", **environment))
    assert (first["launches"], first["compiled"], first["failed"]) == (1, 1, [])
    # Nor where the cache lies elsewhere, once it is told.
    moved = (tmp_path / "first").rename(tmp_path / "elsewhere")
    relocate(moved)
    environment[variable] = str(moved)
    second = json.loads(output_of(fill, backend, "steps", "--most", "1", **environment))
    assert (second["compiled"], second["found"]) == (0, 1)
