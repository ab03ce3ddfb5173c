"""A call passes few files of this repository before its first equation is computed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch

import gdn_ops
from gdn_ops.backends.torch import chunk_forward
from gdn_ops.call import numerics
from gdn_ops.testing.example import Example

PACKAGE = Path(gdn_ops.__file__).parent

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = {"torch": 9, "triton": 11}
"""The most files in which a function runs from `gated_delta` to the first equation, both included.

The first call of a kind enters two more, for its shapes and attributes are checked once.
"""


def is_first_equation(backend: str, code: CodeType) -> bool:
    """Return whether a function computes docs/math.md §3 or §4: a kernel, or torch operations."""
    if backend == "triton":
        return "/triton/kernels/" in code.co_filename
    return code in (numerics.log_gate.__code__, chunk_forward.forward_segment.__code__)


def is_ours(code: CodeType) -> bool:
    """Return whether code stands in this package; the emulation of a GPU is not on the way."""
    path = Path(code.co_filename)
    return path.is_relative_to(PACKAGE) and "emulation" not in path.parts


def files_to_the_first_equation(backend: str, call: Callable[[], Any]) -> list[str]:
    """Return the files with a function that runs up to the first equation of a call, in order."""
    entered: list[str] = []
    arrived = False

    def look(frame: FrameType, event: str, argument: object) -> None:
        nonlocal arrived
        if event == "call" and not arrived and is_ours(frame.f_code):
            entered.append(frame.f_code.co_filename)
            arrived = is_first_equation(backend, frame.f_code)

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert arrived
    return list(dict.fromkeys(entered))


@pytest.mark.parametrize("needs_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("backend", FILES)
def test_a_call_passes_few_files_on_the_way_to_its_equations(
    backend: str, needs_grad: bool
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    arguments = Example(T=33, R=2, K=16, V=16).arguments()
    arguments["v"].requires_grad_(needs_grad)

    def call() -> torch.Tensor:
        return gdn_ops.gated_delta(**arguments, backend=backend)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call()
        files = files_to_the_first_equation(backend, call)
    assert Path(files[0]).parts[-2:] == ("gdn_ops", "ops.py")
    assert len(files) <= FILES[backend], files
