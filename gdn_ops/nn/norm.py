"""RMS normalisation per head, followed by the output gate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from gdn_ops.errors import SpecError

GATE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
}


class GatedRMSNorm(nn.Module):
    """y = w ⊙ x / sqrt(mean(x²) + eps) ⊙ activation(z), computed in float32 at least.

    Args:
        width: of the last axis, which is normalised.
        eps: added to the mean of squares.
        activation: of the gate z, "silu" or "sigmoid".
        device, dtype: of the weight.

    Raises:
        SpecError: the activation is unknown.
    """

    def __init__(
        self,
        width: int,
        eps: float = 1e-5,
        activation: str = "silu",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in GATE_ACTIVATIONS:
            raise SpecError(
                f"GatedRMSNorm: activation is {activation!r}, should be one of "
                f"{', '.join(GATE_ACTIVATIONS)}"
            )
        self.eps = eps
        self.activation = activation
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalise, then gate.

        Args:
            x: (..., width), any float dtype.
            z: like x, or None for no gate.

        Returns:
            Like x.
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        y = y * self.weight.to(y.dtype)
        if z is not None:
            y = y * GATE_ACTIVATIONS[self.activation](z.to(y.dtype))
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, activation={self.activation!r}"
