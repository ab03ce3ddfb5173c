"""Prepare decode calls: pack once what their signature tells, and pass pointers at every call."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gdn_ops.backends.cpp import calls
from gdn_ops.backends.cpp.library import check_status, library, threads
from gdn_ops.call.bind import Arguments, Call
from gdn_ops.call.memory import reach
from gdn_ops.dispatch.backend import Prepared, PreparedRaw, RawGates
from gdn_ops.kernel_support.host_memory import empty
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP, GATED_DELTA_STEPS

_CHECKS = struct.Struct("=7q4f")

MOST_STEPS = 4
"""Up to so many tokens of `gated_delta` run as those of a decode op, without gradients.

Measured at B=1, H/HV=16/32, K=V=128 with one thread on an AVX-512 core, as those and as a chunk:
0.47 and 0.67 ms for 4 tokens with an initial state, 0.52 and 0.54 without, 0.81 and 0.59 for 8.
"""

REFUSED = 2
"""The status of the kernel, before it writes, where a call has to go the long way."""


def prepared_decode(call: Call) -> Prepared | None:
    """Return a function that runs decode calls like one that is on tensors without memory.

    None is returned where the kernel cannot read and write the very tensors of the call.
    """
    run = _prepared(call, calls.GIVEN)
    return None if run is None else partial(run, None, None)


def prepared_raw(call: Call, gates: RawGates) -> PreparedRaw | None:
    """Return the same of a step whose gates are raw; it is given A_log and dt_bias too."""
    raw = calls.RawGates(None, None, gates.beta_factor, True, gates.lower_bound)
    return _prepared(call, raw)


def _prepared(call: Call, raw: calls.RawGates) -> PreparedRaw | None:
    if call.op is GATED_DELTA and not is_short(call):
        return None
    if call.widths.apart or not _is_direct(call, raw.has_decay):
        return None
    pointers = [ctypes.c_void_p] * 12
    library().gdn_decode_repeated.argtypes = [ctypes.c_char_p, ctypes.c_int, *pointers]
    s, has_states, packed = call.sizes, call.op is GATED_DELTA_STEPS, _packed(call, raw)
    shape_of_states, in_order = (s.B, s.T, s.HV, s.K, s.V), torch.contiguous_format

    def run(A_log: Tensor | None, dt_bias: Tensor | None, arguments: Arguments) -> Any:
        (q, k, v, alpha, log_alpha, beta, *_), old, _, slots, *_ = arguments
        assert old is not None
        o = torch.empty_like(v, memory_format=in_order)
        new = old if call.inplace else torch.empty_like(old, memory_format=in_order)
        states = empty(shape_of_states, old.dtype, old.device) if call.return_states else None
        decay = log_alpha if alpha is None else alpha
        status = library().gdn_decode_repeated(
            packed,
            threads(),
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            None if decay is None else decay.data_ptr(),
            None if beta is None else beta.data_ptr(),
            None if slots is None else slots.data_ptr(),
            o.data_ptr(),
            old.data_ptr(),
            new.data_ptr(),
            None if states is None else states.data_ptr(),
            None if A_log is None else A_log.data_ptr(),
            None if dt_bias is None else dt_bias.data_ptr(),
        )
        if status == REFUSED:
            return None
        check_status(status)
        return (o, new, states) if has_states else (o, new)

    return run


def is_short(call: Call) -> bool:
    """Return whether a call of `gated_delta` is run as one of `gated_delta_steps`."""
    if call.needs_grad or call.cu_seqlens is not None or call.chunk_size is not None:
        return False
    return call.sizes.T <= MOST_STEPS


def as_rows(call: Call) -> Call | None:
    """Return a packed call whose sequences have the same few tokens as a batch, or None."""
    s, boundaries = call.sizes, call.cu_seqlens
    each, rest = divmod(s.T, s.N)
    if call.needs_grad or boundaries is None or rest or not 0 < each <= MOST_STEPS:
        return None
    if not bool((boundaries.diff() == each).all()):
        return None
    tokens = call.tokens.map(lambda x: x[0].unflatten(0, (s.N, each)))
    return replace(call, sizes=replace(s, B=s.N, T=each), tokens=tokens, cu_seqlens=None)


def _is_direct(call: Call, is_raw: bool) -> bool:
    """Return whether the kernel reads and writes the tensors of a decode call as they are.

    Gates that are given are float32, since their domain is looked at; raw ones have none.
    """
    q, k, v, alpha, log_alpha, beta, *_ = call.tokens
    state, slots = call.state, call.state_indices
    if state is None or not v.numel() or state.stride()[2:] != (call.sizes.V, 1):
        return False
    if call.op is GATED_DELTA and state.dtype != torch.float32:
        return False
    if slots is not None and not (call.inplace and slots.to(torch.int64).contiguous() is slots):
        return False
    gates = [x for x in (alpha, log_alpha, beta) if x is not None]
    are_read = [calls.gate(x, q) is x for x in (alpha, log_alpha)]
    are_read += [calls.readable(x) is x for x in (q, k, v)]
    dtypes = calls.TYPES if is_raw else (torch.float32,)
    return all(are_read) and all([x.dtype in dtypes for x in gates])


def _packed(call: Call, raw: calls.RawGates) -> bytes:
    """Return `GdnRepeated` of a call on tensors without memory."""
    q, k, v, alpha, log_alpha, beta, *_ = call.tokens
    state, slots = call.state, call.state_indices
    assert state is not None
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    new = state if call.inplace else torch.empty(state.shape, dtype=state.dtype, device="meta")
    array = calls.token if call.op is GATED_DELTA_STEP else calls.array
    decay = log_alpha if alpha is None else alpha
    arrays = (*calls.of_tokens(call.tokens, array), array(o))
    steps = calls.pack_steps(call, arrays, state, new, None, None, 1, raw)
    reaches = [0 if x is None else reach(x) for x in (q, k, v, decay, beta, slots)]
    domain = {arg.name: domain for arg, domain in call.op.bounded}
    decays, betas = domain["log_alpha" if alpha is None else "alpha"], domain["beta"]
    bounds = (decays.low, decays.high, betas.low, betas.high)
    return steps + _CHECKS.pack(*reaches, reach(state) if call.inplace else 0, *bounds)
