"""Run the decode ops in one launch."""

from __future__ import annotations

from torch import Tensor

from gdn_ops.backends.triton.host import config as configs
from gdn_ops.backends.triton.host.config import power_of_two
from gdn_ops.backends.triton.host.launcher import launch
from gdn_ops.backends.triton.host.plan import (
    dense,
    gate_kind,
    gate_of,
    readable,
    strides,
)
from gdn_ops.backends.triton.kernels import step
from gdn_ops.call.bind import Call


def run(
    call: Call,
    tokens: tuple[Tensor, Tensor, Tensor],
    o: Tensor,
    new_state: Tensor,
    states: Tensor | None,
) -> None:
    """Launch the decode kernel; a state whose columns of V have gaps is copied."""
    q, k, v = map(readable, tokens)
    B, T, HV, V = v.shape
    H, K = q.shape[2:]
    state, written = call.state, new_state
    if state is not None and state.stride(-1) != 1:
        state = state.contiguous()
        written = state if call.inplace else new_state
    beta = dense(call.tokens.beta)
    indices = dense(call.state_indices)
    config = configs.tables.choose(call.device, K, V)
    BV = min(config.BV, power_of_two(V))
    launch(
        step.tokens, (B * HV, -(-V // BV)),
        q, k, v, gate_of(call), beta, state, written, states, indices, o, float(call.scale),
        T, *strides(q), *strides(k), *strides(v),
        *(strides(written if state is None else state)), *strides(written),
        H=H, R=HV // H, K=K, V=V, BK=power_of_two(K), BV=BV,
        GATE=gate_kind(call), HAS_BETA=beta is not None, ERASE=call.rule.has_erase,
        NORM=call.qk_l2norm, HAS_STATE=state is not None, KEEP=states is not None,
        POOL=indices is not None, num_warps=config.warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    if written is not new_state:
        new_state.copy_(written)
