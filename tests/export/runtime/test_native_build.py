"""`make native` finds the headers of onnxruntime where they are kept, or says what is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from errors import message_of
from paths import ROOT


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "native" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("below", ["", "include", "include/onnxruntime"])
def test_headers_are_found_where_archives_keep_them(
    below: str, build: ModuleType, tmp_path: Path
) -> None:
    folder = tmp_path / below
    folder.mkdir(parents=True, exist_ok=True)
    (folder / build.HEADER).touch()
    assert build.find_include(str(tmp_path)) == folder


def test_a_folder_without_headers_is_refused(build: ModuleType, tmp_path: Path) -> None:
    assert message_of(SystemExit, build.find_include, str(tmp_path)) == (
        f"native/build.py: {tmp_path} has no onnxruntime_c_api.h, should be the include directory "
        f"of onnxruntime 1.18 or newer"
    )


def test_a_compiler_that_fails_is_told(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / build.HEADER).touch()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert message_of(SystemExit, build.main, [str(tmp_path)]) == (
        "native/build.py: CXX is 'no-such-compiler', and there is no such command"
    )
