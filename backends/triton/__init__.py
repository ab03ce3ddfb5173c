"""Run the chunkwise form as Triton kernels, on NVIDIA and AMD GPUs.

    prepare, walk                two launches forward (`forward`)
    walk_back, token_gradients   two backward (`backward`)
    tokens                       one for a token, or a few (`decode`)

Where sequences are cut into segments (docs/math.md §6), two more either way, with `compose`: four
at most. Where the forward kept no states, walk is run once more: before walk_back, or in the launch
that composes. A piece of a sequence whose state becomes known late runs in stages (`stages`).

Where every key channel has a decay of its own (docs/math.md §9), prepare_channels takes the place
of prepare, square_gradients and channel_gradients that of token_gradients; the walks are the same.

Launch configurations are data (`table`), chosen by `config`. On CPU tensors the same kernels are
emulated, for checking (`emulation`); without a GPU they are compiled for one (`aot`).
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import Tensor

from gdn_ops.aot.results import CompiledKernel, Sample
from gdn_ops.backends.triton.host import config as configs
from gdn_ops.backends.triton.host import decode, stages
from gdn_ops.backends.triton.host.backward import backward
from gdn_ops.backends.triton.host.forward import forward
from gdn_ops.backends.triton.host.plan import empty_saved, make_plan, pointer_remarks
from gdn_ops.call.bind import Call
from gdn_ops.dispatch.backend import Forward, Grads, Prepared, Summarised
from gdn_ops.kernel_support.backend import KernelBackend
from gdn_ops.spec.switches import unset_if_empty

# Triton would look for a folder without a name.
unset_if_empty("TRITON_CACHE_DIR")

OLDEST, NEWEST = (3, 6), (3, 9)
"""The versions of Triton that the kernels are emulated and compiled with in the tests."""


def version_reasons() -> tuple[str, ...]:
    """Return why the Triton that is installed cannot be used."""
    version = importlib.metadata.version("triton")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not OLDEST <= (int(numbers[1]), int(numbers[2])) <= NEWEST:
        low, high = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
        return (f"triton {version} is installed (supported: {low} to {high})",)
    return ()


@functools.cache
def tool_reasons(device: str) -> tuple[str, ...]:
    """Return why kernels cannot be built for a device type: a wrong Triton, no C compiler."""
    has_compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if device != "cuda" or has_compiler:
        return version_reasons()
    lacking = "no C compiler, which Triton launches with: install gcc or clang, or set CC"
    return (*version_reasons(), lacking)


class Triton(KernelBackend):
    """Run chunkwise kernels that save T and recompute the rest in the backward."""

    name = "triton"
    requires = ("triton",)
    has_stages = True
    distribution = "triton"
    targets = configs.TARGETS
    tables = configs.tables
    limits = replace(
        KernelBackend.limits,
        head_dims=range(1, 257),
        chunk_sizes=configs.CHUNKS,
        decays=("none", "scalar", "channel"),
        erases=("none", "scalar", "channel"),
        writes=("scalar", "channel"),
        apart=True,
    )

    tool_reasons = staticmethod(tool_reasons)
    make_plan = staticmethod(make_plan)
    empty_saved = staticmethod(empty_saved)
    run_forward = staticmethod(forward)
    run_backward = staticmethod(backward)
    run_decode = staticmethod(decode.run)

    def summarise(self, call: Call) -> Summarised:
        return stages.summarise(call)

    def resume(self, call: Call, kept: tuple[Tensor, ...]) -> Forward:
        return stages.resume(call, kept)

    def summarise_gradients(
        self, call: Call, saved: tuple[Tensor, ...], d_o: Tensor, d_state: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return stages.summarise_gradients(call, saved, d_o, d_state)

    def resume_gradients(
        self, call: Call, saved: tuple[Tensor, ...], kept: tuple[Tensor, ...], d_o: Tensor,
        d_state: Tensor,
    ) -> Grads:  # fmt: skip
        return stages.resume_gradients(call, saved, kept, d_o, d_state)

    def remarks(self, call: Call) -> list[str]:
        return pointer_remarks(call)

    def prepared(self, call: Call) -> Prepared | None:
        return decode.prepared(call)

    def compile_ahead(self, target: str, samples: Iterable[Sample]) -> Iterator[CompiledKernel]:
        from gdn_ops.backends.triton.aot import budgets, compiler

        return compiler.compile_ahead(self, target, samples, budgets=budgets.current())


BACKEND = Triton
