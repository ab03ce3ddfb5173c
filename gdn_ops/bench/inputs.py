"""Draw the operands of benchmarks: the same values for everything that is compared.

`make_inputs` draws a named case. `make_kernel_inputs` draws sequences as FlashQLA's benchmark draws
them, so that its published times are of the same work: q and k of unit length, log gates of
logsigmoid / 16, a quarter of the heads without decay, a random initial state, gradients of both
results. The gates of a step are computed from 16-bit raw gates, the only form that some step
kernels take, so that all decay alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gdn_ops.spec.cases import KDA_CASES, PACKED_CASES, PROMPT_CASES
from gdn_ops.spec.errors import SpecError
from gdn_ops.spec.language import Case, Sizes
from gdn_ops.spec.names import unknown
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP

OPERANDS = ("q", "k", "v", "log_alpha", "beta", "state")
"""Names of the differentiable operands."""


@dataclass(frozen=True)
class Setting:
    """Hold the setting of a run: dtype of q, k and v, torch device, rounds of long measurements."""

    dtype: str = "float32"
    device: str = "cpu"
    repeats: int = 5

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the dtype as a torch.dtype."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]


class RawGates(NamedTuple):
    """Hold a layer's raw gates: log alpha = -exp(A_log) softplus(a + dt_bias).

    Attributes:
        A_log, dt_bias: (HV,) float32; dt_bias (HV, K) where every key channel decays.
        a, b: (B, HV) in the dtype of q, or a (B, HV, K); beta = sigmoid(b).
    """

    A_log: Tensor
    dt_bias: Tensor
    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Inputs:
    """Hold the operands of one call of rule gated_delta.

    Attributes:
        q, k: (B, T, H, K), or (B, H, K) for a step; the rows of k have length one.
        v: (B, T, HV, V), or (B, HV, V).
        log_alpha: (B, T, HV), or (B, HV), float32, the natural logarithm of the decay; with a last
            axis K where every key channel has its own.
        beta: (B, T, HV), or (B, HV), float32, in (0, 1).
        state: (N, HV, K, V), initial state, or None.
        cu_seqlens: (N+1,) int64, or None.
        raw: the raw gates of a step, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_alpha: Tensor
    beta: Tensor
    state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    raw: RawGates | None = None

    @property
    def has_channels(self) -> bool:
        """Return whether every key channel has a decay of its own."""
        return self.log_alpha.dim() > self.beta.dim()

    def operands(self) -> tuple[Tensor, ...]:
        """Return the differentiable tensors, in the order of OPERANDS."""
        operands = (getattr(self, name) for name in OPERANDS)
        return tuple(x for x in operands if x is not None)

    def named(self) -> dict[str, Tensor]:
        """Return the differentiable tensors by the names of a step's arguments."""
        return dict(zip(OPERANDS, self.operands(), strict=False))

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Return a copy whose differentiable tensors are changed by a function."""
        changed: dict[str, Any] = {name: change(x) for name, x in self.named().items()}
        return replace(self, **changed)

    def double(self) -> Inputs:
        """Return a copy in float64."""
        return self.map(Tensor.double)

    def with_grad(self) -> Inputs:
        """Return a copy whose operands are leaves that need gradients."""
        return self.map(lambda x: x.detach().requires_grad_())

    def as_sequence(self) -> Inputs:
        """Return the operands of a step as those of sequences of one token."""
        return replace(self.map(lambda x: x.unsqueeze(1)), state=self.state)

    def select(self, rows: slice, tokens: slice, keys: slice, values: slice) -> Inputs:
        """Return tokens of sequences of some heads, as one batch without a state.

        Args:
            rows, tokens: of the first two axes.
            keys, values: key heads, and their value heads.
        """
        q, k = (x[rows, tokens, keys] for x in (self.q, self.k))
        v, log_alpha, beta = (x[rows, tokens, values] for x in self.operands()[2:5])
        return Inputs(q, k, v, log_alpha, beta)


class _Drawing:
    def __init__(self, device: str, seed: int = 0) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float32, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float32, device=self.device)


def find_case(name: str) -> Case:
    """Return the case of a name; a family's name, `qwen-16-32`, gives its shortest sequence.

    Raises:
        SpecError: no case has that name.
    """
    own = {case.name: case for case in (*PROMPT_CASES, *KDA_CASES, *PACKED_CASES)}
    cases = {**GATED_DELTA.case, **GATED_DELTA_STEP.case, **own}
    family = (case for n, case in GATED_DELTA.case.items() if n.rpartition("-")[0] == name)
    known = cases.get(name) or next(family, None)
    if known is None:
        raise SpecError(unknown("case", name, cases))
    return known


def make_inputs(
    s: Sizes, dtype: torch.dtype, device: str = "cpu", *, channels: bool = False
) -> Inputs:
    """Draw a case: normal q and v of a dtype, unit keys, float32 log_alpha in (-0.1, 0].

    With `channels`, log_alpha is (B, T, HV, K).
    """
    draw, tokens = _Drawing(device), (s.B, s.T)
    q = draw.normal(*tokens, s.H, s.K)
    k = functional.normalize(draw.normal(*tokens, s.H, s.K), dim=-1)
    v = draw.normal(*tokens, s.HV, s.V)
    log_alpha = -0.1 * draw.uniform(*tokens, s.HV, *((s.K,) if channels else ()))
    beta = draw.uniform(*tokens, s.HV).clamp(0.01, 0.99)
    return Inputs(q.to(dtype), k.to(dtype), v.to(dtype), log_alpha, beta)


def inputs_of(case: Case, setting: Setting) -> Inputs:
    """Draw the operands of the sequences of a case in a setting."""
    dtype, device = setting.torch_dtype, setting.device
    return make_inputs(case.sizes, dtype, device, channels=case.channels)


def make_step_inputs(
    s: Sizes, dtype: torch.dtype, device: str = "cpu", *, channels: bool = False
) -> Inputs:
    """Draw the operands of a step of a case, without a state; with `channels` as `make_inputs`."""
    return make_inputs(s, dtype, device, channels=channels).map(lambda x: x.squeeze(1))


def draw_strengths(s: Sizes, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Draw erase (B, T, HV, K) and write (B, T, HV, V), float32 in (0, 1)."""
    draw = _Drawing(device, 2)
    tokens = (s.B, s.T, s.HV)
    return draw.uniform(*tokens, s.K), draw.uniform(*tokens, s.V)


