"""Stand-ins for `bench gpu`: a device with a made-up clock, contenders on the CPU, peers' modules.

The peers' functions have the signatures and the conventions of the real ones (fla 0.6.0, flash_qla
0.1.3, flashinfer 0.7.2) and compute by this library's definition, so that an adapter that converts
wrongly gets wrong numbers or a TypeError.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from gdn_ops.bench.device import Peak, Run
from gdn_ops.bench.gpu.device import Facts
from gdn_ops.bench.gpu.rows import GpuRow
from gdn_ops.bench.inputs import Inputs
from gdn_ops.bench.peers import Contender, Prepared, our_contender

FORWARD = GpuRow("forward", (1, 2), (20,), dims=(8, 4), dtype="float32")
PACKED = GpuRow("forward", (1, 2), (9, 4, 7), packed=True, dims=(8, 4), dtype="float32")
BATCH = GpuRow("forward", (2, 4), (11, 11), dims=(4, 8), dtype="float32")
BACKWARD = GpuRow("backward", (3, 6), (20,), dims=(8, 4), dtype="float32")
BACKWARD_PACKED = GpuRow("backward", (1, 2), (9, 11), packed=True, dims=(8, 4), dtype="float32")
STEP = GpuRow("step", (1, 2), (1, 1, 1), dims=(8, 4), dtype="float32")
NARROW_STEP = GpuRow("step", (1, 2), (1, 1), dims=(8, 4), state_dtype="bfloat16")
TINY = (FORWARD, PACKED, BATCH, BACKWARD, BACKWARD_PACKED, STEP, NARROW_STEP)


class FakeDevice:
    """A device whose clock moves only when a stand-in works."""

    def __init__(self, name: str = "NVIDIA H200", l2: int = 0) -> None:
        self.torch_device = "cpu"
        self.facts = Facts(name, "sm90", 1 << 30, l2, "1.2.3")
        self.now = 0.0
        self.captured: list[int] = []
        self.refuses_capture = False
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
        self.captured.append(len(runs))
        return self.events(runs)

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


def ours() -> Contender:
    """Return the torch backend."""
    found = our_contender("torch")
    assert isinstance(found, Contender)
    return found


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

    right = ours()
    return Contender(
        name, lambda x: slow(right.sequence, x), lambda x: slow(right.step, x), "1.0", is_peer=True
    )


# fla


def fla_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: object = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    assert not (use_beta_sigmoid_in_kernel or allow_neg_eigval or state_v_first or kwargs)
    o, state = gdn_ops.gated_delta(
        q,
        k,
        v,
        beta=beta,
        log_alpha=g,
        scale=scale,
        qk_l2norm=use_qk_l2norm_in_kernel,
        initial_state=initial_state,
        return_state=True,
        cu_seqlens=cu_seqlens,
        backend="naive",
    )
    return o, state if output_final_state else None


def fla_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    assert g is not None and beta is not None and initial_state is not None
    assert gk is None and gv is None and not use_gate_in_kernel and not kwargs
    return fla_chunk(
        q, k, v, g, beta, scale, initial_state.float(), output_final_state, use_qk_l2norm_in_kernel
    )


# flash_qla


def flash_qla_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    head_first: bool = False,
    state_v_first: bool = False,
    auto_cp: bool = True,
    enable_fwd_cp_cache: bool = True,
    cp_context: object = None,
    force_intra_cp: bool = False,
) -> tuple[Tensor, Tensor | None]:
    assert not (head_first or state_v_first)
    return fla_chunk(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
    )


# flashinfer


def flashinfer_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    output: Tensor | None = None,
    output_state: Tensor | None = None,
    state_checkpoints: Tensor | None = None,
    checkpoint_cu_starts: Tensor | None = None,
    checkpoint_every_n_tokens: int = 0,
    use_cp: str | bool = "auto",
    state_indices: Tensor | None = None,
    _cp_chunk_len: int | None = None,
    backend: str = "auto",
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    assert q.dim() == 3 and cu_seqlens is not None and output_final_state
    assert g is not None and g.dtype == torch.float32 and g.min() >= 0, "g is linear alpha here"
    assert beta is not None and initial_state is not None
    assert all(x.is_contiguous() for x in (q, k, v, g, beta, initial_state))
    o, state = gdn_ops.gated_delta(
        *(x.unsqueeze(0) for x in (q, k, v)),
        alpha=g.unsqueeze(0),
        beta=beta.unsqueeze(0),
        scale=scale,
        qk_l2norm=use_qk_l2norm_in_kernel,
        initial_state=initial_state.transpose(-1, -2),
        return_state=True,
        cu_seqlens=cu_seqlens,
        backend="naive",
    )
    return o.squeeze(0), state.transpose(-1, -2).contiguous()


def flashinfer_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None = None,
    output: Tensor | None = None,
    use_qk_l2norm: bool = True,
    initial_state: Tensor | None = None,
    initial_state_indices: Tensor | None = None,
    output_state_indices: Tensor | None = None,
    intermediate_states_buffer: Tensor | None = None,
    disable_state_update: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    assert (initial_state is None) == (initial_state_indices is None)
    pool = state if initial_state is None else initial_state
    assert pool is not None and q.dim() == 4 and q.shape[1] == 1
    if initial_state_indices is not None:
        assert torch.equal(initial_state_indices, torch.arange(q.shape[0]))
        assert pool.dtype == torch.bfloat16
    log_alpha = -A_log.exp() * torch.nn.functional.softplus(a.float() + dt_bias)
    o, new = gdn_ops.gated_delta(
        q,
        k,
        v,
        beta=torch.sigmoid(b.float()),
        log_alpha=log_alpha,
        scale=scale,
        qk_l2norm=use_qk_l2norm,
        initial_state=pool.float().transpose(-1, -2),
        return_state=True,
        backend="naive",
    )
    pool.copy_(new.transpose(-1, -2))
    return o, pool


def module(patch: pytest.MonkeyPatch, name: str, **content: object) -> None:
    """Put a module into sys.modules, with the packages above it."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        above = ".".join(parts[:i])
        if above not in sys.modules:
            patch.setitem(sys.modules, above, types.ModuleType(above))
    found = sys.modules.get(name) or types.ModuleType(name)
    for key, value in content.items():
        setattr(found, key, value)
    patch.setitem(sys.modules, name, found)


def install_peers(patch: pytest.MonkeyPatch) -> None:
    """Install the stand-ins of all peers."""
    module(patch, "fla", __version__="0.6.0")
    module(
        patch,
        "fla.ops.gated_delta_rule",
        chunk_gated_delta_rule=fla_chunk,
        fused_recurrent_gated_delta_rule=fla_recurrent,
    )
    module(patch, "flash_qla", chunk_gated_delta_rule=flash_qla_chunk, __version__="0.1.3")
    module(patch, "flashinfer", __version__="0.7.2")
    module(patch, "flashinfer.gdn_prefill", chunk_gated_delta_rule=flashinfer_prefill)
    module(
        patch,
        "flashinfer.gdn_decode",
        gated_delta_rule_decode_pretranspose=flashinfer_decode,
    )
