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

from gdn_ops.call.bind import Call, Tokens

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

_SEQUENCES = struct.Struct("=59qfi")
_GRADIENTS = struct.Struct("=42q")
_STEPS = struct.Struct("=66qffffq")

Array = tuple[int, int, int, int, int]
Reader = Callable[[Tensor | None], Array]


class RawGates(NamedTuple):
    """Say that the gates of a decode call are raw, as a layer projects them.

    Attributes:
        A_log: (HV,), float32, contiguous: the logarithm of the rate, or None for a rate of 1.
        dt_bias: (HV,), or (HV, K) or flat where the decay is of channels, likewise, or None for 0.
        beta_factor: β = beta_factor · sigmoid(beta); None where beta is β.
        has_decay: whether the decay is raw too, which α = exp(−exp(A_log) softplus(decay +
            dt_bias)) is made of, or with a lower bound exp(lower_bound sigmoid(exp(A_log) (decay +
            dt_bias))).
        lower_bound: of log α, or None.
    """

    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    beta_factor: float | None = None
    has_decay: bool = False
    lower_bound: float | None = None

    @property
    def kind(self) -> int:
        """Return the `GdnRawDecay`."""
        return 0 if not self.has_decay else 1 if self.lower_bound is None else 2


GIVEN = RawGates()
"""Gates that are no raw ones."""


def readable(x: Tensor) -> Tensor:
    """Return q, k, v or a gradient with its last axis contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def gate(x: Tensor | None, q: Tensor) -> Tensor | None:
    """Return a gate in a type that the kernels read; one of channels has as many axes as q."""
    if x is None:
        return None
    typed = x if x.dtype in TYPES else x.to(torch.float32)
    return readable(typed) if typed.dim() == q.dim() else typed


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


def of_tokens(tokens: Tokens, read: Reader) -> tuple[Array, ...]:
    """Return the arrays of q, k, v, decay, beta, erase and write."""
    q, k, v, alpha, log_alpha, beta, erase, write = tokens
    decay = log_alpha if alpha is None else alpha
    return tuple([read(x) for x in (q, k, v, decay, beta, erase, write)])


def _strengths(call: Call) -> tuple[bool, bool, bool]:
    """Return whether erase and write stand apart, and whether each is of channels."""
    widths = call.widths
    return widths.apart, widths.erase == "channel", widths.write == "channel"


def pack_sequences(
    call: Call,
    arrays: tuple[Array, ...],
    o: Tensor | None,
    final: Tensor | None,
    states: Tensor | None,
    initial: Tensor | None,
    threads: int,
) -> bytes:
    """Return `GdnSequences` of a call; `arrays` are those that `of_tokens` orders."""
    s = call.sizes
    return _SEQUENCES.pack(
        *[number for x in arrays for number in x],
        *array(o),
        *(pointer(initial), pointer(final), pointer(states), pointer(call.cu_seqlens)),
        *(s.N, s.T, s.H, s.HV, s.K, s.V),
        *(call.tokens.alpha is None, call.widths.decay == "channel"),
        *(call.rule.has_erase, call.qk_l2norm, *_strengths(call), CHUNKS_PER_STATE),
        1 if call.is_part else LEAST_TASKS,
        call.scale,
        threads,
    )


def pack_gradients(
    d_o: Tensor, d_final: Tensor, grads: tuple[Tensor | None, ...], d_initial: Tensor | None
) -> bytes:
    """Return `GdnGradients`; `grads` are those that `of_tokens` orders."""
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
    """Return `GdnSteps` of a call; `arrays` are those that `of_tokens` orders, and o.

    With `raw` gates, decay and beta are what the layer projects.
    """
    s = call.sizes
    row, head = state.stride()[:2]
    new_row, new_head = new_state.stride()[:2]
    return _STEPS.pack(
        *[number for x in arrays for number in x],
        *(state.data_ptr(), new_state.data_ptr(), pointer(states), pointer(slots)),
        *(pointer(raw.A_log), pointer(raw.dt_bias)),
        *(row, head, new_row, new_head, TYPES[state.dtype]),
        *(s.B, s.T, s.H, s.HV, s.K, s.V),
        *(call.tokens.alpha is None, call.widths.decay == "channel"),
        *(call.rule.has_erase, call.qk_l2norm),
        raw.beta_factor is not None,
        *_strengths(call),
        raw.kind,
        *(call.scale, raw.beta_factor or 0.0, raw.lower_bound or 0.0, 0.0),
        threads,
    )
