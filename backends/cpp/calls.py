"""Turn calls into the structs of `src/interface.h`, packed as bytes.

Every field has eight bytes, so that one format string packs a struct: pointers and sizes as
integers; floats, and what stands beside one, in four bytes each.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gdn_ops.call.bind import Call

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of the element types, as in `GdnType`."""

CHUNK = 32
"""Tokens of a chunk, as in `src/interface.h`."""

CHUNKS_PER_STATE = 4
"""Chunks between two states that a forward keeps for its backward."""

NOTHING = (0, 0, 0, 0, 0)
"""An array that a call does not have."""

LEAST_TASKS = 8
"""Tasks that a backward has at least, so that up to as many threads change no bit of a gradient."""

_SEQUENCES = struct.Struct("=46qfi")
_GRADIENTS = struct.Struct("=32q")
_STEPS = struct.Struct("=52qffq")

Array = tuple[int, int, int, int, int]
Reader = Callable[[Tensor | None], Array]


class RawGates(NamedTuple):
    """Say that the gates of a decode call are raw, as a layer projects them.

    Attributes:
        A_log: (HV,), float32, contiguous: the decay is a, and α = exp(−exp(A_log) softplus(a +
            dt_bias)); None where it is α or its logarithm.
        dt_bias: likewise, or None for 0.
        beta_factor: β = beta_factor · sigmoid(beta); None where beta is β.
    """

    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    beta_factor: float | None = None


GIVEN = RawGates()
"""Gates that are no raw ones."""


def readable(x: Tensor) -> Tensor:
    """Return q, k, v or a gradient with its last axis contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def gate(x: Tensor | None) -> Tensor | None:
    """Return a gate of heads in a type that the kernels read."""
    return x if x is None or x.dtype in TYPES else x.to(torch.float32)


def decay(x: Tensor | None, q: Tensor) -> Tensor | None:
    """Return a decay in a type that the kernels read; one of channels has as many axes as q."""
    typed = gate(x)
    return readable(typed) if typed is not None and typed.dim() == q.dim() else typed


def whole(x: Tensor | None) -> Tensor | None:
    """Return a state as contiguous float32."""
    return None if x is None else x.to(torch.float32).contiguous()


def array(x: Tensor | None) -> Array:
    """Return an array of tokens (B, T, heads, ...) as pointer, strides and type."""
    if x is None:
        return NOTHING
    strides = x.stride()
    return (x.data_ptr(), strides[0], strides[1], strides[2], TYPES[x.dtype])


def token(x: Tensor | None) -> Array:
    """Return an array of single tokens (B, heads, ...) as pointer, strides and type."""
    if x is None:
        return NOTHING
    strides = x.stride()
    return (x.data_ptr(), strides[0], 0, strides[1], TYPES[x.dtype])


def pointer(x: Tensor | None) -> int:
    """Return the address of a tensor, 0 for none."""
    return 0 if x is None else x.data_ptr()


def pack_sequences(
    call: Call,
    arrays: tuple[Array, ...],
    o: Tensor | None,
    final: Tensor | None,
    states: Tensor | None,
    initial: Tensor | None,
    threads: int,
) -> bytes:
    """Return `GdnSequences` of a call; `arrays` are those of q, k, v, decay and beta."""
    s = call.sizes
    q, k, v, decay, beta = arrays
    return _SEQUENCES.pack(
        *(*q, *k, *v, *decay, *beta, *array(o)),
        *(pointer(initial), pointer(final), pointer(states), pointer(call.cu_seqlens)),
        *(s.N, s.T, s.H, s.HV, s.K, s.V),
        *(call.tokens.alpha is None, call.widths.decay == "channel"),
        *(call.rule.has_erase, call.qk_l2norm, CHUNKS_PER_STATE),
        1 if call.is_part else LEAST_TASKS,
        call.scale,
        threads,
    )


def pack_gradients(
    d_o: Tensor, d_final: Tensor, grads: tuple[Tensor | None, ...], d_initial: Tensor | None
) -> bytes:
    """Return `GdnGradients`; `grads` are those of q, k, v, decay and beta."""
    arrays = [number for x in grads for number in array(x)]
    return _GRADIENTS.pack(*array(d_o), pointer(d_final), *arrays, pointer(d_initial))


def pack_steps(
    call: Call,
    arrays: tuple[Array, ...],
    state: Tensor,
    new_state: Tensor,
    states: Tensor | None,
    slots: Tensor | None,
    threads: int,
    raw: RawGates = GIVEN,
) -> bytes:
    """Return `GdnSteps` of a call; `arrays` are those of q, k, v, decay, beta and o.

    With `raw` gates, decay and beta are what the layer projects.
    """
    s = call.sizes
    q, k, v, decay, beta, o = arrays
    row, head = state.stride()[:2]
    new_row, new_head = new_state.stride()[:2]
    return _STEPS.pack(
        *(*q, *k, *v, *decay, *beta, *o),
        *(state.data_ptr(), new_state.data_ptr(), pointer(states), pointer(slots)),
        *(pointer(raw.A_log), pointer(raw.dt_bias)),
        *(row, head, new_row, new_head, TYPES[state.dtype]),
        *(s.B, s.T, s.H, s.HV, s.K, s.V),
        *(call.tokens.alpha is None, call.widths.decay == "channel"),
        *(call.rule.has_erase, call.qk_l2norm),
        raw.beta_factor is not None,
        *(call.scale, raw.beta_factor or 0.0),
        threads,
    )