def make_output_gradient(s: Sizes, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Draw the gradient of o, (B, T, HV, V)."""
    return _Drawing(device, 1).normal(s.B, s.T, s.HV, s.V).to(dtype)


def make_kernel_inputs(
    s: Sizes,
    dtype: torch.dtype,
    device: str,
    lengths: Sequence[int] | None = None,
    *,
    channels: bool = False,
) -> Inputs:
    """Draw sequences with an initial state, packed along T if their lengths are given.

    With `channels`, log_alpha is (B, T, HV, K), and a quarter of the channels does not decay.
    """
    draw, tokens = _Drawing(device), (s.B, s.T)
    q, k, v, state = _draw_operands(draw, s, tokens)
    gates = (s.HV, s.K) if channels else (s.HV,)
    log_alpha = functional.logsigmoid(draw.normal(*tokens, *gates)) / 16
    log_alpha[..., ::4] = 0
    beta = torch.sigmoid(draw.normal(*tokens, s.HV))
    bounds = (
        None
        if lengths is None
        else torch.tensor((0, *accumulate(lengths)), dtype=torch.int64, device=device)
    )
    return Inputs(q.to(dtype), k.to(dtype), v.to(dtype), log_alpha, beta, state, bounds)


def make_kernel_step_inputs(
    s: Sizes,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    device: str,
    *,
    channels: bool = False,
) -> Inputs:
    """Draw one token for each row of a batch, its state, and raw gates whose decays are mild."""
    draw = _Drawing(device)
    q, k, v, state = _draw_operands(draw, s, (s.B,))
    A_log = 0.1 * draw.normal(s.HV) - 3
    wide = (s.K,) if channels else ()
    a, b = draw.normal(s.B, s.HV, *wide).to(dtype), draw.normal(s.B, s.HV).to(dtype)
    raw = RawGates(A_log, 0.1 * draw.normal(s.HV, *wide), a, b)
    inner = functional.softplus(raw.a.double() + raw.dt_bias.double())
    rate = raw.A_log.double().exp()
    log_alpha = (-(rate[:, None] if channels else rate) * inner).float()
    beta = torch.sigmoid(raw.b.double()).float()
    q, k, v = (x.to(dtype) for x in (q, k, v))
    return Inputs(q, k, v, log_alpha, beta, state.to(state_dtype), raw=raw)


def _draw_operands(draw: _Drawing, s: Sizes, tokens: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Draw q, k of unit length, v and the state in float32."""
    q, k = (functional.normalize(draw.normal(*tokens, s.H, s.K), dim=-1) for _ in "qk")
    return q, k, draw.normal(*tokens, s.HV, s.V), draw.normal(s.N, s.HV, s.K, s.V)


def make_cotangents(x: Inputs) -> tuple[Tensor, Tensor]:
    """Draw the gradients of o and of the final state.

    Raises:
        ValueError: the inputs have no state.
    """
    if x.state is None:
        raise ValueError("cotangents are drawn for inputs with a state")
    draw = _Drawing(str(x.v.device), 1)
    return draw.normal(*x.v.shape).to(x.v.dtype), draw.normal(*x.state.shape) / 8
