"""Run the decode ops in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_ops.backends.triton.host import config as configs
from gdn_ops.backends.triton.host.config import power_of_two
from gdn_ops.backends.triton.host.forward import gate_kind, gate_of
from gdn_ops.backends.triton.host.launcher import launch
from gdn_ops.backends.triton.host.plan import readable, strides
from gdn_ops.backends.triton.kernels import step
from gdn_ops.call.bind import Call


def run(call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run the tokens of a call in one launch.

    Args:
        call: of `gated_delta_step`, `gated_delta_steps`, or `gated_delta` without packing; q, k
            and v without a token axis count as one token.

    Returns:
        o like v, the new state, and the state after every token (B, T, HV, K, V) or None.
    """
    q, k, v = (
        readable(x if x.dim() == 4 else x.unsqueeze(1))
        for x in (call.tokens.q, call.tokens.k, call.tokens.v)
    )
    B, T, HV, V = v.shape
    H, K = q.shape[2:]
    given = call.state
    stored = torch.float32 if given is None else given.dtype
    o = torch.empty((B, T, HV, V), dtype=call.tokens.v.dtype, device=call.device)
    state = given
    if given is not None and given.stride(-1) != 1:
        state = given.contiguous()
    if call.inplace and state is not None:
        new_state = state
    else:
        new_state = torch.empty((B, HV, K, V), dtype=stored, device=call.device)
    states = None
    if call.return_states:
        states = torch.empty((B, T, HV, K, V), dtype=stored, device=call.device)
    beta = None if call.tokens.beta is None else call.tokens.beta.contiguous()
    indices = None if call.state_indices is None else call.state_indices.contiguous()
    config = configs.tables.choose_step(call.device, K, V)
    BV = min(config.BV, power_of_two(V))
    launch(
        step.tokens, (B * HV, -(-V // BV)),
        q, k, v, gate_of(call), beta, state, new_state, states, indices, o, float(call.scale),
        T, *strides(q), *strides(k), *strides(v),
        *(strides(new_state if state is None else state)), *strides(new_state),
        H=H, R=HV // H, K=K, V=V, BK=power_of_two(K), BV=BV,
        GATE=gate_kind(call), HAS_BETA=beta is not None, ERASE=call.rule.has_erase,
        NORM=call.qk_l2norm, HAS_STATE=state is not None, KEEP=states is not None,
        POOL=indices is not None, num_warps=config.warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    if call.inplace and given is not None and state is not given:
        given.copy_(new_state)
        new_state = given
    return o.view(call.tokens.v.shape), new_state, states
