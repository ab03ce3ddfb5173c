"""How kernels are called and noted, and what is said of those that cannot be."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from errors import message_of

tilelang = pytest.importorskip("tilelang")

from gdn_ops.backends.tilelang.host import launcher, toolchain  # noqa: E402
from gdn_ops.backends.tilelang.host.launcher import launch  # noqa: E402
from gdn_ops.kernel_support.launches import Launch, recorded_target, recording  # noqa: E402
from tilelang_kernels import tiny  # noqa: E402
from tilelang_kernels.launching import CONSTANTS, NAME, needs_compiler, run  # noqa: E402


def failure(cold: Path, call: Callable[..., Any], *arguments: Any) -> tuple[str, Path]:
    """Return the text of a launch that fails without the path of its log, and the log."""
    text = message_of(RuntimeError, call, *arguments)
    (log,) = (cold / "failed").iterdir()
    assert text.endswith(f"; see {log}")
    return text.removesuffix(f"; see {log}"), log


# What goes wrong.


@needs_compiler
def test_a_kernel_that_cannot_be_traced_is_named(cold: Path) -> None:
    with pytest.raises(RuntimeError) as raised:
        launch(tiny.broken, {"N": 8}, torch.ones(8))
    (log,) = (cold / "failed").iterdir()
    assert re.fullmatch(r"broken-[0-9a-f]{16}\.log", log.name)
    assert str(raised.value) == (
        "tilelang: cannot compile broken (N=8) for cpu: T.copy: X gives (8,) elements and a tile "
        f"takes (9,), should be the same but for axes of 1; see {log}"
    )
    text = log.read_text()
    assert text.startswith("broken (N=8) for cpu\n\nTraceback (most recent call last):\n")
    assert "tiny.py" in text
    assert isinstance(raised.value.__cause__, ValueError)


def test_a_compiler_that_fails_is_named(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = cold.parent / "failing-g++"
    failing.write_text("#!/bin/sh\necho some words\necho more words >&2\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    said, log = failure(cold, run)
    assert said == f"tilelang: cannot compile {NAME}: {failing} exits with 3"
    text = log.read_text()
    assert text.startswith(f"{NAME}\n\n{failing} -std=c++17 -O3 ")
    assert "\nsome words\nmore words\n" in text
    assert "gdn_ops_call(" in text
    # A failure is not remembered.
    monkeypatch.delenv("CXX")
    if toolchain.compiler() is not None:
        run()


def test_a_missing_compiler_is_named(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(cold))
    assert failure(cold, run)[0] == (
        f"tilelang: cannot compile {NAME}: no C++ compiler, which emulation needs: install g++, "
        "or set CXX"
    )


@needs_compiler
@pytest.mark.parametrize(
    ("position", "value", "error", "text"),
    [
        (0, torch.ones(4, 7), ValueError, "X has shape (4, 7), should be (M = 4, 8)"),
        (0, torch.ones(32), ValueError, "X has shape (32,), should be (M, 8)"),
        (1, torch.ones(5, 8), ValueError, "Y has shape (5, 8), should be (M = 4, 8)"),
        (1, torch.ones(8, 4).T, ValueError, "Y has strides (1, 4), should be contiguous"),
        (1, torch.ones(4, 8).double(), TypeError, "Y is float64, should be float32"),
        (1, torch.ones(4, 8, device="meta"), ValueError, "Y is on meta, should be on cpu"),
        (1, 2.0, TypeError, "Y is float, should be a tensor"),
        (2, torch.ones(()), TypeError, "scale is Tensor, should be a number of float32"),
        (3, 2.0, TypeError, "rows is float, should be a number of int32"),
        (3, 2**31, ValueError, "rows is 2147483648, which is no int32"),
    ],
)
def test_an_argument_that_the_kernel_does_not_take_is_an_error(
    position: int, value: Any, error: type[Exception], text: str
) -> None:
    arguments: list[Any] = [torch.ones(4, 8), torch.ones(4, 8), 1.0, 4]
    arguments[position] = value
    assert message_of(error, launch, tiny.scaled, CONSTANTS, *arguments) == f"scaled: {text}"


@needs_compiler
def test_a_wrong_number_of_arguments_is_an_error() -> None:
    message = message_of(TypeError, launch, tiny.scaled, CONSTANTS, torch.ones(4, 8))
    assert message == "scaled: 1 arguments, should be 4: X, Y, scale, rows"


# Launches are noted.


def test_launches_on_meta_tensors_are_noted() -> None:
    x, y = torch.empty(4, 8, device="meta"), torch.empty(4, 8, device="meta")
    with recording("sm_90a") as launches:
        assert recorded_target() == "sm_90a"
        launch(tiny.scaled, CONSTANTS, x, y, 2.0, 4)
    assert launches == [Launch(tiny.scaled, (), (x, y, 2.0, 4), CONSTANTS)]
    assert message_of(ValueError, launch, tiny.scaled, CONSTANTS, x, y, 2.0, 4) == (
        "scaled: the first tensor is on the meta device, should be on cuda or cpu"
    )


# For a GPU.


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100a"),
        ((12, 0), "sm_120a"),
    ],
)
def test_from_hopper_on_the_architecture_has_the_letter_that_wgmma_needs(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher.arch.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert launcher.arch(0) == expected
    launcher.arch.cache_clear()


class OnGPU:
    """What `launch` asks of a tensor on a GPU."""

    is_meta = False

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)


def test_gpus_of_one_kind_share_a_kernel(
    cold: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, called = [], []

    def compile(function: Any, **options: Any) -> Any:
        compiled.append((function.attrs["global_symbol"], options))
        logging.getLogger("tilelang").info("chatter")
        module = SimpleNamespace(main=lambda *args: called.append(args))
        adapter = SimpleNamespace(get_exportable_executable=lambda: module)
        return SimpleNamespace(adapter=adapter, artifact="made now")

    monkeypatch.setattr(tilelang, "compile", compile)
    monkeypatch.setattr(launcher, "arch", lambda index: "sm_80" if index == 2 else "sm_90a")
    for index in (0, 1, 0, 2):
        launch(tiny.scaled, CONSTANTS, OnGPU(index), index)
    options = [
        {"target": {"kind": "cuda", "arch": arch}, "execution_backend": "tvm_ffi"}
        for arch in ("sm_90a", "sm_80")
    ]
    assert compiled == [("scaled", option) for option in options]
    assert [args[1] for args in called] == [0, 1, 0, 2]
    name = "tilelang: scaled (N=8, dtype=float32) for"
    assert [line.partition(" in ")[0] for line in said()] == [
        f"{name} sm_90a compiled",
        f"{name} sm_80 compiled",
    ]


def test_a_kernel_that_fails_on_a_gpu_is_named(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(function: Any, **options: Any) -> Any:
        raise RuntimeError("nvcc says no\nand more")

    monkeypatch.setattr(tilelang, "compile", compile)
    monkeypatch.setattr(launcher, "arch", lambda index: "sm_90a")
    said, log = failure(cold, launch, tiny.scaled, CONSTANTS, OnGPU(0))
    assert said == ("tilelang: cannot compile scaled (N=8, dtype=float32) for sm_90a: nvcc says no")
    assert "and more" in log.read_text()


@pytest.mark.slow
@pytest.mark.skipif(toolchain.nvcc() is None, reason="; ".join(toolchain.gpu_reasons()))
def test_nvcc_compiles_and_an_index_has_64_bits() -> None:
    kernel, origin = launcher._compiled(tiny.scaled, CONSTANTS, "sm_90a")
    assert origin in ("compiled", "taken from disk")
    with pytest.raises(RuntimeError, match="X device_type mismatch, expected cuda"):
        kernel(torch.ones(4, 8), torch.ones(4, 8), 1.0, 4)
    function = launcher.trace(tiny.scaled, CONSTANTS)
    target = tilelang.tvm.target.Target({"kind": "cuda", "arch": "sm_90a"})
    with target:
        source = tilelang.lower(function, target=target).kernel_source
    accesses = [line for line in source.splitlines() if re.search(r"\b[XY]\b.*blockIdx", line)]
    assert accesses and all("(int64_t)((int)blockIdx.x)" in line for line in accesses)
