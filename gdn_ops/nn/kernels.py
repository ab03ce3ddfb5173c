"""Decide in one place who computes what stands around the rule, and run the C++ kernels of it.

The kernels take plain CPU tensors in eager mode. Everything else, and derivatives of derivatives,
goes through the operations of torch, which compute the same: graphs, transforms and other backends
see those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from gdn_ops.backends.cpp import layers
from gdn_ops.backends.cpp.calls import TYPES
from gdn_ops.backends.cpp.library import missing
from gdn_ops.call import transforms
from gdn_ops.dispatch import registry
from gdn_ops.nn.blocks import differentiable_gradients

BACKENDS = ("auto", "cpp")
"""Backends of the rule beside which the kernels run."""

Plain = Callable[..., Any]
"""Compute the results of a kernel from its operands by operations of torch."""


def may_run(backend: str, *tensors: Tensor | None) -> bool:
    """Return whether the kernels compute a call.

    Args:
        backend: that of the rule.
        tensors: all floats of the call; None for one that it does not have.

    Raises:
        SpecError: no backend has that name.
    """
    # First, so that a graph is made of nothing else.
    if torch.compiler.is_compiling():
        return False
    name = registry.resolve(backend)
    if name not in BACKENDS:
        registry.get_backend(name)  # an unknown one is an error
        return False
    return (
        missing() is None
        and not transforms.are_active()
        and not transforms.modes()
        and torch._C._get_tracing_state() is None
        and all(x is None or _is_readable(x) for x in tensors)
    )


def _is_readable(x: Tensor) -> bool:
    """Return whether the memory of a tensor holds its numbers, in a type that the kernels know."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.dtype in TYPES
        and x.is_cpu
        and x.layout is torch.strided
        and not x.is_nested
        and not x.is_neg()
        and not x._is_zerotensor()
        and x.numel() > 0
    )


def tells(x: Tensor) -> bool:
    """Return whether lengths or boundaries are plain CPU tensors, whose values are checked."""
    return type(x) is Tensor and x.is_cpu


def is_bare(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Return whether a module is of a class itself, and a call of it nothing but its forward."""
    return (
        type(module) is cls
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not _has_any_global_hook()
    )


def needs_grad(*tensors: Tensor | None) -> bool:
    """Return whether autograd records a call."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    plain: Plain,
    *,
    silu: bool,
    keeps: bool = True,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run a short convolution that `may_run`.

    Args:
        x: (B, T, D).
        weight: (D, k).
        bias: (D,) or None.
        state: (N, D, k - 1) or None for zeros.
        plain: computes (y, final) from x, weight, bias and state.
        silu: whether y is activated.
        keeps: whether the last inputs are returned.
        starts: (N + 1,) boundaries of packed sequences, or None.
        lengths: (B,) tokens of each row before its padding, or None.

    Returns:
        y like x, contiguous, and the last inputs (N, D, k - 1) of every sequence in the dtype of x,
        or None.
    """
    starts, lengths = (
        None if y is None else y.to(torch.int64).contiguous() for y in (starts, lengths)
    )
    operands = layers.Convolution(x, weight, bias, state, starts, lengths, silu)
    if needs_grad(x, weight, bias, state):
        results: tuple[Tensor, Tensor | None]
        results = _Convolution.apply(plain, keeps, starts, lengths, silu, x, weight, bias, state)  # type: ignore[no-untyped-call]
        return results
    return _convolve(operands, keeps)


def _convolve(operands: layers.Convolution, keeps: bool) -> tuple[Tensor, Tensor | None]:
    final = None
    if keeps:
        x, reach = operands.x, operands.weight.shape[1] - 1
        shape = (operands.sequences, x.shape[2], reach)
        final = torch.empty(shape, dtype=x.dtype, device=x.device)
    # One tap keeps nothing, and an empty array has no memory.
    written = None if final is None or not final.numel() else final
    return layers.convolution(operands, written), final


class _Convolution(torch.autograd.Function):
    """Convolve by the kernels; keep only the operands for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        plain: Plain,
        keeps: bool,
        starts: Tensor | None,
        lengths: Tensor | None,
        silu: bool,
        *operands: Any,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.plain, ctx.options = plain, (starts, lengths, silu)
        ctx.save_for_backward(*operands)
        return _convolve(layers.Convolution(*operands, *ctx.options), keeps)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor | None, d_final: Tensor | None) -> tuple[Any, ...]:
        operands, needed = ctx.saved_tensors, ctx.needs_input_grad[5:]
        d_final = None if d_final is None or not d_final.numel() else d_final
        nothing = (None, None, None, None, None)
        if _is_plain_backward(d_y, d_final):
            grads = differentiable_gradients(ctx.plain, operands, needed, (d_y, d_final))
            return (*nothing, *grads)
        d_y = torch.zeros_like(operands[0]) if d_y is None else d_y
        call = layers.Convolution(*operands, *ctx.options)
        own = layers.convolution_backward(call, d_y, d_final, needs_x=needed[0])
        return (*nothing, *_needed(own, needed))


def gated_norm(
    x: Tensor, weight: Tensor, z: Tensor | None, plain: Plain, *, eps: float, gate: str
) -> Tensor:
    """Run a gated norm that `may_run`.

    Args:
        x: (..., width).
        weight: (width,).
        z: like x, or None for no gate.
        plain: computes y from x, weight and z.
        eps: added to the mean of squares.
        gate: the activation of z, "silu" or "sigmoid".

    Returns:
        Like x, contiguous.
    """
    if needs_grad(x, weight, z):
        y: Tensor = _Norm.apply(plain, eps, gate, x, weight, z)  # type: ignore[no-untyped-call]
        return y
    return layers.norm(x, weight, z, eps, gate)


class _Norm(torch.autograd.Function):
    """Normalise and gate by the kernels; keep only the operands for the backward."""

    @staticmethod
    def forward(
        ctx: Any, plain: Plain, eps: float, gate: str, x: Tensor, weight: Tensor, z: Tensor | None
    ) -> Tensor:
        ctx.plain, ctx.eps, ctx.gate = plain, eps, gate
        ctx.save_for_backward(x, weight, z)
        return layers.norm(x, weight, z, eps, gate)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Any, ...]:
        (x, weight, z), needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        if _is_plain_backward(d_y):
            grads = differentiable_gradients(ctx.plain, (x, weight, z), needed, (d_y,))
        else:
            own = layers.norm_backward(x, weight, z, ctx.eps, ctx.gate, d_y)
            grads = _needed(own, needed)
        return (None, None, None, *grads)


def _needed(grads: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """Return gradients, None for those not needed."""
    return [g if is_needed else None for g, is_needed in zip(grads, needed, strict=True)]


def _is_plain_backward(*grads: Tensor | None) -> bool:
    """Return whether a backward is one of plain operations: differentiable, or of many rows."""
    return torch.is_grad_enabled() or any(
        g is not None and (transforms.is_grads_batched(g) or not may_run("cpp", g)) for g in grads
    )
