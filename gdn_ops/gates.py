"""Make the gates of the ops from what a layer projects: log α from g, and β from b.

    softplus    log α = −exp(A_log) softplus(g + dt_bias)
    bounded     log α = lower_bound sigmoid(exp(A_log) (g + dt_bias))
    strength    β = sigmoid(b), or 2 sigmoid(b)

A gate is a value that holds the parameters; called with g it returns log α, with gradients for g
and for the parameters. g is (..., HV) for one decay per head, or (..., HV, K) for a decay of every
key channel, as Kimi Delta Attention has it. Layers, `compat.fla` and one decoded token of
`raw_gated_delta_step` compute their gates here.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from gdn_ops.call.bind import Arguments, Tokens
from gdn_ops.call.scalars import as_python
from gdn_ops.call.tensors import check_device, check_floats
from gdn_ops.dispatch import raw_plans, registry
from gdn_ops.dispatch.backend import RawGates
from gdn_ops.ops import gated_delta_step
from gdn_ops.spec.errors import SpecError, SpecTypeError

__all__ = [
    "BoundedGate",
    "SoftplusGate",
    "raw_gated_delta_step",
    "sigmoid_beta",
]

LOWEST_BOUND = -5.0
"""The lowest bound of models, and of kernels that build on it: a product of 16 tokens is finite."""


def log_decay(g: Tensor, A_log: Tensor, dt_bias: Tensor | None) -> Tensor:
    """Return −exp(A_log) softplus(g + dt_bias) of tensors that are broadcast, without checks.

    Args:
        g: any float dtype.
        A_log, dt_bias: broadcast against g; dt_bias may be None for 0.

    Returns:
        log α of the shape of g, float32, or float64 if any of them is.
    """
    dtype = _wide(g, A_log, dt_bias)
    step = g.to(dtype) if dt_bias is None else g.to(dtype) + dt_bias.to(dtype)
    return -A_log.to(dtype).exp() * _softplus(step)


def log_bounded_decay(
    g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float
) -> Tensor:
    """Return lower_bound sigmoid(exp(A_log) (g + dt_bias)) as `log_decay` does; A_log None is 0."""
    dtype = _wide(g, A_log, dt_bias)
    step = g.to(dtype) if dt_bias is None else g.to(dtype) + dt_bias.to(dtype)
    # Infinite steps would give the gradient of A_log a product of 0 and infinity.
    limits = torch.finfo(dtype)
    step = step.clamp(limits.min, limits.max)
    return lower_bound * (step if A_log is None else A_log.to(dtype).exp() * step).sigmoid()


def _softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x)); above the threshold x itself is the nearest number of the dtype."""
    return functional.softplus(x, threshold=40.0 if x.dtype == torch.float64 else 20.0)


def _wide(*tensors: Tensor | None) -> torch.dtype:
    """Return float32, or float64 if a tensor is."""
    is_double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if is_double else torch.float32


def write_strength(b: Tensor, is_doubled: bool | None) -> Tensor:
    """Return sigmoid(b), or 2 sigmoid(b), float32 at least, without checks."""
    beta = b.to(_wide(b)).sigmoid()
    return 2 * beta if is_doubled else beta


def sigmoid_beta(b: Tensor, *, allow_neg_eigval: bool = False) -> Tensor:
    """Return the write strength β = sigmoid(b), or 2 sigmoid(b), from its logits.

    Args:
        b: (..., HV), any float dtype.
        allow_neg_eigval: whether β is in [0, 2] instead of [0, 1]: above 1 the transition has a
            negative eigenvalue.

    Returns:
        β of the shape of b, float32, or float64 if b is.

    Raises:
        SpecError: b is no tensor of floats, or `allow_neg_eigval` is neither True nor False.

    Example:
        >>> import torch
        >>> from gdn_ops.gates import sigmoid_beta
        >>> sigmoid_beta(torch.zeros(2), allow_neg_eigval=True)
        tensor([1., 1.])
    """
    check_floats("sigmoid_beta", b=b)
    if not isinstance(as_python(allow_neg_eigval), bool):
        raise SpecTypeError(
            f"sigmoid_beta: allow_neg_eigval is {allow_neg_eigval!r}, should be True or False"
        )
    return write_strength(b, allow_neg_eigval)


