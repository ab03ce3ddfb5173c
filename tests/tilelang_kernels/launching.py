"""Launch a small kernel, and know what it is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gdn_ops.backends.tilelang.emulation.language import CPU
from gdn_ops.backends.tilelang.emulation.programs import program
from gdn_ops.backends.tilelang.host import launcher, toolchain
from gdn_ops.backends.tilelang.host.launcher import launch
from tilelang_kernels import tiny

CONSTANTS = {"N": 8, "dtype": "float32"}
NAME = "scaled (N=8, dtype=float32) for cpu"

needs_compiler = pytest.mark.skipif(
    toolchain.compiler() is None, reason="; ".join(toolchain.cpu_reasons())
)


def run(constants: dict[str, Any] = CONSTANTS, scale: float = 3.0) -> None:
    x = torch.arange(4.0 * constants["N"]).view(4, -1)
    y = torch.full_like(x, float("nan"))
    launch(tiny.scaled, constants, x, y, scale, 4)
    assert torch.equal(y, scale * x)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be compiled in memory."""
    monkeypatch.setattr(launcher, "_launched", {})
    monkeypatch.setattr(launcher, "_built", {})


def traced(make: Any, **constants: Any) -> Any:
    """Return the C++ of a kernel: what can be refused has been refused."""
    return program(launcher.trace(make, constants, CPU))
