"""The lock names everything that tests need, and leaves out what the torch at hand refuses."""

from __future__ import annotations

import re
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from versions import lock
from versions.cells import ROOT, declared

TEXT = (ROOT / "constraints.txt").read_text()
LOCK = lock.read_lock(TEXT)


def test_the_lock_is_sorted_lines_of_name_and_version() -> None:
    for line in TEXT.splitlines():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][0-9a-z.]*", line), line
    assert lock.write_lock(LOCK) == TEXT


def test_the_lock_has_every_package_that_an_extra_names() -> None:
    names = {re.split(r"[\[<>=; ]", text)[0] for text in declared()} - {"gdn_ops"}
    assert {"torch", "ruff", "mypy", "import-linter", "setuptools", "wheel"} <= names
    assert sorted(names - set(LOCK)) == []


def test_every_locked_version_is_in_the_range_of_pyproject() -> None:
    packaging = pytest.importorskip("packaging.requirements")
    for text in declared():
        requirement = packaging.Requirement(text)
        if requirement.name != "gdn_ops":
            assert requirement.specifier.contains(LOCK[requirement.name]), text


REQUIRES = {
    "torch": [
        "filelock",
        "sympy>=1.13.3",
        'cuda-toolkit[cudart]==13.0.3; platform_system == "Linux"',
        'triton==3.7.1; platform_system == "Linux"',
        'optree>=99; extra == "optree"',
        'colorama==9; python_version < "3"',
    ],
    "cuda-toolkit": [
        'nvidia-cuda-runtime==13.0.96.*; extra == "cudart"',
        'nvidia-nvvm==13.0.88.*; extra == "nvvm"',
    ],
    "sympy": ["mpmath<1.4"],
}


def test_lines_that_torch_does_not_allow_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = {
        **{"torch": "2.13.0", "filelock": "4.3.1", "sympy": "1.14.0", "mpmath": "1.4.1"},
        **{"triton": "3.9.0", "nvidia-cuda-runtime": "13.5.37", "nvidia-nvvm": "13.5.37"},
        **{"optree": "0.13", "colorama": "0.4.6"},
    }
    monkeypatch.setattr(lock.importlib.metadata, "requires", REQUIRES.get)
    assert lock.refused(locked) == {"triton", "nvidia-cuda-runtime", "mpmath"}
    monkeypatch.setattr(lock.importlib.metadata, "requires", lambda name: None)
    assert lock.refused(locked) == set()
    monkeypatch.undo()
    assert lock.refused({"not-there": "1"}) == set()


def test_constraints_are_the_lock_without_torch_for_a_build_that_pins_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lock.txt"
    path.write_text("filelock==4.3.1\ntorch==2.13.0\ntriton==3.9.0\n")
    monkeypatch.setattr(lock.importlib.metadata, "version", lambda _: "2.13.0+cpu")
    monkeypatch.setattr(lock, "refused", lambda lock: set())
    lock.constrain(path)
    assert capsys.readouterr() == ("filelock==4.3.1\ntriton==3.9.0\n", "")
    monkeypatch.setattr(lock.importlib.metadata, "version", lambda _: "2.14.1")
    monkeypatch.setattr(lock, "refused", lambda lock: {"triton"})
    lock.constrain(path)
    out, said = capsys.readouterr()
    assert out == "filelock==4.3.1\n"
    assert said == (
        f"torch 2.14.1 is installed, {path} has 2.13.0\n"
        f"left out of {path}, torch 2.14.1 needs other versions: triton\n"
    )


def test_changes_of_a_lock_are_shown() -> None:
    old, new = {"a": "1", "b": "1", "c": "1"}, {"a": "1", "b": "2", "d": "3"}
    assert lock.changes(old, new) == ["  b 1 -> 2", "- c 1", "+ d 3"]
    assert lock.changes(old, old) == []


def test_locked_versions_have_no_local_part_and_normalized_names() -> None:
    packages = [("torch", "2.13.0+cpu"), ("PyYAML", "6.0.4"), ("ml_dtypes", "0.6.0")]
    metadata = [{"name": n, "version": v} for n, v in [*packages, ("gdn_ops", "0.1.0")]]
    versions = lock.versions_of(metadata)
    assert versions == {"torch": "2.13.0", "pyyaml": "6.0.4", "ml-dtypes": "0.6.0"}


def test_the_stand_in_for_torch_needs_what_every_build_needs(tmp_path: Path) -> None:
    torch = {"name": "torch", "version": "2.13.0+cu130", "requires_dist": REQUIRES["torch"]}
    wheel = lock.stand_in(torch, tmp_path)
    assert wheel.name == "torch-2.13.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read("torch-2.13.0.dist-info/METADATA").decode().splitlines()
    assert lines[2:] == [
        "Version: 2.13.0",
        "Requires-Dist: filelock",
        "Requires-Dist: sympy>=1.13.3",
    ]


def test_a_lock_that_cannot_be_resolved_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text("torch==2.13.0\n")
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(lock.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match="nothing was changed"):
        lock.refresh(path, "torch==99")
    assert path.read_text() == "torch==2.13.0\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_refreshed_lock_is_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text("numpy==1\ntorch==2.13.0\n")
    asked = []

    def resolve(*arguments: str) -> list[dict[str, Any]]:
        asked.append(arguments)
        packages = [{"name": "torch", "version": "2.14.1", "requires_dist": []}]
        return (
            packages if "--no-deps" in arguments else [*packages, {"name": "numpy", "version": "2"}]
        )

    monkeypatch.setattr(lock, "resolve", resolve)
    lock.refresh(path, "torch==2.14.1 --index-url here")
    assert path.read_text() == "numpy==2\ntorch==2.14.1\n"
    assert asked[0] == ("--ignore-installed", "--no-deps", "torch==2.14.1", "--index-url", "here")
    assert asked[1][0] == "--ignore-installed" and asked[1][2:] == lock.PROJECT
    assert capsys.readouterr().out.startswith("  numpy 1 -> 2\n  torch 2.13.0 -> 2.14.1\n")
