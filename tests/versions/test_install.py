"""A cell is installed beside the locked environment: only what differs, and only once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from versions import install
from versions.cells import CELLS, NotRunError, select

RESOLVED = {"transformers": "4.57.6", "huggingface_hub": "0.36.2", "tokenizers": "0.22.2"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(install, "FOLDER", tmp_path)
    return tmp_path


def installed(
    name: str, resolved: dict[str, str] = RESOLVED, *, full: bool = False
) -> tuple[dict[str, str], list[list[str]]]:
    """Install a cell with a pip that finds these versions; return what was asked of it, too."""
    asked = []

    def pip(arguments: list[str], environment: dict[str, str]) -> None:
        asked.append(arguments)
        if "--report" in arguments:
            entries = [{"metadata": {"name": n, "version": v}} for n, v in resolved.items()]
            path = Path(arguments[arguments.index("--report") + 1])
            path.write_text(json.dumps({"install": entries}))
        elif full:
            raise NotRunError("no space")

    return install.install(CELLS[name], pip), asked


def test_only_what_differs_from_the_lock_goes_into_the_folder(folder: Path) -> None:
    versions, (resolving, installing) = installed("transformers-4.57")
    assert versions == {name.replace("_", "-"): RESOLVED[name] for name in RESOLVED}
    assert "--dry-run" in resolving and resolving[-1] == "transformers==4.57.*"
    assert "--no-deps" not in resolving
    assert installing[-5:] == [
        *("--target", str(folder / "transformers-4.57")),
        *("transformers==4.57.6", "huggingface-hub==0.36.2", "tokenizers==0.22.2"),
    ]
    assert "--no-deps" in installing


def test_only_another_environment_is_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    versions, _ = installed("transformers-4.57")
    assert installed("transformers-4.57", {}) == (versions, [])
    monkeypatch.setattr(install, "environment", lambda: ["another"])
    assert len(installed("transformers-4.57")[1]) == 2


def test_the_newest_version_is_always_asked_for() -> None:
    installed("transformers-newest", {"transformers": "5.25.0"})
    _, asked = installed("transformers-newest", {"transformers": "5.25.0"})
    assert ["--upgrade" in arguments for arguments in asked] == [True]
    versions, asked = installed("transformers-newest", {"transformers": "5.26.0"})
    assert versions == {"transformers": "5.26.0"}
    assert asked[-1][-1] == "transformers==5.26.0"


def test_a_folder_that_was_not_filled_is_filled_again() -> None:
    with pytest.raises(NotRunError, match="no space"):
        installed("transformers-4.57", full=True)
    assert len(installed("transformers-4.57")[1]) == 2


def test_a_triton_goes_beside_a_torch_that_pins_another() -> None:
    assert "--no-deps" in installed("triton-3.6", {"triton": "3.6.0"})[1][0]


def test_the_locked_torch_shares_the_environment() -> None:
    assert installed("torch-locked") == ({}, [])
    assert install.interpreter(CELLS["torch-locked"], lambda *_: None) == sys.executable


def test_a_newer_python_gets_an_environment_of_the_lock(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = sys.version_info[:2]
    newer = (3, here[1] + 1)
    monkeypatch.setattr(install, "find_pythons", lambda: {here: "/here", newer: "/newer"})
    asked: list[list[str]] = []
    python = install.interpreter(CELLS["python-newest"], lambda command, _: asked.append(command))
    target = folder / f"python-3.{newer[1]}"
    assert python == str(target / "bin" / "python")
    assert [command[-3:] for command in asked] == [["venv", f"VENV={target}", "PYTHON=/newer"]]
    (this,) = select([f"python-{here[0]}.{here[1]}"])
    assert install.interpreter(this, lambda *_: None) == sys.executable


def test_the_cell_of_the_gpu_machine_gets_its_torch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "find_pythons", lambda: {(3, 12): "/twelve"})
    monkeypatch.setattr(install.sys, "version_info", (3, 11, 7))
    asked: list[list[str]] = []
    install.interpreter(CELLS["python-3.12"], lambda command, _: asked.append(command))
    target = folder / "python-3.12-torch-2.11"
    assert asked[0][-4:] == ["venv", f"VENV={target}", "PYTHON=/twelve", "TORCH=torch==2.11.*"]


def test_only_a_newer_python_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "find_pythons", dict)
    for name, message, excused in (
        ("python-newest", "no Python newer than 3", True),
        ("python-3.99", r"no Python 3\.99", True),
        ("python-3.10", r"no Python 3\.10", False),
    ):
        with pytest.raises(NotRunError, match=message) as error:
            install.interpreter(*select([name]), lambda *_: None)
        assert error.value.excused == excused


def test_pythons_are_found_on_the_path_and_in_pyenv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyenv = tmp_path / "pyenv"
    versions = [pyenv / f"versions/{v}/bin/python{v[:4]}" for v in ("3.12.1", "3.13.0")]
    here = [tmp_path / "bin/python3.12", tmp_path / "bin/python3.9"]
    for path in (*here, pyenv / "shims/python3.15", *versions):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{pyenv / 'shims'}")
    monkeypatch.setenv("PYENV_ROOT", str(pyenv))
    assert install.find_pythons() == {(3, 12): str(here[0]), (3, 13): str(versions[1])}
