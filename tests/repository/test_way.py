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
from gdn_ops.testing.example import Example

PACKAGE = Path(gdn_ops.__file__).parent

pytestmark = pytest.mark.usefixtures("one_thread")

OPEN = {"torch": 7, "triton": 9}
"""The most files that a reader follows from `gated_delta` to an equation: each calls the next."""

ENTERED = {"torch": 14, "triton": 15}
"""The most files with a function that runs before it. To be lowered whenever it can be."""


def is_first_equation(backend: str, code: CodeType) -> bool:
    """Return whether a function computes docs/math.md §3: a kernel, or the segments of torch."""
    if backend == "triton":
        return "/triton/kernels/" in code.co_filename
    return code is chunk_forward.forward_segment.__code__


def is_ours(code: CodeType) -> bool:
    """Return whether code stands in this package; the emulation of a GPU is not on the way."""
    path = Path(code.co_filename)
    return path.is_relative_to(PACKAGE) and "emulation" not in path.parts


def watch(backend: str, call: Callable[[], Any]) -> tuple[list[str], list[str]]:
    """Return the files that are open at the first equation of a call, and all entered before."""
    opened: list[str] = []
    entered: list[str] = []

    def look(frame: FrameType | None, event: str, argument: object) -> None:
        if event != "call" or opened or frame is None or not is_ours(frame.f_code):
            return
        entered.append(frame.f_code.co_filename)
        if is_first_equation(backend, frame.f_code):
            while frame is not None:
                if is_ours(frame.f_code):
                    opened.append(frame.f_code.co_filename)
                frame = frame.f_back

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    opened.reverse()
    return list(dict.fromkeys(opened)), list(dict.fromkeys(entered))


@pytest.mark.parametrize("needs_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("backend", OPEN)
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
        opened, entered = watch(backend, call)
    assert Path(opened[0]).parts[-2:] == ("gdn_ops", "ops.py")
    assert len(opened) <= OPEN[backend], opened
    assert len(entered) <= ENTERED[backend], entered
