"""Run one token of a layer, all that stands between its projections, in one call of the library."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from gdn_ops.backends.cpp.calls import NOTHING, TYPES, Array
from gdn_ops.backends.cpp.layers import GATES, check, taps, vector, window
from gdn_ops.backends.cpp.library import library, threads

_TOKEN = struct.Struct("=89qffffq")


class Sizes(NamedTuple):
    """Hold the sizes of a layer: H key heads of width K, each with R value heads of width V."""

    H: int
    R: int
    K: int
    V: int


class Parameters(NamedTuple):
    """Hold what a layer computes with, each tensor float32, bfloat16 or float16.

    Attributes:
        A_log: (HV,) log of the rate, or None without a decay.
        dt_bias: (HV,), or (HV K,) with a decay of every key channel; or None for 0.
        weight: (channels, k) of the convolution of q, k and v, or None without one.
        bias: (channels,) or None.
        norm: (V,), the weight of the norm of the output.
        eps: of the norm.
        gate: the activation of the output's gate, "silu" or "sigmoid", or None without one.
        beta_factor: β = beta_factor · sigmoid(b).
        silu: whether q and k are activated; v always is.
        has_erase: whether the rule has an error term.
        qk_l2norm: whether q and k are normalised.
        has_channels: whether every key channel has a decay of its own.
        lower_bound: of log α, below 0, of a bounded gate; or None for the softplus gate.
    """

    A_log: Tensor | None
    dt_bias: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    norm: Tensor
    eps: float
    gate: str | None
    beta_factor: float = 1.0
    silu: bool = True
    has_erase: bool = True
    qk_l2norm: bool = True
    has_channels: bool = False
    lower_bound: float | None = None


class Projections(NamedTuple):
    """Hold what a layer projects a token to, as arrays of heads: see `heads`."""

    q: Array
    k: Array
    v: Array
    z: Array
    a: Array
    b: Array


def heads(x: Tensor | None, of_key: int, of_value: int = 1, first: int = 0) -> Array:
    """Return numbers of heads in a projection as pointer, strides and type.

    Args:
        x: (B, 1, width), contiguous but for its rows; or None for nothing.
        of_key: numbers from one key head to the next.
        of_value: numbers from one value head of a key head to the next.
        first: where the first head begins.
    """
    if x is None:
        return NOTHING
    start = x.data_ptr() + first * x.element_size()
    return (start, x.stride(0), of_key, of_value, TYPES[x.dtype])


def token(
    rows: int,
    sizes: Sizes,
    given: Projections,
    layer: Parameters,
    inputs: tuple[Tensor | None, Tensor | None],
    states: tuple[Tensor, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Compute o = norm(rule(conv(q, k, v), gates)) ⊙ gate(z) of one token, and its states.

    Args:
        rows: B.
        sizes: of the layer.
        given: what the token was projected to.
        layer: its parameters.
        inputs: (B, channels, kept) the inputs of the convolution before the token, latest last, and
            where those behind it are written; may be the same; None without a convolution.
        states: (B, HV, K, V) before and behind the token, of one dtype, rows of a head behind one
            another; may be the same.
        dtype: of o.

    Returns:
        o (B, 1, HV V).
    """
    H, R, K, V = sizes
    past, kept = inputs
    before, behind = states
    o = torch.empty((rows, 1, H * R * V), dtype=dtype, device=before.device)
    packed = _TOKEN.pack(
        *(number for array in given for number in array),
        *(vector(layer.A_log) + vector(layer.dt_bias)),
        *(taps(layer.weight) + vector(layer.bias)),
        *(window(past) + window(kept) + vector(layer.norm)),
        *heads(o, R * V, V),
        *(before.data_ptr(), behind.data_ptr()),
        *(*before.stride()[:2], *behind.stride()[:2], TYPES[before.dtype]),
        *(rows, *sizes),
        1 if layer.weight is None else layer.weight.shape[1],
        0 if past is None else past.shape[2],
        *(layer.silu, layer.has_erase, layer.qk_l2norm, GATES[layer.gate], layer.has_channels),
        *(K**-0.5, layer.beta_factor, layer.eps, layer.lower_bound or 0.0),
        threads(),
    )
    check(library().gdn_token(packed))
    return o
