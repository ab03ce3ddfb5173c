"""Run the chunkwise form as TileLang kernels, on NVIDIA GPUs.

    solve, states                              two launches forward, two more for segments
    states, state_gradients, token_gradients   three backward, five with segments
    tokens                                     one for a token, or a few (`decode`)

Launch configurations are data (`table`), chosen by `config`. On CPU tensors the same kernels are
compiled as C++ and run for checking (`emulation`); without a GPU they are compiled for one (`aot`).
"""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from gdn_ops.aot.results import CompiledKernel, Sample
from gdn_ops.backends.tilelang.host import config as configs
from gdn_ops.backends.tilelang.host import table, toolchain
from gdn_ops.backends.tilelang.host.plan import Plan, Saved, empty_saved, make_plan
from gdn_ops.call.bind import Call
from gdn_ops.dispatch.registry import Forward, Grads
from gdn_ops.kernel_support.backend import KernelBackend


@functools.cache
def tool_reasons(device: str) -> tuple[str, ...]:
    """Return why kernels cannot be built for a device type, whatever the call."""
    reasons = toolchain.version_reasons()
    if device == "cuda":
        reasons += toolchain.gpu_reasons()
    elif device == "cpu":
        reasons += toolchain.cpu_reasons()
    return tuple(reasons)


def _version_of(compiler: str) -> str:
    """Return the line of `compiler --version` that tells one build from another."""
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return (lines[-1] if "nvcc" in compiler else lines[0]) if lines else "unknown"


class TileLang(KernelBackend):
    """Run chunkwise kernels that write the output during the state walk and save T."""

    name = "tilelang"
    requires = ("tilelang",)
    distribution = "tilelang"
    targets = configs.TARGETS
    tables = configs.tables
    limits = replace(
        KernelBackend.limits,
        head_dims=range(16, 257, 16),
        chunk_sizes=configs.CHUNKS,
        decode_decays=("none", "scalar", "channel"),
        decode_erases=("none", "scalar", "channel"),
        decode_writes=("scalar", "channel"),
        decode_apart=True,
    )

    tool_reasons = staticmethod(tool_reasons)
    make_plan = staticmethod(make_plan)
    empty_saved = staticmethod(empty_saved)

    def reasons(self, call: Call) -> list[str]:
        return [*super().reasons(call), *configs.shape_reasons(call)]

    @classmethod
    def tools(cls, device: str) -> dict[str, str]:
        is_gpu = device.partition(":")[0] == "cuda"
        compiler = toolchain.nvcc() if is_gpu else toolchain.compiler()
        return {
            "apache-tvm-ffi": importlib.metadata.version("apache-tvm-ffi"),
            "compiler": "none" if compiler is None else _version_of(str(compiler)),
        }

    # Imported when they run: the kernels need TileLang.

    @staticmethod
    def run_forward(call: Call, plan: Plan) -> Forward:
        from gdn_ops.backends.tilelang.host.forward import forward

        return forward(call, plan)

    @staticmethod
    def run_backward(
        call: Call, plan: Plan, saved: tuple[Tensor, ...], d_o: Tensor, d_state: Tensor
    ) -> Grads:
        from gdn_ops.backends.tilelang.host.backward import backward

        return backward(call, plan, Saved(*saved), d_o, d_state)

    @staticmethod
    def run_decode(call: Call, *tensors: Any) -> None:
        from gdn_ops.backends.tilelang.host import decode

        decode.run(call, *tensors)

    def compile_ahead(self, target: str, samples: Iterable[Sample]) -> Iterator[CompiledKernel]:
        from gdn_ops.backends.tilelang.aot import budgets, compiler

        allowed = table.ALLOWED_SPILLS
        return compiler.compile_ahead(self, target, samples, allowed, budgets.current())


BACKEND = TileLang
