"""Apply RMS normalisation per head, followed by the output gate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gdn_ops.call.scalars import as_python
from gdn_ops.kernel_support.host_memory import empty
from gdn_ops.nn import kernels
from gdn_ops.nn.blocks import blocks, differentiable_gradients, runs_in_blocks, wide
from gdn_ops.nn.shares import share
from gdn_ops.nn.values import (
    check_counts,
    check_device,
    check_floats,
    check_made,
    check_numbers,
)
from gdn_ops.spec.errors import SpecError

GATE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
}


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    *,
    eps: float,
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """Return w ⊙ x / sqrt(mean(x²) + eps) ⊙ activation(z), computed in float32 at least.

    Args:
        x: (..., width), any float dtype.
        weight: (width,).
        z: like x, or None for no gate.
        eps: added to the mean of squares.
        activation: of z, "silu" or "sigmoid".
        backend: of the rule: the C++ kernels run beside "cpp", and beside "auto" where they can.

    Returns:
        Like x.
    """
    if kernels.may_run(backend, x, weight, z) and (z is None or z.shape == x.shape):
        whole = functools.partial(_whole, eps=eps, activation=activation)
        return kernels.gated_norm(x, weight, z, whole, eps=eps, gate=activation)
    if z is not None and runs_in_blocks(x) and z.shape == x.shape:
        y: Tensor = _Blocked.apply(x, weight, z, eps, activation)  # type: ignore[no-untyped-call]
        return y
    return _whole(x, weight, z, eps=eps, activation=activation)


def _whole(x: Tensor, weight: Tensor, z: Tensor | None, *, eps: float, activation: str) -> Tensor:
    """Normalise and gate all rows at once, in operations that autograd and compilers see."""
    y = x.to(wide(x.dtype))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    y = y * weight.to(y.dtype)
    if z is not None:
        y = y * GATE_ACTIVATIONS[activation](z.to(y.dtype))
    return y.to(x.dtype)


class _Rows:
    """Hold the operands as rows, and read blocks of them in the dtype of the computation."""

    def __init__(self, x: Tensor, weight: Tensor, z: Tensor) -> None:
        self.dtype, width = wide(x.dtype), x.shape[-1]
        self.x, self.z = x.reshape(-1, width), z.reshape(-1, width)
        self.weight = weight.to(self.dtype)

    def normalised(self, start: int, stop: int, eps: float) -> tuple[Tensor, Tensor]:
        """Return x / sqrt(mean(x²) + eps) and 1 / sqrt(...) of a block."""
        x = self.x[start:stop].to(self.dtype)
        scale = torch.rsqrt_(x.square().mean(-1, keepdim=True).add_(eps))
        return x * scale, scale


class _Blocked(torch.autograd.Function):
    """Normalise and gate by blocks; keep only the operands for the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, z: Tensor, eps: float, activation: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight, z)
        ctx.eps, ctx.activation = eps, activation
        rows = _Rows(x, weight, z)
        y = empty(x.shape, x.dtype, x.device)
        flat = y.view(rows.x.shape)
        for start, stop in blocks(*rows.x.shape):
            n, _ = rows.normalised(start, stop, eps)
            gate = GATE_ACTIVATIONS[activation](rows.z[start:stop].to(rows.dtype))
            _product(n.mul_(rows.weight), gate, flat[start:stop])
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, z = ctx.saved_tensors
        if torch.is_grad_enabled():
            whole = functools.partial(_whole, eps=ctx.eps, activation=ctx.activation)
            needed = ctx.needs_input_grad[:3]
            grads = differentiable_gradients(whole, (x, weight, z), needed, (d_y,))
            return (*grads, None, None)
        rows = _Rows(x, weight, z)
        d_rows = d_y.reshape(rows.x.shape)
        d_x, d_z = (empty(t.shape, t.dtype, t.device) for t in (x, z))
        d_weight = torch.zeros_like(rows.weight)
        for start, stop in blocks(*rows.x.shape):
            n, scale = rows.normalised(start, stop, ctx.eps)
            d = d_rows[start:stop].to(rows.dtype)
            gate, d_gate = _gate(rows.z[start:stop].to(rows.dtype), d * n, ctx.activation)
            d_weight += (d * n).mul_(gate).sum(0)
            _product(d_gate, rows.weight, d_z.view(rows.x.shape)[start:stop])
            d_n = (d * gate).mul_(rows.weight)
            d_n -= n * (d_n * n).mean(-1, keepdim=True)
            _product(d_n, scale, d_x.view(rows.x.shape)[start:stop])
        return d_x, d_weight.to(weight.dtype), d_z, None, None


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write the product of a and b to `out`, in the dtype of `out`."""
    if out.dtype == a.dtype:
        torch.mul(a, b, out=out)
    else:
        out.copy_(a * b)


def _gate(z: Tensor, d: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return activation(z), and d times its derivative."""
    if activation == "silu":
        return functional.silu(z), torch.ops.aten.silu_backward(d, z)
    gate = torch.sigmoid(z)
    return gate, torch.ops.aten.sigmoid_backward(d, gate)


class GatedRMSNorm(nn.Module):
    """Apply y = w ⊙ x / sqrt(mean(x²) + eps) ⊙ activation(z), computed in float32 at least.

    Args:
        width: of the last axis, which is normalised.
        eps: added to the mean of squares.
        activation: of the gate z, "silu" or "sigmoid".
        backend: of the rule beside it: the C++ kernels run beside "cpp", and beside "auto" where
            they can.
        device, dtype: of the weight.

    Raises:
        SpecError: an option has a wrong value.
    """

    def __init__(
        self,
        width: int,
        eps: float = 1e-5,
        activation: str = "silu",
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_counts("GatedRMSNorm", width=width)
        check_numbers("GatedRMSNorm", eps=eps)
        check_made("GatedRMSNorm", device, dtype)
        if activation not in tuple(GATE_ACTIVATIONS):
            raise SpecError(
                f"GatedRMSNorm: activation is {activation!r}, should be one of "
                f"{', '.join(GATE_ACTIVATIONS)}"
            )
        self.eps = as_python(eps)
        self.activation, self.backend = activation, backend
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the weight with ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalise x, then gate it with z.

        Args:
            x: (..., width), any float dtype.
            z: (..., width), as x, or None for no gate.

        Returns:
            Like x.

        Raises:
            SpecError: x or z is no float, its last axis has another width, or they differ in
                shape.
        """
        width = self.weight.shape[0]
        for name, tensor in (("x", x), *([] if z is None else [("z", z)])):
            check_floats("GatedRMSNorm", **{name: tensor})
            if tensor.shape[-1:] != (width,):
                raise SpecError(
                    f"GatedRMSNorm: {name} has shape {tuple(tensor.shape)}, should be "
                    f"(..., width) with width = {width}"
                )
            check_device("GatedRMSNorm", name, tensor, self.weight.device, "weight")
        if z is not None and z.shape != x.shape:
            raise SpecError(
                f"GatedRMSNorm: z has shape {tuple(z.shape)}, should be that of x, {tuple(x.shape)}"
            )
        options = {"activation": self.activation, "backend": self.backend}
        return gated_rms_norm(x, share(self.weight, x), z, eps=self.eps, **options)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, activation={self.activation!r}"
