"""Run the chunkwise form as Triton kernels, on NVIDIA and AMD GPUs.

    prepare, states, output                     three launches forward (`forward`)
    states, reads_back, state_gradients,
    pair_gradients, token_gradients             five backward (`backward`)
    tokens                                      one for a token, or a few (`decode`)

Launch configurations are data (`table`), chosen by `config`. On CPU tensors the same kernels are
emulated, for checking (`emulation`); without a GPU they are compiled for one (`aot`).
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from gdn_ops.aot.results import CompiledKernel, Sample
from gdn_ops.backends.triton.host import config as configs
from gdn_ops.backends.triton.host import decode
from gdn_ops.backends.triton.host.backward import backward as run_backward
from gdn_ops.backends.triton.host.forward import forward as run_forward
from gdn_ops.backends.triton.host.plan import Saved, empty_saved, make_plan
from gdn_ops.call.bind import Call
from gdn_ops.dispatch.backend import gradients_without_tokens, without_tokens
from gdn_ops.dispatch.registry import Backend, Forward, Grads
from gdn_ops.kernel_support.tuning import Row
from gdn_ops.spec.ops import GATED_DELTA
from gdn_ops.spec.rules import Limits

OLDEST, NEWEST = (3, 6), (3, 9)
"""The versions of Triton that the kernels are emulated and compiled with in the tests."""


@functools.cache
def version_reasons() -> tuple[str, ...]:
    """Return why the Triton that is installed cannot be used."""
    version = importlib.metadata.version("triton")
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        low, high = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
        return (f"triton {version} is installed (supported: {low} to {high})",)
    return ()


@functools.cache
def compiler_reasons() -> tuple[str, ...]:
    """Return why Triton could not build the code that launches kernels: a missing C compiler."""
    if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return ()
    return ("no C compiler, which Triton launches with: install gcc or clang, or set CC",)


class Triton(Backend):
    """Run chunkwise kernels that save T and recompute the rest in the backward."""

    name = "triton"
    kernels = True
    requires = ("triton",)
    distribution = "triton"
    targets = configs.TARGETS
    limits = Limits(
        devices=("cuda",),
        emulated_devices=("cpu",),
        dtypes=("bfloat16", "float16", "float32"),
        state_dtypes=("float32", "bfloat16"),
        head_dims=range(1, 257),
        chunk_sizes=configs.CHUNKS,
        min_capability=(8, 0),
        pools=True,
    )

    def reasons(self, call: Call) -> list[str]:
        found = [*version_reasons()]
        if call.device.type == "cuda":
            found += compiler_reasons()
        return found

    def saved_like(self, call: Call) -> tuple[Tensor, ...]:
        return tuple(empty_saved(make_plan(call), call.device))

    def forward(self, call: Call) -> Forward:
        if not call.has_tokens:
            return without_tokens(call, self.saved_like(call) if call.needs_grad else ())
        s = call.sizes
        is_packed = call.cu_seqlens is not None
        if s.T <= configs.MOST_STEPS and not (call.needs_grad or is_packed or call.chunk_size):
            return Forward(*decode.run(call)[:2])
        return run_forward(call, make_plan(call))

    def backward(
        self, call: Call, saved: tuple[Tensor, ...] | None, d_o: Tensor, d_state: Tensor
    ) -> Grads:
        if not call.has_tokens:
            return gradients_without_tokens(call, d_state)
        if saved is None:
            raise RuntimeError("gradients of gradients were asked for, which limits exclude")
        return run_backward(call, make_plan(call), Saved(*saved), d_o, d_state)

    def decode_one(self, call: Call) -> tuple[Tensor, Tensor]:
        return decode.run(call)[:2]

    def decode_many(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        return decode.run(call)

    def tunables(self, call: Call) -> Sequence[Row]:
        K, V, device = call.sizes.K, call.sizes.V, call.device
        if call.op is GATED_DELTA:
            key = configs.sequence_key(device, call.tokens.q.dtype, K, V)
            return configs.neighbours(Row(key, configs.choose(device, call.tokens.q.dtype, K, V)))
        key_of_step = configs.step_key(device, K, V)
        return configs.neighbours(Row(key_of_step, configs.choose_step(device, K, V)))

    def using(self, config: object) -> AbstractContextManager[object]:
        if not isinstance(config, Row):
            raise TypeError(f"config is {type(config).__name__}, should be one of `tunables`")
        return configs.using(config)

    def compile_ahead(self, target: str, samples: Iterable[Sample]) -> Iterator[CompiledKernel]:
        from gdn_ops.backends.triton.aot import compiler

        return compiler.compile_ahead(self, target, samples)


BACKEND = Triton
