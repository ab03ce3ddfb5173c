"""Compute a causal depthwise convolution along T, in blocks of tokens that stay in cache.

    p_t = Σ_j w_j ⊙ x_{t−k+1+j} + bias,  y_t = activation(p_t),  j < k

Tokens lie one after the other, (B, T, D), as projections write them and the op reads them. A
convolution of torch wants T last: it transposes, and passes over memory at every step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from gdn_ops.kernel_support.host_memory import empty
from gdn_ops.nn import kernels
from gdn_ops.nn.blocks import blocks, differentiable_gradients, runs_in_blocks, wide


def causal_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    silu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Convolve every channel along T; tokens before the first are zero.

    Args:
        x: (B, T, D), any float dtype; any strides.
        weight: (D, k), its last column being of the token itself.
        bias: (D,) or None.
        silu: whether y = silu(p), else y = p.
        backend: of the rule: the C++ kernels run beside "cpp", and beside "auto" where they can.

    Returns:
        (B, T, D), contiguous, in the dtype of x. It is computed in float32 at least.
    """
    if kernels.may_run(backend, x, weight, bias):

        def plain(x: Tensor, weight: Tensor, bias: Tensor | None, _: None) -> tuple[Tensor, None]:
            return _whole(x, weight, bias, silu), None

        return kernels.convolve(x, weight, bias, None, plain, silu=silu, keeps=False)[0]
    if runs_in_blocks(x):
        y: Tensor = _Blocked.apply(x, weight, bias, silu)  # type: ignore[no-untyped-call]
        return y
    return _whole(x, weight, bias, silu)


def _whole(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Convolve all tokens at once, in operations that autograd and compilers see."""
    window = functional.pad(x.to(wide(x.dtype)), (0, 0, weight.shape[1] - 1, 0))
    return convolved_window(window, weight, bias, silu=silu).to(x.dtype)


def convolved_window(window: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool) -> Tensor:
    """Convolve (B, k − 1 + T, D) to (B, T, D) in plain arithmetic, in the dtype of the window."""
    tokens = window.shape[1] - weight.shape[1] + 1
    w = weight.to(window.dtype)
    p = window[:, :tokens] * w[:, 0]
    for j in range(1, weight.shape[1]):
        p = torch.addcmul(p, window[:, j : j + tokens], w[:, j])
    if bias is not None:
        p = p + bias.to(p.dtype)
    return functional.silu(p) if silu else p


class _Operands:
    """Hold x, read by windows, and the parameters by tap, in the dtype of the computation."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.x, self.dtype = x, wide(x.dtype)
        self.taps = weight.t().to(self.dtype).contiguous()
        self.bias = None if bias is None else bias.to(self.dtype)
        self.reach = len(self.taps) - 1

    def window(self, start: int, stop: int) -> Tensor:
        """Return the tokens that a block reads, the last `stop - start` being its own."""
        part = self.x[:, max(0, start - self.reach) : stop]
        return part.to(self.dtype).contiguous() if part.stride(-1) != 1 else part.to(self.dtype)

    def pairs(self, window: Tensor, block: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (tap j, the tokens that it reads, the part of the block that they reach)."""
        own, before = block.shape[1], window.shape[1] - block.shape[1]
        for j in range(self.reach, -1, -1):
            shift = self.reach - j
            missing = min(own, max(0, shift - before))
            if missing < own:
                first = before - shift + missing
                yield j, window[:, first : before + own - shift], block[:, missing:]

    def convolve(self, window: Tensor, out: Tensor) -> None:
        """Write p of a block, the convolution before its activation, to `out`."""
        for j, tokens, part in self.pairs(window, out):
            if j == self.reach:
                torch.mul(tokens, self.taps[j], out=part)
            else:
                part.addcmul_(tokens, self.taps[j])
        if self.bias is not None:
            out += self.bias


class _Blocked(torch.autograd.Function):
    """Convolve by blocks; keep only the operands for the backward."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)  # type: ignore[arg-type]
        ctx.silu = silu  # type: ignore[attr-defined]
        operands = _Operands(x, weight, bias)
        y = empty(x.shape, x.dtype, x.device)
        for start, stop in blocks(x.shape[1], x.shape[0] * x.shape[2]):
            part = y[:, start:stop]
            p = part if x.dtype == operands.dtype else torch.empty_like(part, dtype=operands.dtype)
            operands.convolve(operands.window(start, stop), p)
            if silu:
                functional.silu(p, inplace=True)
            if p is not part:
                part.copy_(p)
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            whole = functools.partial(_whole, silu=ctx.silu)
            return (*differentiable_gradients(whole, (x, weight, bias), needed, (d_y,)), None)
        operands = _Operands(x, weight, bias)
        dtype, reach = operands.dtype, operands.reach
        d_x = empty(x.shape, x.dtype, x.device) if needed[0] else None
        d_taps = torch.zeros_like(operands.taps)
        d_bias = torch.zeros_like(operands.taps[0])
        # d_p of the tokens after a block.
        after = d_y.new_zeros((x.shape[0], reach, x.shape[2]), dtype=dtype)
        for start, stop in reversed([*blocks(x.shape[1], x.shape[0] * x.shape[2])]):
            window = operands.window(start, stop)
            d_p = d_y[:, start:stop].to(dtype)
            if ctx.silu:
                p = torch.empty(d_p.shape, dtype=dtype, device=d_p.device)
                operands.convolve(window, p)
                d_p = torch.ops.aten.silu_backward(d_p, p)
            if needed[1]:
                for j, tokens, part in operands.pairs(window, d_p):
                    d_taps[j] += (part * tokens).sum((0, 1))
            if needed[2]:
                d_bias += d_p.sum((0, 1))
            if d_x is not None:
                own, target = stop - start, d_x[:, start:stop]
                d_p = torch.cat([d_p, after], 1)
                exact = target.dtype == dtype
                d_block = torch.mul(
                    d_p[:, :own], operands.taps[reach], out=target if exact else None
                )
                for j in range(reach):
                    shift = reach - j
                    d_block.addcmul_(d_p[:, shift : shift + own], operands.taps[j])
                if not exact:
                    target.copy_(d_block)
                after = d_p[:, :reach]
        d_weight = d_taps.t().to(weight.dtype) if needed[1] else None
        return d_x, d_weight, d_bias.to(bias.dtype) if needed[2] else None, None
