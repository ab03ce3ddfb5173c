"""Draw the operands of a row of `bench gpu`: the same values for every contender.

Sequences are drawn as FlashQLA's benchmark draws them, so that its published times are of the
same work: q and k of unit length, log gates of logsigmoid / 16, a quarter of the heads without
decay, a random initial state, gradients of both results. The gates of a step are computed from
16-bit raw gates, the only form that some step kernels take, so that all decay alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gdn_ops.bench.gpu.rows import GpuRow


class RawGates(NamedTuple):
    """Hold a layer's raw gates: log alpha = -exp(A_log) softplus(a + dt_bias).

    Attributes:
        A_log, dt_bias: (HV,) float32.
        a, b: (B, HV) in the dtype of q; beta = sigmoid(b).
    """

    A_log: Tensor
    dt_bias: Tensor
    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Problem:
    """Hold the operands of one row.

    Attributes:
        row: the row.
        q, k: (B, T, H, K), or (B, H, K) for a step.
        v: (B, T, HV, V), or (B, HV, V).
        log_alpha, beta: (B, T, HV), or (B, HV), float32.
        state: (N, HV, K, V) initial state; for a step in the dtype of the row.
        cu_seqlens: (N+1,) int64, or None.
        raw: the raw gates of a step, else None.
    """

    row: GpuRow
    q: Tensor
    k: Tensor
    v: Tensor
    log_alpha: Tensor
    beta: Tensor
    state: Tensor
    cu_seqlens: Tensor | None = None
    raw: RawGates | None = None

    def operands(self) -> tuple[Tensor, ...]:
        """Return the differentiable tensors, in the order of GRADIENTS."""
        return self.q, self.k, self.v, self.log_alpha, self.beta, self.state

    def on(self, operands: tuple[Tensor, ...]) -> Problem:
        """Return a copy of the problem with other operands."""
        names = ("q", "k", "v", "log_alpha", "beta", "state")
        return replace(self, **dict(zip(names, operands, strict=True)))  # type: ignore[arg-type]

    def with_grad(self) -> Problem:
        """Return a copy of the problem whose operands are leaves that need gradients."""
        return self.on(tuple(x.detach().requires_grad_() for x in self.operands()))


GRADIENTS = ("dq", "dk", "dv", "dlog_alpha", "dbeta", "dstate")


class _Drawing:
    def __init__(self, device: str, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)


def make_problem(row: GpuRow, device: str, seed: int = 0) -> Problem:
    """Draw the operands of a row on a device."""
    s, draw, dtype = row.sizes, _Drawing(device, seed), getattr(torch, row.dtype)
    tokens = (s.B,) if row.what == "step" else (s.B, s.T)
    q, k = (functional.normalize(draw.normal(*tokens, s.H, s.K), dim=-1) for _ in "qk")
    v, state = draw.normal(*tokens, s.HV, s.V), draw.normal(s.N, s.HV, s.K, s.V)
    if row.what == "step":
        raw = _raw_gates(draw, s.B, s.HV, dtype)
        log_alpha, beta = _gates_of(raw)
        narrow = state.to(getattr(torch, row.state_dtype))
        return Problem(row, q.to(dtype), k.to(dtype), v.to(dtype), log_alpha, beta, narrow, raw=raw)
    log_alpha = functional.logsigmoid(draw.normal(*tokens, s.HV)) / 16
    log_alpha[..., ::4] = 0
    beta = torch.sigmoid(draw.normal(*tokens, s.HV))
    cu_seqlens = None
    if row.packed:
        cu_seqlens = torch.tensor((0, *accumulate(row.lengths)), device=device)
    return Problem(row, q.to(dtype), k.to(dtype), v.to(dtype), log_alpha, beta, state, cu_seqlens)


def _raw_gates(draw: _Drawing, batch: int, heads: int, dtype: torch.dtype) -> RawGates:
    """Draw raw gates whose decays are mild."""
    A_log = 0.1 * draw.normal(heads) - 3
    a, b = (draw.normal(batch, heads).to(dtype) for _ in "ab")
    return RawGates(A_log, 0.1 * draw.normal(heads), a, b)


def _gates_of(raw: RawGates) -> tuple[Tensor, Tensor]:
    """Return log alpha and beta of raw gates in float32, computed in float64."""
    inner = functional.softplus(raw.a.double() + raw.dt_bias.double())
    log_alpha = -raw.A_log.double().exp() * inner
    return log_alpha.float(), torch.sigmoid(raw.b.double()).float()


def make_cotangents(p: Problem, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Draw the gradients of o and of the final state."""
    draw = _Drawing(str(p.v.device), seed)
    return draw.normal(*p.v.shape).to(p.v.dtype), draw.normal(*p.state.shape) / 8
