"""Stand-ins for `bench gpu`: a device with a made-up clock, contenders on the CPU, peers' modules.

The peers' functions have the signatures and the conventions of the real ones (fla 0.6.0, flash_qla
0.1.3, flashinfer 0.7.2) and compute by this library's definition, so that an adapter that converts
wrongly gets wrong numbers or a TypeError.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from gdn_ops.bench.contender import Contender, Prepared
from gdn_ops.bench.device import Peak, Run
from gdn_ops.bench.gpu.device import Card, capture
from gdn_ops.bench.gpu.rows import GpuRow
from gdn_ops.bench.inputs import Inputs
from gdn_ops.bench.peers import find_contender

FORWARD = GpuRow("forward", (1, 2), (20,), dims=(8, 4), dtype="float32")
PACKED = GpuRow("forward", (1, 2), (9, 4, 7), packed=True, dims=(8, 4), dtype="float32")
BATCH = GpuRow("forward", (2, 4), (11, 11), dims=(4, 8), dtype="float32")
BACKWARD = GpuRow("backward", (3, 6), (20,), dims=(8, 4), dtype="float32")
BACKWARD_PACKED = GpuRow("backward", (1, 2), (9, 11), packed=True, dims=(8, 4), dtype="float32")
STEP = GpuRow("step", (1, 2), (1, 1, 1), dims=(8, 4), dtype="float32")
NARROW_STEP = GpuRow("step", (1, 2), (1, 1), dims=(8, 4), state_dtype="bfloat16")
CHANNELS = tuple(replace(row, channels=True) for row in (FORWARD, PACKED, BACKWARD, STEP))
TINY = (FORWARD, PACKED, BATCH, BACKWARD, BACKWARD_PACKED, STEP, NARROW_STEP, *CHANNELS)


class FakeDevice:
    """A device whose clock moves only when a stand-in works."""

    is_gpu = True

    def __init__(self, name: str = "NVIDIA H200", l2: int = 0) -> None:
        self.torch_device = "cpu"
        self.name, self.l2 = name, l2
        self.now = 0.0
        self.captured: list[int] = []
        self.refuses_capture = False
        self.is_full = False
        self.is_broken = False

    def clock(self) -> float:
        return self.now

    def synchronize(self) -> None:
        if self.is_broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def working(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def graph(self, runs: Sequence[Run]) -> Callable[[], float]:
        if self.refuses_capture:
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.is_full:
            self.run_out_of_memory()
        self.captured.append(len(runs))
        return self.events(runs)

    def keep_busy(self) -> None:
        self.now += 1.0

    def mark(self) -> float:
        # Something lies between any two marks.
        self.now += 1e-3
        return self.now

    def between(self, start: float, stop: float) -> float:
        return stop - start

    def card(self) -> Card:
        return Card(1755.0, 3201.0, 1980.0, 3201.0, 700.0)

    def sampler(self, run: Run) -> tuple[Callable[[], float], str]:
        return capture(self, [run])

    def run_out_of_memory(self) -> None:
        """Fail as a capture does: its end is an error of its own, which hides the first one."""
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def events(self, runs: Sequence[Run]) -> Callable[[], float]:
        def timed() -> float:
            before = self.now
            for run in runs:
                run()
            return self.now - before

        return timed

    def peak(self, run: Run) -> Peak:
        run()
        return Peak(3 << 20, 0, True)

    def forget(self) -> None:
        pass


def contender(name: str = "torch") -> Contender:
    """Return a backend or a peer that is there."""
    real = find_contender(name)
    assert isinstance(real, Contender), real
    return real


def stand_in(
    name: str,
    device: FakeDevice,
    seconds: float = 1e-3,
    change: Callable[[Tensor], Tensor] = lambda x: x,
    log: list[str] | None = None,
    before: Callable[[Inputs], None] = lambda x: None,
) -> Contender:
    """Return the torch backend under another name, with a duration and a mistake.

    `before` is called with the inputs of each call that is prepared.
    """

    def slow(prepare: Callable[[Inputs], Prepared], x: Inputs) -> Prepared:
        before(x)
        prepared = prepare(x)

        def run() -> Any:
            device.now += seconds
            if log is not None:
                log.append(name)
            return prepared.run()

        def backward_takes_time(_: Tensor) -> None:
            device.now += seconds

        def read(result: Any) -> tuple[Tensor, ...]:
            o, *state = prepared.read(result)
            if o.requires_grad:
                o.register_hook(backward_takes_time)
            return change(o), *state

        return Prepared(run, read)

    right = contender()
    return Contender(
        name, lambda x: slow(right.sequence, x), lambda x: slow(right.step, x), "1.0", is_peer=True
    )


def takes(signature: str) -> Callable[[Callable[[Any], Any]], Callable[..., Any]]:
    """Give a function of named arguments the signature of the real one."""
    real = inspect.signature(eval(f"lambda {signature}: None"))

    def decorate(function: Callable[[Any], Any]) -> Callable[..., Any]:
        def peer(*arguments: object, **named: object) -> Any:
            bound = real.bind(*arguments, **named)
            bound.apply_defaults()
            return function(types.SimpleNamespace(**bound.arguments))

        peer.__signature__ = real  # type: ignore[attr-defined]
        return peer

    return decorate


def define(*qkv: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    return gdn_ops.gated_delta(*qkv, **given, return_state=True, backend="naive")


@takes(
    "q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,"
    "use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False,"
    "state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None,"
    "cp_context=None, **kwargs"
)
def fla_chunk(x: Any) -> tuple[Tensor, Tensor | None]:
    assert x.g.shape == x.beta.shape == x.v.shape[:-1]
    return fla_define(x)


def fla_define(x: Any) -> tuple[Tensor, Tensor | None]:
    """Compute what functions of FLA share: log gates, and a final state if it is asked for."""
    assert not (x.use_beta_sigmoid_in_kernel or x.allow_neg_eigval or x.state_v_first or x.kwargs)
    assert x.g.dtype == x.beta.dtype == torch.float32 and x.g.max() <= 0, "g is a logarithm here"
    o, state = define(
        *(x.q, x.k, x.v),
        beta=x.beta,
        log_alpha=x.g,
        scale=x.scale,
        qk_l2norm=x.use_qk_l2norm_in_kernel,
        initial_state=x.initial_state,
        cu_seqlens=x.cu_seqlens,
    )
    return o, state if x.output_final_state else None


@takes(
    "q, k, v, g=None, gk=None, gv=None, beta=None, scale=None, initial_state=None,"
    "output_final_state=False, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False,"
    "A_log=None, dt_bias=None, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False,"
    "state_v_first=False, cu_seqlens=None, **kwargs"
)
def fla_recurrent(x: Any) -> Any:
    assert x.g is not None and x.beta is not None and x.initial_state is not None
    assert x.gk is None and x.gv is None and not x.use_gate_in_kernel and not x.kwargs
    given = (x.scale, x.initial_state.float(), x.output_final_state, x.use_qk_l2norm_in_kernel)
    return fla_chunk(x.q, x.k, x.v, x.g, x.beta, *given)


@takes(
    "q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,"
    "use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False,"
    "allow_neg_eigval=False, safe_gate=False, lower_bound=None, disable_recompute=False,"
    "return_intermediate_states=False, state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None,"
    "cp_context=None, use_graph=False, max_num_seqs=None, **kwargs"
)
def fla_chunk_kda(x: Any) -> tuple[Tensor, Tensor | None]:
    assert x.g.shape == (*x.v.shape[:-1], x.k.shape[-1]) and not x.use_gate_in_kernel
    assert not (x.safe_gate or x.return_intermediate_states or x.use_graph)
    return fla_define(x)


@takes(
    "q, k, v, g, beta, A_log=None, dt_bias=None, scale=None, initial_state=None,"
    "output_final_state=False, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False,"
    "use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, lower_bound=None,"
    "state_v_first=False, cu_seqlens=None, **kwargs"
)
def fla_recurrent_kda(x: Any) -> tuple[Tensor, Tensor | None]:
    assert x.g.shape == (*x.v.shape[:-1], x.k.shape[-1]) and not x.use_gate_in_kernel
    assert x.initial_state is not None
    return fla_define(x)


@takes(
    "q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,"
    "use_qk_l2norm_in_kernel=False, cu_seqlens=None, head_first=False, state_v_first=False,"
    "auto_cp=True, enable_fwd_cp_cache=True, cp_context=None, force_intra_cp=False"
)
def flash_qla_chunk(x: Any) -> Any:
    assert not (x.head_first or x.state_v_first)
    given = (x.scale, x.initial_state, x.output_final_state, x.use_qk_l2norm_in_kernel)
    return fla_chunk(x.q, x.k, x.v, x.g, x.beta, *given, cu_seqlens=x.cu_seqlens)


@takes(
    "q, k, v, g=None, beta=None, scale=None, initial_state=None, output_final_state=False,"
    "cu_seqlens=None, use_qk_l2norm_in_kernel=False, output=None, output_state=None,"
    "state_checkpoints=None, checkpoint_cu_starts=None, checkpoint_every_n_tokens=0,"
    "use_cp='auto', state_indices=None, _cp_chunk_len=None, backend='auto', max_seqlen=None"
)
def flashinfer_prefill(x: Any) -> tuple[Tensor, Tensor]:
    assert x.q.dim() == 3 and x.cu_seqlens is not None and x.output_final_state
    assert x.g.dtype == x.beta.dtype == x.initial_state.dtype == torch.float32
    assert x.g.min() >= 0, "g is linear alpha here"
    assert x.g.shape == x.beta.shape == x.v.shape[:-1] and x.cu_seqlens.dtype == torch.int64
    assert all(y.is_contiguous() for y in (x.q, x.k, x.v, x.g, x.beta, x.initial_state))
    o, state = define(
        *(y.unsqueeze(0) for y in (x.q, x.k, x.v)),
        alpha=x.g.unsqueeze(0),
        beta=x.beta.unsqueeze(0),
        scale=x.scale,
        qk_l2norm=x.use_qk_l2norm_in_kernel,
        initial_state=x.initial_state.transpose(-1, -2),
        cu_seqlens=x.cu_seqlens,
    )
    return o.squeeze(0), state.transpose(-1, -2).contiguous()


@takes(
    "q, k, v, state, A_log, a, dt_bias, b, scale=None, output=None, use_qk_l2norm=True,"
    "initial_state=None, initial_state_indices=None, output_state_indices=None,"
    "intermediate_states_buffer=None, disable_state_update=False, backend='auto'"
)
def flashinfer_decode(x: Any) -> tuple[Tensor, Tensor]:
    assert (x.initial_state is None) == (x.initial_state_indices is None)
    pool = x.state if x.initial_state is None else x.initial_state
    assert pool is not None and x.q.dim() == 4 and x.q.shape[1] == 1
    assert x.A_log.dtype == x.dt_bias.dtype == torch.float32 and x.a.dtype == x.b.dtype == x.q.dtype
    assert x.A_log.shape == x.dt_bias.shape == x.v.shape[2:3] and x.a.shape == x.b.shape
    assert x.a.shape == x.v.shape[:-1]
    if x.initial_state_indices is not None:
        assert torch.equal(x.initial_state_indices, torch.arange(x.q.shape[0]))
        assert pool.dtype == torch.bfloat16
    o, new = define(
        *(x.q, x.k, x.v),
        beta=torch.sigmoid(x.b.float()),
        log_alpha=-x.A_log.exp() * torch.nn.functional.softplus(x.a.float() + x.dt_bias),
        scale=x.scale,
        qk_l2norm=x.use_qk_l2norm,
        initial_state=pool.float().transpose(-1, -2),
    )
    pool.copy_(new.transpose(-1, -2))
    return o, pool


MODULES: dict[str, dict[str, object]] = {
    "fla": {"__version__": "0.6.0"},
    "fla.ops": {},
    "fla.ops.gated_delta_rule": {
        "chunk_gated_delta_rule": fla_chunk,
        "fused_recurrent_gated_delta_rule": fla_recurrent,
    },
    "fla.ops.kda": {"chunk_kda": fla_chunk_kda, "fused_recurrent_kda": fla_recurrent_kda},
    "flash_qla": {"__version__": "0.1.3", "chunk_gated_delta_rule": flash_qla_chunk},
    "flashinfer": {"__version__": "0.7.2"},
    "flashinfer.gdn_prefill": {"chunk_gated_delta_rule": flashinfer_prefill},
    "flashinfer.gdn_decode": {"gated_delta_rule_decode_pretranspose": flashinfer_decode},
}


def install_peers(patch: pytest.MonkeyPatch) -> None:
    """Install the stand-ins of all peers."""
    for name, content in MODULES.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        patch.setitem(sys.modules, name, module)
