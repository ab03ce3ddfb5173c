"""Run the kernels around the rule, and plain torch in float64, on the same operands."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gdn_ops.backends.cpp import layers
from gdn_ops.nn.norm import gated_rms_norm
from gdn_ops.nn.windows import advance

ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the largest number of a result, and at least of 1."""


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def exact(x: Tensor | None) -> Tensor | None:
    """Return a leaf with the same numbers in float64."""
    return None if x is None else x.detach().double().requires_grad_()


def assert_close(names: str, actual: list[Tensor], wanted: list[Tensor]) -> None:
    for name, a, b in zip(names.split(), actual, wanted, strict=True):
        size = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
        error = float((a.double() - b.detach()).abs().max()) if b.numel() else 0.0
        assert error <= ROUNDING[a.dtype] * size, (name, error, size)


def convolved(
    call: layers.Convolution, d_y: Tensor, d_final: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return y, the last inputs and the gradients, of the kernels and of plain torch in float64."""
    x, reach = call.x, call.weight.shape[1] - 1
    final = torch.empty(call.sequences, x.shape[2], reach, dtype=x.dtype) if reach else None
    own = [layers.convolution(call, final)]
    given = [exact(t) for t in call[:4]]
    options = {"silu": call.silu, "lengths": call.lengths, "cu_seqlens": call.starts}
    y, last = advance(*given, **options)
    loss = (y * d_y.double()).sum()
    if d_final is not None:
        loss = loss + (last * d_final.double()).sum()
    leaves = [t for t in given if t is not None]
    reference = [y, *([last] if reach else []), *torch.autograd.grad(loss, leaves)]
    gradients = layers.convolution_backward(call, d_y, d_final, needs_x=True)
    own += [t for t in (final, *gradients) if t is not None]
    return own, reference


def names_of(call: layers.Convolution) -> str:
    names = ["y", *(["final"] if call.weight.shape[1] > 1 else []), "d_x", "d_weight"]
    names += [] if call.bias is None else ["d_bias"]
    return " ".join(names + ([] if call.state is None else ["d_state"]))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x,
    "tokens last": lambda x: x.mT.contiguous().mT,
    "gaps": lambda x: torch.stack((x, x), 3)[..., 0],
    "reversed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
}


class ConvolutionCase(NamedTuple):
    """Describe a convolution: its kind is "whole", "lengths" or "packed", cut at `cuts`."""

    rows: int = 2
    tokens: int = 37
    channels: int = 20
    taps: int = 4
    dtype: torch.dtype = torch.float32
    layout: str = "channels last"
    kind: str = "whole"
    silu: bool = True
    has_bias: bool = True
    has_state: bool = True
    has_d_final: bool = True
    cuts: Sequence[int] = (2, 2, 20)

    def operands(self) -> tuple[layers.Convolution, Tensor, Tensor | None]:
        """Return the operands, and the gradients of y and of the last inputs."""
        rows, tokens, channels, taps = self[:4]
        rows = 1 if self.kind == "packed" else rows
        made = functools.partial(normal, dtype=self.dtype)
        ends = sorted(min(cut, tokens) for cut in self.cuts)
        starts = torch.tensor([0, *ends, tokens]) if self.kind == "packed" else None
        past = (rows if starts is None else len(starts) - 1, channels, taps - 1)
        call = layers.Convolution(
            LAYOUTS[self.layout](made(rows, tokens, channels)),
            made(channels, taps, seed=1),
            made(channels, seed=2) if self.has_bias else None,
            made(*past, seed=3) if self.has_state and taps > 1 else None,
            starts,
            torch.arange(rows) * 7 % (tokens + 1) if self.kind == "lengths" else None,
            self.silu,
        )
        d_final = made(*past, seed=4) if self.has_d_final and taps > 1 else None
        return call, LAYOUTS[self.layout](made(rows, tokens, channels, seed=5)), d_final

    def check(self) -> None:
        """Compare the kernels with plain torch."""
        call, d_y, d_final = self.operands()
        assert_close(names_of(call), *convolved(call, d_y, d_final))


def normed(
    x: Tensor, weight: Tensor, z: Tensor | None, d_y: Tensor, gate: str | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return y and the gradients of a norm, of the kernels and of plain torch in float64."""
    own = [layers.norm(x, weight, z, 0.01, gate)]
    own += [t for t in layers.norm_backward(x, weight, z, 0.01, gate, d_y) if t is not None]
    given = [exact(t) for t in (x, weight, z)]
    y = gated_rms_norm(*given, eps=0.01, activation=gate or "silu")
    leaves = [t for t in given if t is not None]
    return own, [y, *torch.autograd.grad(y, leaves, d_y.double())]


class NormCase(NamedTuple):
    """Describe a norm of rows, gated by "silu", by "sigmoid" or not."""

    shape: Sequence[int] = (2, 5, 3)
    width: int = 20
    dtype: torch.dtype = torch.float32
    gate: str | None = "silu"
    is_transposed: bool = False

    def check(self) -> None:
        """Compare the kernels with plain torch."""
        width, dtype = self.width, self.dtype
        x, z, d_y = (normal(*self.shape, width, seed=seed, dtype=dtype) for seed in (0, 1, 2))
        if self.is_transposed:
            x, z, d_y = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, z, d_y))
        weight = normal(width, seed=3, dtype=dtype)
        names = "y d_x d_weight" + (" d_z" if self.gate else "")
        assert_close(names, *normed(x, weight, z if self.gate else None, d_y, self.gate))
