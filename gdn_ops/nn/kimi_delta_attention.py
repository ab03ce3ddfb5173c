"""Apply the layer of Kimi Linear (arXiv 2510.26692), a set of options of GatedDeltaNet.

log α = −exp(A_log) softplus(W W x + dt_bias), of every key channel        β = sigmoid(W x)
y = W (RMSNorm(rule(q, k, v, α, β)) ⊙ sigmoid(W W x))
"""

from __future__ import annotations

from typing import Any, ClassVar

from gdn_ops.call.scalars import as_python
from gdn_ops.nn.gated_delta_net import GatedDeltaNet
from gdn_ops.nn.options import value_width
from gdn_ops.nn.values import check_counts, check_numbers
from gdn_ops.spec.errors import SpecError

_OWNER = "KimiDeltaAttention"


class KimiDeltaAttention(GatedDeltaNet):
    """Apply GatedDeltaNet with the options of Kimi Delta Attention (KDA).

    A key channel has a decay of its own (`channel_decay`), the decay and the output gate are
    projected through a narrow width (`gate_rank`), and the output gate is a sigmoid. All options of
    GatedDeltaNet can be given: `lower_bound=-5.0` makes the bounded gate of GLM-5.3-Flash,
    `gate_rank=None` the full projections of Ling-3.0, `erase_write=True` Gated DeltaNet-2.

    Args:
        hidden_size: width of the input and output.
        num_heads: H, key heads.
        num_value_heads: HV, a multiple of H; H when not given.
        head_dim: K; hidden_size / num_heads when not given.
        expand_v: V / K.
        options: others of GatedDeltaNet. Not given, channel_decay is True, output_gate "sigmoid"
            and gate_rank V.

    Raises:
        SpecError: an option is unknown or has a wrong value, or the sizes do not fit.

    Example:
        >>> import torch
        >>> from gdn_ops.nn import KimiDeltaAttention
        >>> layer = KimiDeltaAttention(32, num_heads=2, lower_bound=-5.0)
        >>> y, state = layer(torch.randn(1, 7, 32))
        >>> y.shape, state.memory.shape, layer.dt_bias.shape
        (torch.Size([1, 7, 32]), torch.Size([1, 2, 16, 16]), torch.Size([32]))

    Source:
        Kimi Linear: An Expressive, Efficient Attention Architecture, arXiv 2510.26692.
    """

    has_token_kernel: ClassVar[bool] = True

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_value_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        **options: Any,
    ) -> None:
        if head_dim is None:
            check_counts(_OWNER, hidden_size=hidden_size, num_heads=num_heads)
            if hidden_size % num_heads:
                raise SpecError(
                    f"{_OWNER}: head_dim is not given and hidden_size / num_heads = "
                    f"{hidden_size / num_heads:.6g} is no integer; pass head_dim="
                )
            head_dim = hidden_size // num_heads
        if "gate_rank" not in options:
            check_counts(_OWNER, head_dim=head_dim)
            check_numbers(_OWNER, expand_v=expand_v)
            options["gate_rank"] = value_width(as_python(head_dim), as_python(expand_v))
        options = {"channel_decay": True, "output_gate": "sigmoid", **options}
        super().__init__(hidden_size, num_heads, num_value_heads, head_dim, expand_v, **options)
