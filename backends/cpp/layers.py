"""Run the kernels of what stands around the rule in a layer, on plain CPU tensors without autograd.

Every tensor is float32, bfloat16 or float16, each its own, with any strides but where a docstring
says otherwise, and holds at least one number. Arithmetic is float32; results are rounded once.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from gdn_ops.backends.cpp.calls import NOTHING, TYPES, Array, array, pointer, readable
from gdn_ops.backends.cpp.library import library, threads
from gdn_ops.kernel_support.host_memory import empty

GATES = {None: 0, "silu": 1, "sigmoid": 2}
"""Numbers of what gates a norm, as in `GdnGate`."""

PARTIALS = 256
"""Parts of a sum over rows, as in `src/interface_layers.h`."""

_CONVOLUTION = struct.Struct("=40q")
_CONVOLUTION_GRADIENTS = struct.Struct("=22q")
_NORM = struct.Struct("=25qfi")
_NORM_GRADIENTS = struct.Struct("=17q")


class Convolution(NamedTuple):
    """Hold the operands of a short convolution.

    Attributes:
        x: (B, T, D).
        weight: (D, taps), its last column being of the token itself.
        bias: (D,) or None.
        state: (N, D, kept) the inputs before every sequence, latest last, kept >= taps - 1; or
            None for zeros.
        starts: (N + 1,) int64, contiguous: boundaries of sequences packed into one row; or None.
        lengths: (B,) int64, contiguous: tokens of each row before its padding; or None.
        silu: whether y = silu(p), else y = p.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    state: Tensor | None
    starts: Tensor | None
    lengths: Tensor | None
    silu: bool

    @property
    def sequences(self) -> int:
        """Return N."""
        return self.x.shape[0] if self.starts is None else self.starts.shape[0] - 1

    def pack(self, y: Tensor | None, final: Tensor | None) -> bytes:
        """Return `GdnConvolution`, with its results."""
        x, weight, bias, state, starts, lengths, silu = self
        rows, tokens, channels = x.shape
        reach = weight.shape[1] - 1
        stored = state if final is None else final
        return _CONVOLUTION.pack(
            *(*array(x), *array(y)),
            *(*taps(weight), *vector(bias)),
            *(*window(state), *window(final)),
            *(pointer(starts), pointer(lengths)),
            *(rows, self.sequences, tokens, channels),
            *(reach + 1, reach if stored is None else stored.shape[2], silu, threads()),
        )


def vector(x: Tensor | None) -> Array:
    """Return a tensor of one axis, of channels, as pointer, strides and type."""
    if x is None:
        return NOTHING
    return (x.data_ptr(), 0, 0, x.stride(0), TYPES[x.dtype])


def taps(x: Tensor | None) -> Array:
    """Return the weight of a convolution (D, taps) as pointer, strides and type."""
    if x is None:
        return NOTHING
    per_channel, per_tap = x.stride()
    return (x.data_ptr(), 0, per_tap, per_channel, TYPES[x.dtype])


def window(x: Tensor | None) -> Array:
    """Return inputs (N, D, kept) as pointer, strides and type."""
    if x is None:
        return NOTHING
    row, channel, token = x.stride()
    return (x.data_ptr(), row, token, channel, TYPES[x.dtype])


def convolution(operands: Convolution, final: Tensor | None = None) -> Tensor:
    """Convolve every channel; y_t = activation(sum_j w_j x_{t - taps + 1 + j} + bias).

    Args:
        operands: of the convolution.
        final: (N, D, kept), written: the last inputs of every sequence, or None. It may be the
            state where T is 1.

    Returns:
        y (B, T, D), contiguous, in the dtype of x.
    """
    x = operands.x
    y = empty(x.shape, x.dtype, x.device)
    check(library().gdn_convolution(operands.pack(y, final)))
    return y


class ConvolutionGradients(NamedTuple):
    """Hold the gradients of a convolution, each like its operand; None for those not needed."""

    x: Tensor | None
    weight: Tensor
    bias: Tensor | None
    state: Tensor | None


