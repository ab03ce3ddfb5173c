"""A cell is installed beside the locked environment: only what differs, and only once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from versions import install
from versions.cells import Cell, select
from versions.install import Installed
from versions.process import NotRunError


def named(name: str) -> Cell:
    (cell,) = select([name])
    return cell


class FakePip:
    """Answers what pip would, and keeps what it was asked."""

    def __init__(self, resolved: dict[str, str]) -> None:
        self.resolved = resolved
        self.asked: list[list[str]] = []

    def __call__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.asked.append(arguments)
        if "--report" in arguments:
            entries = [{"metadata": {"name": n, "version": v}} for n, v in self.resolved.items()]
            path = Path(arguments[arguments.index("--report") + 1])
            path.write_text(json.dumps({"install": entries}))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(install, "FOLDER", tmp_path)
    return tmp_path


RESOLVED = {"transformers": "4.57.6", "huggingface_hub": "0.36.2", "tokenizers": "0.22.2"}


def test_only_what_differs_from_the_lock_goes_into_the_folder(folder: Path) -> None:
    pip = FakePip(RESOLVED)
    found = install.install(named("transformers-4.57"), pip)
    target = folder / "transformers-4.57"
    assert found == Installed(
        sys.executable,
        target,
        (("transformers", "4.57.6"), ("huggingface-hub", "0.36.2"), ("tokenizers", "0.22.2")),
    )
    resolving, installing = pip.asked
    assert "--dry-run" in resolving and resolving[-1] == "transformers==4.57.*"
    assert "--no-deps" not in resolving
    assert installing[-5:] == [
        *("--target", str(target)),
        *("transformers==4.57.6", "huggingface-hub==0.36.2", "tokenizers==0.22.2"),
    ]
    assert "--no-deps" in installing


def test_what_is_installed_is_not_installed_again(folder: Path) -> None:
    cell, pip = named("transformers-4.57"), FakePip(RESOLVED)
    first = install.install(cell, pip)
    again = FakePip({})
    assert install.install(cell, again) == first
    assert again.asked == []


def test_another_environment_is_asked_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, pip = named("transformers-4.57"), FakePip(RESOLVED)
    install.install(cell, pip)
    monkeypatch.setattr(install, "environment_hash", lambda: "another")
    install.install(cell, pip)
    assert len(pip.asked) == 4


def test_the_newest_version_is_always_asked_for(folder: Path) -> None:
    cell = named("transformers-newest")
    install.install(cell, FakePip({"transformers": "5.25.0"}))
    same, newer = FakePip({"transformers": "5.25.0"}), FakePip({"transformers": "5.26.0"})
    install.install(cell, same)
    assert ["--upgrade" in asked for asked in same.asked] == [True]
    assert install.install(cell, newer).versions == (("transformers", "5.26.0"),)
    assert newer.asked[-1][-1] == "transformers==5.26.0"


def test_a_folder_that_was_not_filled_is_filled_again(folder: Path) -> None:
    def fail(arguments: list[str], environment: dict[str, str]) -> None:
        if "--target" in arguments:
            raise NotRunError("no space")
        FakePip(RESOLVED)(arguments, environment)

    with pytest.raises(NotRunError, match="no space"):
        install.install(named("transformers-4.57"), fail)
    pip = FakePip(RESOLVED)
    install.install(named("transformers-4.57"), pip)
    assert len(pip.asked) == 2


def test_a_triton_goes_beside_a_torch_that_pins_another(folder: Path) -> None:
    pip = FakePip({"triton": "3.6.0"})
    install.install(named("triton-3.6"), pip)
    assert "--no-deps" in pip.asked[0]


def test_the_locked_torch_shares_the_environment() -> None:
    pip = FakePip({})
    assert install.install(named("torch-locked"), pip) == Installed(sys.executable)
    assert pip.asked == []


def test_a_newer_python_gets_an_environment_of_the_lock(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = sys.version_info[:2]
    newer = (3, here[1] + 1)
    monkeypatch.setattr(install, "find_pythons", lambda: {here: "/here", newer: "/newer"})
    pip = FakePip({})
    found = install.install(named("python-newest"), pip)
    target = folder / f"python-3.{newer[1]}"
    assert found.python == str(target / "bin" / "python")
    assert pip.asked[0][-3:] == ["venv", f"VENV={target}", "PYTHON=/newer"]
    this = named(f"python-{here[0]}.{here[1]}")
    assert install.install(this, pip) == Installed(sys.executable)


def test_only_a_newer_python_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "find_pythons", dict)
    with pytest.raises(NotRunError, match="no Python newer than 3") as newest:
        install.install(named("python-newest"), FakePip({}))
    with pytest.raises(NotRunError, match=r"no Python 3\.99") as other:
        install.install(named("python-3.99"), FakePip({}))
    assert (newest.value.excused, other.value.excused) == (True, False)


def test_pythons_are_found_on_the_path_and_in_pyenv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bin/python3.12", "bin/python3.9", "pyenv/shims/python3.15"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("3.12.1", "3.13.0"):
        path = tmp_path / "pyenv" / "versions" / name / "bin" / f"python{name[:4]}"
        path.parent.mkdir(parents=True)
        path.touch()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{tmp_path / 'pyenv' / 'shims'}")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    found = install.find_pythons()
    assert sorted(found) == [(3, 12), (3, 13)]
    assert found[3, 12] == str(tmp_path / "bin" / "python3.12")
