"""Compute the decay gate of the layer in log space, and draw its published initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gdn_ops.gates import BoundedGate, SoftplusGate, check_lower_bound, log_decay
from gdn_ops.nn.shares import share
from gdn_ops.nn.values import check_counts, check_device, check_floats, check_made
from gdn_ops.spec.errors import SpecError

LARGEST_A = 16.0
"""A is drawn uniformly from (0, 16), or from (1, 16) beside a decay of every key channel."""

DT_RANGE = (1e-3, 0.1)
"""The step size is drawn log-uniformly from here; dt_bias is its inverse softplus."""


def gate(a: Tensor, A_log: Tensor, dt_bias: Tensor | None = None) -> Tensor:
    """Return log α = −exp(A_log) softplus(a + dt_bias).

    Args:
        a: (..., HV), any float dtype.
        A_log: (HV,) log of the rate A.
        dt_bias: (HV,) or None for 0.

    Returns:
        (..., HV) in [-inf, 0], float32, or float64 if any argument is. It stays exact where α is
        close to 1, which α in a narrow dtype could not be.

    Raises:
        SpecError: an argument is no tensor of floats, or A_log or dt_bias is not (HV,), or is on
            another device than a.
    """
    optional = {} if dt_bias is None else {"dt_bias": dt_bias}
    for name, given in {"a": a, "A_log": A_log, **optional}.items():
        check_floats("gate", **{name: given})
        check_device("gate", name, given, a.device, "a")
        if name != "a" and given.shape != a.shape[-1:]:
            raise SpecError(
                f"gate: {name} has shape {tuple(given.shape)}, should be (HV,) = "
                f"{tuple(a.shape[-1:])}"
            )
    return log_decay(a, A_log, dt_bias)


@torch.no_grad()
def draw_A_log_(x: Tensor, least: float = 0.0) -> Tensor:
    """Fill a tensor with A_log = log A, A ~ U(least, 16), never log 0, and return it."""
    return x.uniform_(least, LARGEST_A).clamp_(min=torch.finfo(torch.float32).tiny).log_()


@torch.no_grad()
def draw_dt_bias_(x: Tensor) -> Tensor:
    """Fill a tensor so that softplus of it is log-uniform in DT_RANGE, and return it."""
    low, high = (math.log(bound) for bound in DT_RANGE)
    dt = x.uniform_(low, high).exp_()
    # softplus⁻¹(dt) = log(eᵈᵗ − 1) = dt + log(1 − e⁻ᵈᵗ)
    return dt.add_(torch.log(-torch.expm1(-dt)))


class DecayGate(nn.Module):
    """Compute log α = −exp(A_log) softplus(a + dt_bias), with parameters that stay float32.

    They are a module of their own, so that what wants parameters of one dtype, such as
    `torch.distributed.fsdp.fully_shard`, can take them apart from the rest of a layer.

    Args:
        heads: HV.
        device: of the parameters.
        channels: K for a decay of every key channel, with dt_bias (HV K,); None for one per head.
        lower_bound: None, or a number in [-5, 0) for the bounded gate,
            log α = lower_bound · sigmoid(exp(A_log) (a + dt_bias)).

    Raises:
        SpecError: `heads` or `channels` is no positive integer, or the bound is out of its range.

    Source:
        Gated DeltaNet (arXiv 2412.06464); per channel Kimi Linear (arXiv 2510.26692); the bounded
        gate and the start of its A_log as flash-linear-attention 0.6 has them.
    """

    def __init__(
        self,
        heads: int,
        device: torch.device | str | None = None,
        *,
        channels: int | None = None,
        lower_bound: float | None = None,
    ) -> None:
        super().__init__()
        check_counts(
            "DecayGate", heads=heads, **({} if channels is None else {"channels": channels})
        )
        if lower_bound is not None:
            check_lower_bound("DecayGate", lower_bound)
        check_made("DecayGate", device, None)
        self.channels, self.lower_bound = channels, lower_bound
        self.A_log, self.dt_bias = (
            nn.Parameter(torch.empty(size, dtype=torch.float32, device=device))
            for size in (heads, heads * (channels or 1))
        )
        self.reset_parameters()
        self.mark()

    def reset_parameters(self) -> None:
        """Draw A = exp(A_log) from U(0, 16), and softplus(dt_bias) log-uniformly in DT_RANGE.

        A decay of every key channel starts with A from U(1, 16), a bounded one with A = 1.
        """
        if self.lower_bound is not None:
            nn.init.zeros_(self.A_log)
        else:
            draw_A_log_(self.A_log, least=0.0 if self.channels is None else 1.0)
        draw_dt_bias_(self.dt_bias)

    def mark(self) -> None:
        """Mark the parameters as free of weight decay.

        Set-ups of optimizers read the mark, as they do for FLA and Mamba. What makes new
        parameters loses it: it is set again here where the module notices.
        """
        for parameter in self.parameters():
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, a: Tensor) -> Tensor:
        """Map a (..., HV) or (..., HV K) to log α (..., HV) or (..., HV, K), float32 at least.

        Raises:
            SpecError: the sizes do not fit.
        """
        A_log, dt_bias = share(self.A_log, a), share(self.dt_bias, a)
        if self.channels is None and self.lower_bound is None:
            return gate(a, A_log, dt_bias)
        is_wide = self.channels is not None
        g = a.unflatten(-1, (-1, self.channels)) if self.channels is not None else a
        if self.lower_bound is not None:
            return BoundedGate(A_log, dt_bias, self.lower_bound, is_wide)(g)
        return SoftplusGate(A_log, dt_bias, is_wide)(g)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Mark the parameters of a copy."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.mark()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DecayGate:
        """Mark the parameters that `to_empty` and conversions make."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.mark()
        return self

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        """Mark the parameters that are loaded with `assign=True`."""
        super()._load_from_state_dict(*arguments, **options)
        self.mark()