@dataclass(frozen=True, eq=False)
class SoftplusGate:
    """Compute log α = −exp(A_log) softplus(g + dt_bias): Mamba2, Gated DeltaNet, Kimi Linear.

    Attributes:
        A_log: (HV,) log of the rate, or (1, 1, HV, 1) as Kimi Linear stores it; any float dtype.
        dt_bias: (HV,) beside g (..., HV); (HV, K) or flat (HV K,), as models store it, beside
            g (..., HV, K); None for 0.
        per_channel: whether g has a channel axis. None reads it off the shapes; it is needed where
            they allow both, which is without `dt_bias` and with HV in either place.

    Raises:
        SpecError: a parameter is no tensor of floats.

    Example:
        >>> import torch
        >>> from gdn_ops.gates import SoftplusGate
        >>> gate = SoftplusGate(torch.zeros(2), torch.zeros(2 * 3))
        >>> gate(torch.full((1, 2, 3), -1e4)).exp().unique()
        tensor([1.])

    Source:
        Mamba2 (arXiv:2405.21060), which Gated DeltaNet (arXiv:2412.06464) takes over; Kimi Linear
        (arXiv:2510.26692) per channel.
    """

    A_log: Tensor
    dt_bias: Tensor | None = None
    per_channel: bool | None = None

    name: ClassVar[str] = "SoftplusGate"

    def __post_init__(self) -> None:
        """Check that the parameters are tensors of floats."""
        _check_parameters(self.name, A_log=self.A_log, dt_bias=self.dt_bias)
        _check_per_channel(self.name, self.per_channel)

    def __call__(self, g: Tensor) -> Tensor:
        """Return log α in [-inf, 0] of the shape of g (..., HV) or (..., HV, K).

        Returns:
            float32, or float64 if any tensor is: log α is exact where α is close to 1. A g of
            -inf gives α = 1 and gradients of 0.

        Raises:
            SpecError: g is no tensor of floats, or shapes or devices do not fit.
        """
        return self._of(self.name, g, self.per_channel)

    def _of(self, owner: str, g: Tensor, per_channel: bool | None) -> Tensor:
        A_log, dt_bias = _fitted(owner, g, self.A_log, self.dt_bias, per_channel)
        assert A_log is not None
        return log_decay(g, A_log, dt_bias)


@dataclass(frozen=True, eq=False)
class BoundedGate:
    """Compute log α = lower_bound sigmoid(exp(A_log) (g + dt_bias)), which cannot be lower.

    FLA calls it the safe gate; GLM-5.3-Flash and Ling-3.0 use it with a bound of -5.

    Attributes:
        A_log: (HV,), (1, 1, HV, 1), or None for a rate of 1.
        dt_bias, per_channel: as `SoftplusGate` has them.
        lower_bound: of log α, in [-5, 0).

    Raises:
        SpecError: a parameter is no tensor of floats, or the bound is outside of its range.

    Example:
        >>> import torch
        >>> from gdn_ops.gates import BoundedGate
        >>> BoundedGate(torch.zeros(2))(torch.tensor([[-1e4, 1e4]])).tolist()
        [[-0.0, -5.0]]

    Source:
        The safe gate of flash-linear-attention 0.6, `fla.ops.kda`.
    """

    A_log: Tensor | None
    dt_bias: Tensor | None = None
    lower_bound: float = LOWEST_BOUND
    per_channel: bool | None = None

    name: ClassVar[str] = "BoundedGate"

    def __post_init__(self) -> None:
        """Check the bound, and that the parameters are tensors of floats."""
        _check_parameters(self.name, A_log=self.A_log, dt_bias=self.dt_bias)
        check_lower_bound(self.name, self.lower_bound)
        _check_per_channel(self.name, self.per_channel)

    def __call__(self, g: Tensor) -> Tensor:
        """Return log α in [lower_bound, 0] of the shape of g (..., HV) or (..., HV, K).

        Returns:
            float32, or float64 if any tensor is. A g of -inf gives α = 1, one of inf the bound,
            and both gradients of 0.

        Raises:
            SpecError: g is no tensor of floats, or shapes or devices do not fit.
        """
        return self._of(self.name, g, self.per_channel)

    def _of(self, owner: str, g: Tensor, per_channel: bool | None) -> Tensor:
        A_log, dt_bias = _fitted(owner, g, self.A_log, self.dt_bias, per_channel)
        return log_bounded_decay(g, A_log, dt_bias, float(self.lower_bound))


