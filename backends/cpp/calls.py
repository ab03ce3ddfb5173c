"""Turn calls into the structs of `src/interface.h`, packed as bytes.

Every field has eight bytes, so that one format string packs a struct: pointers and sizes as
integers, the last two, a float and an int, in four bytes each.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

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

_SEQUENCES = struct.Struct("=44qfi")
_GRADIENTS = struct.Struct("=32q")
_STEPS = struct.Struct("=48qfi")

Array = tuple[int, int, int, int, int]
Reader = Callable[[Tensor | None], Array]


def readable(x: Tensor) -> Tensor:
    """Return q, k, v or a gradient with its last axis contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def gate(x: Tensor | None) -> Tensor | None:
    """Return a gate in a type that the kernels read."""
    return x if x is None or x.dtype in TYPES else x.to(torch.float32)


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
        *(call.tokens.alpha is None, call.rule.has_erase, call.qk_l2norm, CHUNKS_PER_STATE),
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
) -> bytes:
    """Return `GdnSteps` of a call; `arrays` are those of q, k, v, decay, beta and o."""
    s = call.sizes
    q, k, v, decay, beta, o = arrays
    row, head = state.stride()[:2]
    new_row, new_head = new_state.stride()[:2]
    return _STEPS.pack(
        *(*q, *k, *v, *decay, *beta, *o),
        *(state.data_ptr(), new_state.data_ptr(), pointer(states), pointer(slots)),
        *(row, head, new_row, new_head, TYPES[state.dtype]),
        *(s.B, s.T, s.H, s.HV, s.K, s.V),
        *(call.tokens.alpha is None, call.rule.has_erase, call.qk_l2norm),
        call.scale,
        threads,
    )