def convolution_backward(
    operands: Convolution, d_y: Tensor, d_final: Tensor | None, *, needs_x: bool
) -> ConvolutionGradients:
    """Return the gradients of `convolution`; its state is (N, D, taps - 1).

    Args:
        operands: of the convolution.
        d_y: (B, T, D).
        d_final: (N, D, taps - 1), or None for zeros.
        needs_x: whether that of x is formed.
    """
    x, weight, bias, state = operands[:4]
    d_x = empty(x.shape, x.dtype, x.device) if needs_x else None
    d_state = None if state is None else torch.empty_like(state)
    d_weight, d_bias = (
        torch.empty(shape, dtype=torch.float32, device=x.device)
        for shape in (weight.shape, weight.shape[:1])
    )
    gradients = _CONVOLUTION_GRADIENTS.pack(
        *(*array(d_y), *window(d_final), *array(d_x), *window(d_state)),
        *(d_weight.data_ptr(), d_bias.data_ptr()),
    )
    call = operands.pack(None, d_final)
    check(library().gdn_convolution_backward(call, gradients))
    own_bias = None if bias is None else d_bias.to(bias.dtype)
    return ConvolutionGradients(d_x, d_weight.to(weight.dtype), own_bias, d_state)


def norm(x: Tensor, weight: Tensor, z: Tensor | None, eps: float, gate: str | None) -> Tensor:
    """Return w x / sqrt(mean(x^2) + eps) gate(z).

    Args:
        x: (..., width).
        weight: (width,).
        z: like x, or None where `gate` is.
        eps: added to the mean of squares.
        gate: a key of `GATES`.

    Returns:
        Like x, contiguous.
    """
    y = empty(x.shape, x.dtype, x.device)
    operands = (_readable(x), None if z is None else _readable(z), y)
    check(library().gdn_norm(_pack_norm(operands, weight, eps, gate)))
    return y


def norm_backward(
    x: Tensor, weight: Tensor, z: Tensor | None, eps: float, gate: str | None, d_y: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of x, weight and z, each like it."""
    d_x = empty(x.shape, x.dtype, x.device)
    d_z = None if z is None else empty(z.shape, z.dtype, z.device)
    width = weight.shape[0]
    partials, d_weight = (
        torch.empty(shape, dtype=torch.float32, device=x.device)
        for shape in ((PARTIALS, width), (width,))
    )
    operands = (_readable(x), None if z is None else _readable(z), None)
    call, d_y = _pack_norm(operands, weight, eps, gate), _readable(d_y)
    gradients = _NORM_GRADIENTS.pack(
        *(*_rows(d_y), *_rows(d_x), *_rows(d_z)), partials.data_ptr(), d_weight.data_ptr()
    )
    check(library().gdn_norm_backward(call, gradients))
    return d_x, d_weight.to(weight.dtype), d_z


def _pack_norm(
    operands: tuple[Tensor, Tensor | None, Tensor | None],
    weight: Tensor,
    eps: float,
    gate: str | None,
) -> bytes:
    """Return `GdnNorm`; the operands are x, z and y."""
    shape = operands[0].shape
    sizes = (*(1,) * (4 - len(shape)), *shape)
    kind = GATES[gate if operands[1] is not None else None]
    arrays = [number for x in operands for number in _rows(x)]
    return _NORM.pack(*arrays, *vector(weight), *sizes, kind, eps, threads())


def _readable(x: Tensor) -> Tensor:
    """Return a tensor of at most four axes, its rows contiguous."""
    x = readable(x)
    return x if x.dim() <= 4 else x.flatten(0, -4)


def _rows(x: Tensor | None) -> Array:
    """Return rows (..., width) of at most four axes as pointer, strides and type."""
    if x is None:
        return NOTHING
    strides = (0, 0, 0, *x.stride())
    return (x.data_ptr(), strides[-4], strides[-3], strides[-2], TYPES[x.dtype])


def check(status: int) -> None:
    """Check what a kernel returns.

    Raises:
        MemoryError: a thread found no memory to work in.
    """
    if status:
        raise MemoryError("the C++ kernels: no memory for a thread to work in")