Gate = SoftplusGate | BoundedGate


def raw_gated_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    gate: Gate,
    allow_neg_eigval: bool = False,
    scale: float | None = None,
    qk_l2norm: bool = False,
    state_indices: Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Advance states by one token whose gates are raw: log α = gate(g) and β = sigmoid(b).

    Args:
        q, k: (B, H, K).
        v: (B, HV, V).
        g: (B, HV), or (B, HV, K) for a decay of every key channel: what `gate` is called with.
        b: (B, HV) logits of β.
        state: (B, HV, K, V), (P, HV, K, V) with `state_indices`, or None for zeros.
        gate: a `SoftplusGate` or a `BoundedGate`.
        allow_neg_eigval: whether β is 2 sigmoid(b).
        state_indices: (B,) slots of a pool, as `gated_delta_step` takes them.
        scale, qk_l2norm, inplace, backend: likewise.

    Returns:
        o (B, HV, V) and the new state, as of `gated_delta_step`.

    Raises:
        SpecError: the gate is none, g has another rank, or the call breaks the spec of
            `gated_delta_step`.

    Example:
        >>> import torch
        >>> from gdn_ops.gates import SoftplusGate, raw_gated_delta_step
        >>> q, g, b = torch.randn(1, 2, 4), torch.randn(1, 2, 4), torch.randn(1, 2)
        >>> gate = SoftplusGate(torch.zeros(2), torch.zeros(2, 4))
        >>> o, state = raw_gated_delta_step(q, q, q, g, b, gate=gate, qk_l2norm=True)
        >>> o.shape, state.shape
        (torch.Size([1, 2, 4]), torch.Size([1, 2, 4, 4]))
    """
    op = "raw_gated_delta_step"
    _check_raw(op, gate, g, b)
    options: dict[str, Any] = {"scale": scale, "qk_l2norm": qk_l2norm, "inplace": inplace}
    options |= {"state": state, "state_indices": state_indices}
    raw = Tokens(q, k, v, log_alpha=g, beta=b)
    arguments = Arguments(raw, backend=registry.resolve(backend), **options)
    fused = _fused(op, arguments, gate, allow_neg_eigval)
    if fused is not None:
        return fused
    log_alpha = gate._of(op, g, g.dim() == 3)
    beta = sigmoid_beta(b, allow_neg_eigval=allow_neg_eigval)
    return gated_delta_step(q, k, v, None, beta, log_alpha=log_alpha, backend=backend, **options)


def _fused(
    op: str, arguments: Arguments, gate: Gate, allow_neg_eigval: bool
) -> tuple[Tensor, Tensor] | None:
    """Run a step whose backend makes its gates, or return None where they are made before."""
    g, b = arguments.tokens.log_alpha, arguments.tokens.beta
    assert g is not None and b is not None
    lower_bound = float(gate.lower_bound) if isinstance(gate, BoundedGate) else None

    def check() -> None:
        gate._of(op, g, g.dim() == 3)
        sigmoid_beta(b, allow_neg_eigval=allow_neg_eigval)

    gates = RawGates(lower_bound, 2.0 if allow_neg_eigval is True else 1.0)
    return raw_plans.run(arguments, gates, gate.A_log, gate.dt_bias, check)


def _check_raw(op: str, gate: object, g: Tensor, b: Tensor) -> None:
    if not isinstance(gate, SoftplusGate | BoundedGate):
        raise SpecTypeError(
            f"{op}: gate has type {type(gate).__name__}, should be a SoftplusGate or a BoundedGate "
            f"of gdn_ops.gates"
        )
    check_floats(op, g=g, b=b)
    if g.dim() not in (2, 3):
        raise SpecError(
            f"{op}: g has shape {tuple(g.shape)}, should be (B, HV), or (B, HV, K) for a decay of "
            f"every key channel"
        )


def check_lower_bound(owner: str, lower_bound: object) -> None:
    """Check the bound of a gate.

    Args:
        owner: what the message starts with.
        lower_bound: the bound.

    Raises:
        SpecError: it is no number in [-5, 0).
    """
    text = f"{owner}: lower_bound is {lower_bound!r}, should be a number in [-5, 0)"
    if isinstance(lower_bound, bool) or not isinstance(lower_bound, numbers.Real):
        raise SpecTypeError(text)
    if not LOWEST_BOUND <= float(lower_bound) < 0:
        raise SpecError(f"{text}: log α of the bounded gate lies between it and 0")


def _check_parameters(owner: str, **parameters: Tensor | None) -> None:
    for name, value in parameters.items():
        if value is not None or (name == "A_log" and owner == SoftplusGate.name):
            check_floats(owner, **{name: value})


def _check_per_channel(owner: str, per_channel: object) -> None:
    if not (per_channel is None or isinstance(per_channel, bool)):
        raise SpecTypeError(
            f"{owner}: per_channel is {per_channel!r}, should be True, False or None"
        )


def _fitted(
    owner: str, g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, per_channel: bool | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the parameters of a gate as they are broadcast against g, after checks.

    Raises:
        SpecError: shapes or devices do not fit.
    """
    check_floats(owner, g=g)
    for name, given in (("A_log", A_log), ("dt_bias", dt_bias)):
        if given is not None:
            check_device(owner, name, given, g.device, "g")
    if per_channel is None:
        per_channel = _has_channels(owner, g, A_log, dt_bias)
    if g.dim() < 1 + per_channel:
        axes = "(..., HV, K)" if per_channel else "(..., HV)"
        raise SpecError(f"{owner}: g has shape {tuple(g.shape)}, should be {axes}")
    heads = g.shape[-2] if per_channel else g.shape[-1]
    if A_log is not None:
        if tuple(A_log.shape) not in ((heads,), (1, 1, heads, 1)):
            text = f"should be (HV,) = ({heads},)"
            raise SpecError(f"{owner}: A_log has shape {tuple(A_log.shape)}, {text}")
        A_log = A_log.reshape(heads, 1) if per_channel else A_log.reshape(heads)
    if dt_bias is not None:
        shapes: list[tuple[int, ...]] = [(heads,)]
        text = f"(HV,) = ({heads},)"
        if per_channel:
            width = g.shape[-1]
            shapes = [(heads, width), (heads * width,)]
            text = f"(HV, K) = ({heads}, {width}) or flat, ({heads * width},)"
        if tuple(dt_bias.shape) not in shapes:
            raise SpecError(f"{owner}: dt_bias has shape {tuple(dt_bias.shape)}, should be {text}")
        dt_bias = dt_bias.reshape(heads, -1) if per_channel else dt_bias
    return A_log, dt_bias


def _has_channels(owner: str, g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None) -> bool:
    """Return whether g has a channel axis, read off the shapes of the parameters.

    Raises:
        SpecError: the shapes allow both.
    """
    shape = tuple(g.shape)
    if dt_bias is not None:
        return dt_bias.dim() == 2 or (dt_bias.dim() == 1 and tuple(dt_bias.shape) != shape[-1:])
    count = None if A_log is None else A_log.numel()
    if A_log is None or shape[-2:] == (count, count):
        fits = "no parameter says" if A_log is None else f"HV = {count} fits both"
        raise SpecError(
            f"{owner}: g has shape {shape}, which may be (..., HV) or (..., HV, K): {fits}; pass "
            f"per_channel=True or per_channel=False"
        )
    return shape[-2:-1] == (count,)
