"""A cache of Triton that has no name is the default one; one that cannot be a folder is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paths import ROOT
from processes import python

pytest.importorskip("triton")

COMPILE = ("compile", "tiny-step", "--backend", "triton", "--target", "sm_90", "--json")


def failures(folder: Path, **environment: str) -> list[str]:
    """Compile the kernel of a step, and return why that failed."""
    named = {"PYTHONPATH": str(ROOT), "HOME": str(folder), "TRITON_HOME": str(folder)}
    done = python("-m", "gdn_ops", *COMPILE, cwd=folder, **named, **environment)
    (row,) = json.loads(done.stdout)["kernels"]
    assert done.returncode == (1 if row["failures"] else 0)
    return list(row["failures"])


def test_a_cache_without_a_name_is_the_default_one(tmp_path: Path) -> None:
    assert failures(tmp_path, TRITON_CACHE_DIR="") == []
    assert {path.name for path in tmp_path.iterdir()} == {".triton"}


def test_a_cache_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    (failure,) = failures(tmp_path, TRITON_CACHE_DIR=str(file))
    assert failure.startswith("does not compile: ")
    assert f"Error: [Errno 20] Not a directory: '{file}/" in failure
    assert failure.endswith("; set TRITON_CACHE_DIR to a folder that can be written")
