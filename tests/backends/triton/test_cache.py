"""Find a cache of Triton again, by default where Triton has it; one that is no folder is named."""

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


KEYS = """
import sys
import torch
from gdn_ops.backends.triton import Triton
from gdn_ops.backends.triton.aot.compiler import specialised
from gdn_ops.kernel_support.launches import recording
from kernel_backends import SIZES, meta_call
call = meta_call(True, **SIZES)
with torch.no_grad(), recording("sm_90") as launches:
    out = Triton().forward(call)
    Triton().backward(call, out.saved, torch.empty_like(out.o), torch.empty_like(out.final_state))
keys = {}
for launch in sorted(launches, key=lambda x: x.kernel.__name__, reverse=bool(sys.argv[1:])):
    specialised(launch, "sm_90")
    keys[launch.kernel.__name__] = launch.kernel.cache_key
print(sorted(keys.items()))
"""


def test_a_kernel_has_one_key_whichever_is_launched_first() -> None:
    path = f"{ROOT}:{ROOT / 'tests'}"
    first, second = (python("-c", KEYS, *order, PYTHONPATH=path) for order in ((), ("reverse",)))
    assert first.stdout == second.stdout and "walk_back" in first.stdout
